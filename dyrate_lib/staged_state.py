"""Which tokens each layer holds under a staged method, and where: tensors only, shared by our loop and the hooks.

While the prompt is read, every cut leaves a shorter sequence (`Rows`): padding first, order kept, merged tokens after the
last image token. Samples may be left with different numbers of rows; then the shorter are padded on the left, so that the
last row is the last prompt token in every sample. At decode each layer has a `Memory` of what lies in its cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks
from .attention import row_attention
from .layout import gather_columns
from .masks import IMG, PAD, RES
from .methods.staged import Staged, StageView, keep_best

if TYPE_CHECKING:
    from .models import Adapter, Prompt


def columns_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The columns where [B, S] bool is True, in order, and which of them are there: [B, n] int64 and [B, n] bool."""
    n = int(mask.sum(-1).max()) if mask.numel() else 0
    columns = torch.argsort((~mask).long(), dim=-1, stable=True)[:, :n]
    return columns, torch.gather(mask, 1, columns)


@dataclass
class Rows:
    """A sequence as a layer receives it. types [B, S] (PAD, SYS, IMG, INS); original [B, S]: which image token of the
    prompt (0..N-1), -1 for text and merged tokens; position_ids [B, S] or [B, S, axes]; asked [B, S] bool, the scoring rows."""

    types: Tensor
    original: Tensor
    position_ids: Tensor
    asked: Tensor

    @classmethod
    def of(cls, prompt: Prompt, asked: Tensor) -> Rows:
        image = prompt.types == IMG
        original = torch.where(image, image.long().cumsum(-1) - 1, -1)
        return cls(prompt.types, original, prompt.position_ids, asked)

    @property
    def real(self) -> Tensor:
        return self.types != PAD


@dataclass
class Memory:
    """What one layer's cache holds of the prompt, in the cache's order. types, original [B, S] as in `Rows` (PAD where
    nothing is read); whole [B]: image tokens after the prompt; counts [B]: those read now; text [B]: other tokens.
    n_slots: image tokens lie in the first n_slots, 0 where the cache is in the prompt's order; start: slots cut off.
    """

    types: Tensor
    original: Tensor
    whole: list[int]
    counts: list[int]
    text: list[int]
    n_slots: int = 0
    start: int = 0
    columns: Tensor | None = None

    def select(self, index: Tensor, rows: list[int]) -> None:
        self.types, self.original = self.types.index_select(0, index), self.original.index_select(0, index)
        for key in ("whole", "counts", "text"):
            setattr(self, key, [getattr(self, key)[row] for row in rows])

    def readable(self, fresh: int) -> Tensor:
        """[B, entries] bool from `start` on, with `fresh` response tokens."""
        return F.pad(self.types[:, self.start :] != PAD, (0, fresh), value=True)


class StagedState:
    """The state of one batch under a staged method."""

    def __init__(self, method: Staged, n_layers: int, prompt: Prompt) -> None:
        self.method, self.n_layers = method, n_layers
        self.layer = method.resolve_layer(n_layers)
        self.stages = {cut: stage for stage, cut in enumerate(method.cuts(n_layers))}
        self.n_image: list[int] = prompt.n_image.tolist()
        self.rows = Rows.of(prompt, method.queries(prompt))
        self.last_position = prompt.last_position
        self.renumber = method.renumber and prompt.position_ids.ndim == 2
        self.counts = list(self.n_image)
        self.steps = 0
        self.memories: list[Memory] = []
        self.segments: list[int] = []  # per layer, how many cuts lie before it
        n = max(self.n_image, default=0)
        self.ranking = torch.arange(n, device=prompt.types.device).expand(len(self.n_image), n)

    # -- the prompt ----------------------------------------------------------------------------------------------

    def look(
        self, adapter: Adapter, layer: int, normed: Tensor, rotary: tuple[Tensor, Tensor], keys: Tensor | None = None
    ) -> Tensor:
        """Head-mean attention of the asked rows alone, over the rows as they are now: [B, R, S] float32.

        normed: [B, S, D], layer `layer`'s normalised input; keys: its rotated keys if they are there already.
        """
        asked, there = columns_of(self.rows.asked)
        rotary_asked = (gather_columns(rotary[0], asked), gather_columns(rotary[1], asked))
        (q,) = adapter.project(layer, gather_columns(normed, asked), rotary_asked, "q")
        if keys is None:
            (keys,) = adapter.project(layer, normed, rotary, "k")
        columns = torch.arange(normed.shape[1], device=normed.device)
        allowed = self.rows.real[:, None] & (columns <= asked[..., None])
        allowed = allowed | (columns == asked[..., None])  # an absent row must not be empty
        return row_attention(q, keys, allowed).mean(1) * there[..., None]

    def cut(self, layer: int, hidden: Tensor, attention: Tensor) -> Tensor:
        """Let the method cut before `layer`. hidden [B, S, D]; attention as `look` gives it. Returns [B, S', D]."""
        rows, stage = self.rows, self.stages[layer]
        columns, there = columns_of(rows.types == IMG)
        if not columns.shape[1]:
            return hidden
        seen = torch.gather(attention, 2, columns[:, None].expand(-1, attention.shape[1], -1)) * there[:, None]
        _, asked = columns_of(rows.asked)
        last = there & (columns == hidden.shape[1] - 1)
        images = gather_columns(hidden, columns)
        cut = self.method.cut(StageView(stage, seen, asked, images, last, list(self.counts), list(self.n_image)))
        keep = (cut.keep & there) | last
        if stage == 0:
            order = torch.argsort(torch.where(keep, cut.scores, -torch.inf), dim=-1, descending=True, stable=True)
            self.ranking = torch.where(masks.prefix_masks(keep.sum(-1), order.shape[1]), order, -1)
        n_merged = list(cut.n_merged) if cut.merged is not None else [0] * len(self.counts)
        self.counts = [a + b for a, b in zip(keep.sum(-1).tolist(), n_merged)]
        stays = rows.real.scatter(1, columns, torch.where(there, keep, torch.gather(rows.real, 1, columns)))
        if bool((stays == rows.real).all()) and not any(n_merged):
            return hidden
        return self._rebuild(hidden, stays, cut.merged, n_merged, torch.where(there, columns, -1).amax(-1))

    def _rebuild(
        self, hidden: Tensor, stays: Tensor, merged: Tensor | None, n_merged: list[int], last: Tensor
    ) -> Tensor:
        """The rows that stay and the merged ones, in order, padded on the left; last [B]: the last image column.

        Merged rows come behind it, but before a picture's last token that is the prompt's last: its row predicts the reply.
        """
        rows, width = self.rows, stays.shape[1]
        place = torch.arange(width, device=stays.device).expand_as(stays)
        key = torch.where(stays, 2 * place, -1)
        types, original, asked, position_ids = rows.types, rows.original, rows.asked, rows.position_ids
        if merged is not None and merged.shape[1]:
            extra = merged.shape[1]
            new = masks.prefix_masks(torch.tensor(n_merged, device=stays.device), extra)
            behind = torch.where(last == width - 1, 2 * last - 1, 2 * last + 1)
            key = torch.cat((key, torch.where(new, behind[:, None], -1)), dim=1)
            types, original = F.pad(types, (0, extra), value=IMG), F.pad(original, (0, extra), value=-1)
            asked = F.pad(asked, (0, extra))
            beside = gather_columns(position_ids, last.clamp(min=0)[:, None].expand(-1, extra))
            position_ids = torch.cat((position_ids, beside), dim=1)
            hidden = torch.cat((hidden, merged.to(hidden.dtype)), dim=1)
        left = int((key >= 0).sum(-1).max())
        order = torch.argsort(key, dim=-1, stable=True)[:, key.shape[1] - left :]
        real = torch.gather(key, 1, order) >= 0
        if self.renumber:
            positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        else:
            positions = gather_columns(position_ids, order) * real.view(*real.shape, *[1] * (position_ids.ndim - 2))
        self.rows = Rows(
            torch.where(real, torch.gather(types, 1, order), PAD),
            torch.where(real, torch.gather(original, 1, order), -1),
            positions,
            torch.gather(asked, 1, order) & real,
        )
        return gather_columns(hidden, order)

    def enter(self, layer: int) -> Memory:
        """Note what `layer` received: call once a layer, in order, as the prompt passes. Returns its memory."""
        before = self.memories[-1] if self.memories else None
        if before is not None and layer not in self.stages:
            memory = replace(before, whole=list(before.whole), counts=list(before.counts), text=list(before.text))
        else:
            rows = self.rows
            text = ((rows.types != PAD) & (rows.types != IMG)).sum(-1).tolist()
            memory = Memory(rows.types, rows.original, list(self.counts), list(self.counts), text)
            if self.method.anneals:
                memory = self._image_first(memory)
        self.memories.append(memory)
        self.segments.append(sum(cut <= layer for cut in self.stages))
        return memory

    def _image_first(self, memory: Memory) -> Memory:
        """The cache in another order: image tokens first, so that those that leave are cut off at the front."""
        image, there = columns_of(memory.types == IMG)
        image, there = image.flip(-1), there.flip(-1)  # absent ones to the front
        text = (memory.types != PAD) & (memory.types != IMG)
        order = torch.argsort(text.long(), dim=-1, stable=True)[:, text.shape[1] - max(memory.text) :]
        columns = torch.cat((image, order), dim=1)
        real = torch.cat((there, torch.gather(text, 1, order)), dim=1)
        types = torch.where(real, torch.gather(memory.types, 1, columns), PAD)
        original = torch.where(real, torch.gather(memory.original, 1, columns), -1)
        return replace(memory, types=types, original=original, n_slots=image.shape[1], columns=columns)

    # -- the reply -----------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """The next response token is about to be read."""
        self.steps += 1

    def positions(self, layer: int) -> Tensor:
        """The newest token's position at `layer`, [B, 1] or [B, 1, axes] int64."""
        if not self.renumber:
            return self.last_position + self.steps
        memory = self.memories[layer]
        lengths = [a + b + self.steps - 1 for a, b in zip(memory.whole, memory.text)]
        return torch.tensor(lengths, device=self.last_position.device)[:, None]

    def leaving(self, layer: int, q: Tensor, keys: Tensor) -> tuple[Tensor, int] | None:
        """Which image entries of `layer` the newest query drops for good, before it reads.

        q [B, H, 1, d]; keys [B, heads, T, d]: all that the layer holds from `start` on, the newest included. Returns None
        if nothing leaves, else an order [B, n] of the first n entries that puts those leaving first, and how many entries
        then to cut off at the front; afterwards the memory is that of the cut cache.
        """
        memory = self.memories[layer]
        counts = self.method.read_counts(memory.whole, self.steps)
        counts = [min(new, old) for new, old in zip(counts, memory.counts)]
        if counts == memory.counts:
            return None
        image = slice(memory.start, memory.n_slots)
        present = memory.types[:, image] != PAD
        fresh = keys.shape[2] - (memory.types.shape[1] - memory.start)
        attention = row_attention(q, keys, memory.readable(fresh)).mean(1)[:, 0, : present.shape[1]]
        # slots hold the last image token first, and of equal ones the earlier stays, as at a cut
        scores = attention.masked_fill(~present, -torch.inf).flip(-1)
        keep = keep_best(scores, counts).flip(-1) & present
        order = torch.argsort(keep.long(), dim=-1, stable=True)
        stays = torch.gather(keep, 1, order)
        memory.types, memory.original = memory.types.clone(), memory.original.clone()
        memory.types[:, image] = torch.where(stays, IMG, PAD)
        memory.original[:, image] = torch.where(stays, torch.gather(memory.original[:, image], 1, order), -1)
        memory.counts = counts
        start = memory.n_slots - max(counts)
        drop, memory.start = start - memory.start, start
        return order, drop

    def readable(self, layer: int) -> Tensor | None:
        """[B, entries] bool of what the newest query reads at `layer`, itself included; None if that is everything."""
        memory = self.memories[layer]
        if (memory.types.shape[1] - memory.start) * len(memory.text) == sum(memory.counts) + sum(memory.text):
            return None
        return memory.readable(self.steps)

    def types(self, layer: int) -> Tensor:
        """[B, entries] int64: the type of every entry of `layer`, response tokens included."""
        memory = self.memories[layer]
        return F.pad(memory.types[:, memory.start :], (0, self.steps), value=RES)

    # -- the trace -----------------------------------------------------------------------------------------------

    @property
    def kept(self) -> Tensor:
        """[B] int64: image tokens read at layer P now."""
        return torch.tensor(self.memories[self.layer].counts, device=self.ranking.device)

    def by_layer(self) -> Tensor:
        """[B, L] int64: image tokens read at each layer."""
        return torch.tensor([memory.counts for memory in self.memories], device=self.ranking.device).T

    def reads(self) -> Tensor:
        """[B, N] bool: the prompt's own image tokens read at layer P now (merged ones are none of them)."""
        memory, (batch, n) = self.memories[self.layer], self.ranking.shape
        original = memory.original[:, memory.start :]
        found = torch.zeros(batch, n + 1, dtype=torch.bool, device=original.device)
        return found.scatter(1, torch.where(original < 0, n, original), True)[:, :n]

    def select(self, index: Tensor) -> None:
        """Reorder the samples (beam search)."""
        rows, index = index.tolist(), index.to(self.ranking.device)
        self.n_image, self.counts = [self.n_image[row] for row in rows], [self.counts[row] for row in rows]
        self.ranking = self.ranking.index_select(0, index)
        self.last_position = self.last_position.index_select(0, index)
        for memory in self.memories:
            memory.select(index, rows)
