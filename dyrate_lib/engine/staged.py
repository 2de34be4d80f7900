"""Methods that cut at several layers by their own attention (ST3, PyramidDrop, SparseVLM), in the engine's decode loop.

The prompt is read by the reference decoder, which waits for the host at every cut; its caches are then taken over. At decode
each layer has its own count, known beforehand for every pass. Where a count falls, the newest row's attention in that layer
says which entries leave: the layer's list of entries to read is put in that order, and the count cuts it off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import masks
from ..layout import take_entries
from ..masks import IMG, PAD, RES
from ..methods.staged import Staged
from ..staged_decoder import StagedDecoder
from ..staged_state import Memory, columns_of
from .batch import Batch
from .cache import LayerShape, rounded
from .choice import Choice
from .graphs import Replayable
from .state import Plan, State

if TYPE_CHECKING:
    from .runner import Engine


class StagedRun:
    """One batch under a staged method. `prefill()` once, then `decode()` a pass, as `runner.Run`."""

    def __init__(self, engine: Engine, method: Staged, layer: int, batch: Batch, passes: int, choice: Choice) -> None:
        self.engine, self.method, self.batch, self.choice = engine, method, batch, choice
        info, (b, t) = engine.info, batch.shape
        cuts = method.cuts(info.n_layers) if method.renumber else ()
        self.plan = Plan(
            batch=b, columns=1, images=batch.image_index.shape[1], axes=0, places=0, given=True, layer=layer,
            n_layers=info.n_layers, passes=rounded(passes) if engine.buckets else passes, feature=layer - 1, ranked=False,
            moves=method.anneals, table=False, capped=False, n_rates=0, by_rank=f"staged {cuts}",
            reversible=False, choice=choice.key,
        )  # fmt: skip
        # the reference decoder's caches are still there when ours are filled from them
        entries = [rounded(t + self.plan.passes)] * info.n_layers + [t] * info.n_layers
        engine.make_room(b, t, entries, (engine.tail,), self.plan)

    def prefill(self) -> None:
        """Read the prompt, take its caches over, and choose the first token (pass 0)."""
        engine, method = self.engine, self.method
        decoder = StagedDecoder(engine.adapter, self.batch.prompt, method, 1)
        logits = decoder.prefill()
        self._take_over(decoder)
        state = self.state
        state.logits.copy_(logits)
        shares: Any = decoder.shares
        state.shares.copy_(shares)
        state.seen_shares[0].copy_(shares)
        state.ranking.copy_(decoder.state.ranking)
        state.n_image.copy_(self.batch.n_image)
        state.lengths.copy_(self.batch.lengths)
        self.choice.load(state)
        if self.held.generator is not None and self.choice.generator is not None:
            self.held.generator.manual_seed(self.choice.generator.initial_seed())
            self.choice.generator = self.held.generator
        self.held.generator = self.choice.generator
        self._note()
        engine.ops.emit(state, self.choice(state), False)

    def decode(self) -> None:
        """One more token for every sample."""
        work: Callable[[], None] = self._step
        if not self.engine.capture:
            work()
            return
        if self.held.graph is None:
            self.held.graph = Replayable(self.engine, self.held.generator)
        self.held.graph(work)

    def by_layer(self, steps: int) -> Tensor:
        """[B, steps, L] int64: image tokens read at each layer in each pass."""
        return self.held.counts[:steps].permute(2, 0, 1).long().clone()

    # -- taking over ---------------------------------------------------------------------------------------------

    def _take_over(self, decoder: StagedDecoder) -> None:
        engine, plan, memories = self.engine, self.plan, decoder.state.memories
        text = max(memories[0].text)
        shapes = [LayerShape(max(m.counts), rounded(max(m.counts) + text + plan.passes)) for m in memories]
        info = engine.info
        sizes = [(plan.batch, info.n_kv_heads, s.entries, info.head_dim) for s in shapes for _ in "kv"]
        buffers = engine.tail.carve(sizes)
        self.held = engine.staged(self, tuple(shapes))
        held, self.state = self.held, self.held.state
        held.caches = list(zip(buffers[::2], buffers[1::2], strict=True))
        table = [
            [self.method.read_counts(m.whole, step) for m in memories] for step in range(plan.passes)
        ]  # counts must not rise
        held.counts.copy_(torch.tensor(table).int().cummin(0).values)
        for index, memory in enumerate(memories):
            types, shape = memory.types, shapes[index]
            image, _ = columns_of(types == IMG)
            words, _ = columns_of((types != PAD) & (types != IMG))
            n, m = image.shape[1], words.shape[1]
            for mine, theirs in zip(held.caches[index], decoder._caches[index], strict=True):
                mine[:, :, :n].copy_(take_entries(theirs, image))
                mine[:, :, shape.slots : shape.slots + m].copy_(take_entries(theirs, words))
            held.index[index].copy_(torch.arange(held.index.shape[2], device=types.device).int())
            if index == plan.feature:
                held.types.fill_(RES)
                held.types[:, : shape.slots] = IMG
                held.types[:, shape.slots : shape.slots + m].copy_(_kinds(memory, words))
            if index == plan.layer:
                held.original.fill_(-1)
                held.original[:, :n].copy_(torch.gather(memory.original, 1, image))
        state = self.state
        state.text.copy_(torch.tensor(memories[0].text))
        state.step.zero_()
        state.alive.fill_(True)
        state.kept.copy_(held.counts[0])
        self._positions(decoder)

    def _positions(self, decoder: StagedDecoder) -> None:
        """cos and sin of every pass, by segment of layers between cuts where positions are counted anew."""
        held, found = self.held, decoder.state
        ahead = torch.arange(self.plan.passes, device=self.state.token.device)
        for segment in range(held.cos.shape[0]):
            layer = found.segments.index(segment) if segment in found.segments else 0
            found.steps = 1
            start = found.positions(layer)
            positions = start - 1 + ahead.view(1, -1, *[1] * (start.ndim - 2))
            cos, sin = self.engine.adapter.rotary(positions, self.state.embeds)
            held.cos[segment].copy_(cos)
            held.sin[segment].copy_(sin)
        self.segments = list(found.segments) if found.renumber else [0] * self.plan.n_layers

    # -- a step --------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        engine, state, held, plan = self.engine, self.state, self.held, self.plan
        ops, weights, heads = engine.ops, engine.weights, engine.info.n_heads
        state.step.add_(1)
        x = weights.embedding.index_select(0, state.token).to(state.logits.dtype)
        for index in range(plan.n_layers):
            w, (keys, values), slots = weights.layers[index], held.caches[index], held.shapes[index].slots
            qkv, segment = ops.norm_qkv(x, w), self.segments[index]
            args = (
                qkv,
                held.cos[segment],
                held.sin[segment],
                state.step,
                keys,
                values,
                state.kept[index],
                slots,
                state.text,
            )
            listed = held.index[index, :, : max(slots, 1)]
            if self.method.anneals and slots:
                scores = held.scores[:, :, : keys.shape[2]]
                ops.decode_attention(*args, heads, index=listed, scores=scores)
                self._let_go(index, listed, scores)
            looks: dict[str, Any] = {}
            if index == plan.feature:
                looks = {"types": held.types, "shares": state.shares}
            out = ops.decode_attention(*args, heads, index=listed if slots else None, **looks)
            x = ops.mlp(ops.attention_out(x, out, w), w)
            if index == plan.feature:
                state.seen_shares.index_copy_(0, state.step, state.shares[None])
        state.logits.copy_(ops.head(x, weights.norm, weights.eps, weights.head))
        self._note()
        ops.emit(state, self.choice(state), True)

    def _let_go(self, index: int, listed: Tensor, scores: Tensor) -> None:
        """Put a layer's list in the order of the newest row's attention, and let the pass's count cut it off.

        Entries hold the last image token first, so they are ranked from behind: of equal ones the earlier token stays.
        """
        kept, slots = self.state.kept[index], listed.shape[1]
        first = masks.prefix_masks(kept, slots)
        held = torch.zeros_like(first).scatter(1, listed.long(), first)
        row = scores[:, :, :slots].exp().mean(1)
        listed.copy_(slots - 1 - masks.rank_tokens(row.flip(-1), held.flip(-1)))
        torch.minimum(kept, self.held.counts.index_select(0, self.state.step)[0, index], out=kept)

    def _note(self) -> None:
        """The trace's row of layer P: how many image tokens it reads, and which of the prompt's own."""
        state, held, layer = self.state, self.held, self.plan.layer
        kept = state.kept[layer]
        state.seen_kept.index_copy_(0, state.step, kept[None].long())
        read = torch.gather(held.original, 1, held.index[layer, :, : held.original.shape[1]].long())
        read = torch.where(masks.prefix_masks(kept, read.shape[1]) & (read >= 0), read, self.plan.images)
        found = torch.zeros(state.reads.shape[0], self.plan.images + 1, dtype=torch.bool, device=read.device)
        state.seen_reads.index_copy_(0, state.step, found.scatter(1, read, True)[None, :, : self.plan.images])


class Held:
    """Buffers of staged runs of one plan and shapes: counts [passes, L, B] int32; index [L, B, slots] int32, entries in the
    order in which they are read; original [B, slots] of layer P, types [B, entries] of layer P - 1; cos, sin of each segment."""

    def __init__(self, engine: Engine, plan: Plan, shapes: tuple[LayerShape, ...], segments: int) -> None:
        device, info = engine.device, engine.info
        self.shapes = shapes
        self.state = State(plan, info, device, engine.dtype, 1)
        slots, b = max(1, *(shape.slots for shape in shapes)), plan.batch
        self.counts = torch.zeros(plan.passes, plan.n_layers, b, dtype=torch.int32, device=device)
        self.index = torch.zeros(plan.n_layers, b, slots, dtype=torch.int32, device=device)
        self.original = torch.zeros(b, max(1, shapes[plan.layer].slots), dtype=torch.int64, device=device)
        self.types = torch.zeros(b, shapes[plan.feature].entries, dtype=torch.int8, device=device)
        longest = max(shape.entries for shape in shapes)
        self.scores = torch.zeros(b, info.n_heads, longest, device=device)
        self.cos = torch.zeros(segments, b, plan.passes, info.head_dim, dtype=engine.dtype, device=device)
        self.sin = torch.zeros_like(self.cos)
        self.caches: list[tuple[Tensor, Tensor]] = []
        self.graph: Replayable | None = None
        self.generator: Any = None


def _kinds(memory: Memory, words: Tensor) -> Tensor:
    """Types [B, n] int64 of a layer's text entries, RES behind each sample's last."""
    kinds = torch.gather(memory.types, 1, words)
    n = torch.tensor(memory.text, device=words.device)
    return torch.where(masks.prefix_masks(n, words.shape[1]), kinds, RES)
