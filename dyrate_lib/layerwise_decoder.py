"""Our loop under `LayerTopK`: the prompt as it is, then steps in which every layer picks the image tokens that it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import masks
from .attention import attend
from .decoder import PrunedDecoder, Snapshot
from .layout import take_entries
from .methods.layer_topk import LayerTopK
from .methods.none import NoReduction
from .models import Adapter, Prompt
from .step import step_for


def attend_top(
    q: Tensor, k: Tensor, v: Tensor, image_index: Tensor, counts: Tensor, most: int, others: Tensor, real: Tensor,
    unread: Tensor | None = None, pool: str = "max",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of the newest row over the image tokens that it weighs most and over everything that is no image token.

    Args:
        q: [B, H, 1, d] rotated query; k, v: [B, H or kv heads, T, d], all that is in the cache, the row's own entry included.
        image_index: [B, N] int64 columns of the image tokens, -1 absent. counts: [B] int64, image tokens to read; most: their
            largest, known to the host.
        others: [B, M] int64 columns of what is read in any case; real: [B, M] bool, False where such a column is only filler.
        unread: [B, T] bool, columns that nobody reads or weighs (padding), or None.
        pool: a token's weight is the "max" or "mean" of the heads'.

    Returns:
        (attended [B, H, 1, d] in v's dtype, reads [B, N] bool: the image tokens read, in raster order). Scores and softmax are
        in float32 or better. Every key is multiplied once, and of the values only those read.
    """
    batch, heads, _, width = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    shared = q.reshape(batch, k.shape[1], -1, width).to(exact)  # rows that read the same keys
    scores = (shared * width**-0.5) @ k.to(exact).transpose(-1, -2)
    if unread is not None:
        scores = scores.masked_fill(unread[:, None, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1).flatten(1, 2)
    pooled = weights.amax(1) if pool == "max" else weights.mean(1)
    ranking = masks.rank_tokens(torch.gather(pooled, 1, image_index.clamp(min=0)), image_index >= 0)
    picked = torch.gather(image_index, 1, ranking[:, :most]).clamp(min=0)
    columns = torch.cat((picked, others), dim=1)
    readable = torch.cat((masks.prefix_masks(counts, most), real), dim=1)
    columns = columns.where(readable, k.shape[2] - 1)  # filler is the row's own entry, so that nothing unread is touched
    found = torch.gather(scores, 3, columns[:, None, None].expand(-1, *scores.shape[1:3], -1))
    found = torch.softmax(found.masked_fill(~readable[:, None, None], -torch.inf), dim=-1)
    attended = found.to(v.dtype) @ take_entries(v, columns)
    reads = masks.ranking_to_tokens(masks.prefix_masks(counts, image_index.shape[1]), ranking)
    return attended.reshape(batch, heads, 1, width), reads


class LayerwiseDecoder(PrunedDecoder):
    """One batch from prompt to reply under `LayerTopK`; a `Runner` of `decoder.py`.

    The prompt's pass is that of the unpruned loop, and so is a layer's step where no sample leaves a token out.
    layer_reads: after each step, by layer >= P, [B, N] bool: the image tokens (raster order) that the layer read.
    """

    def __init__(self, adapter: Adapter, prompt: Prompt, method: LayerTopK, capacity: int) -> None:
        super().__init__(adapter, prompt, NoReduction(), capacity)  # nothing leaves the caches
        self.rule = method
        self.first = method.prepare(adapter.n_layers, adapter.n_heads, prompt.embeds.device)
        self.feature_layer = self.first - 1
        n_image = self.state.n_image
        self._count = method.counts(n_image)
        rows = [method.at_layer(i, self._count, n_image) if i >= self.first else n_image for i in range(adapter.n_layers)]
        self._counts = torch.stack(rows, dim=-1)  # [B, L]
        # asked of the device once: for each layer the most tokens that a sample reads, and the most that one leaves out
        left = n_image[:, None] - self._counts
        self._most, self._left = torch.stack((self._counts.amax(0), left.amax(0))).tolist()
        self._text, self._text_real = masks.tail_order(prompt.types, prompt.image_index, prompt.image_index, 0)
        self.layer_reads: dict[int, Tensor] = {}

    @torch.no_grad()
    def prefill(self) -> Tensor:
        logits = super().prefill()
        self.layer_reads = dict.fromkeys(range(self.first, self.adapter.n_layers), self.state.present)
        self.layer = self.first  # whose reads the trace has; the prompt was read as if no layer pruned
        return logits

    @torch.no_grad()
    def decode(self, token: Tensor) -> Tensor:
        adapter, prompt = self.adapter, self.prompt
        if self._step is None:
            self._step = step_for(adapter, prompt.embeds)
        step = self._step
        self.steps += 1
        self._masks.clear()
        x = step.embed(token)
        rotary = step.reply_rotary(self._last, self.steps, max(self.capacity - 1, self.steps))
        start, batch = prompt.types.shape[1], prompt.types.shape[0]
        reply = torch.arange(start, start + self.steps, device=token.device).expand(batch, -1)
        others = torch.cat((self._text, reply), dim=1)
        real = torch.nn.functional.pad(self._text_real, (0, self.steps), value=True)
        unread = ~self._real[:, : start + self.steps] if self._padded else None
        for index in range(adapter.n_layers):
            q, k, v = step.project(index, x, rotary)
            keys, values = self._store(index, k, v)
            if index < self.first or not self._left[index]:
                attended = attend(q, keys, values, self._step_mask(0, q))
            else:
                attended, self.layer_reads[index] = attend_top(
                    q, keys, values, prompt.image_index, self._counts[:, index], self._most[index], others, real, unread,
                    self.rule.pool,
                )  # fmt: skip
            x = step.finish(index, x, attended)
            if index == self.feature_layer:
                self._look(q, keys)
        return step.logits(x)

    def kv_lengths(self) -> list[int]:
        """Entries in each layer's cache, all of whose keys the next query reads (values: those of its image tokens and text)."""
        return [self._filled[index] for index in range(self.adapter.n_layers)]

    def snapshot(self) -> Snapshot:
        """See `Runner`. `kept` is k before `tilt` (all of them for the prompt); `reads` are layer P's."""
        state = self.state
        kept = self._count if self.steps else state.n_image
        by_layer = self._counts if self.steps else state.n_image[:, None].expand_as(self._counts)
        return Snapshot(kept, self.shares, by_layer, state.ranking, self.layer_reads[self.first])
