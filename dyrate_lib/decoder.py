"""The pruned decoder: prefill and decode in plain sight, with preallocated caches in which dropping a token is free.

Layers below P hold the whole sequence as it is. Layers from P on hold `slots` image tokens, least important first,
then the prompt's text, then the response. Masks are nested, so a step that drops more tokens reads from a later slot
on: a view, no copy. The rotary position is in the keys already, so the order of slots changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from . import masks
from .attention import additive, attend, image_scores, padding_allowed, row_attention, shares_of, type_columns
from .layout import gather_columns
from .masks import PAD, RES
from .methods.base import Method
from .methods.none import NoReduction
from .methods.prune_state import PruneState
from .models import Adapter, Prompt
from .step import ModuleStep, step_for


@dataclass(frozen=True)
class Snapshot:
    """What is read now, for the trace. kept [B] int64: image tokens read at layer P; shares [B, H, 4] float32;
    by_layer [B, L] int64: image tokens at every layer's input; ranking [B, N] int64: image tokens, those kept first.
    reads [B, N] bool: the tokens read, or None where they are the first `kept` of the ranking of step 0."""

    kept: Tensor
    shares: Tensor
    by_layer: Tensor
    ranking: Tensor
    reads: Tensor | None = None


class Runner(Protocol):
    """One batch from prompt to reply: what `generate` asks of a decoder. `layer` is P, the first that prunes."""

    layer: int

    def prefill(self) -> Tensor:
        """Read the prompt. Returns the logits of the first response token, [B, vocab]."""

    def decode(self, token: Tensor) -> Tensor:
        """Append `token` [B] int64 to every sample. Returns the logits of the next token, [B, vocab]."""

    def snapshot(self) -> Snapshot:
        """What was read in the latest pass."""


class PrunedDecoder:
    """One batch from prompt to reply under a method: `prefill()` once, then `decode(token)` for each further token.

    capacity: how many tokens may be generated; the caches are allocated for it.
    After each call `shares` is [B, H, 4] of the feature layer's newest row and `state` says what is read.
    """

    def __init__(self, adapter: Adapter, prompt: Prompt, method: Method | None, capacity: int) -> None:
        self.adapter, self.prompt, self.method = adapter, prompt, method or NoReduction()
        self.capacity = capacity
        self.layer = self.method.prepare(adapter.n_layers, adapter.n_heads, prompt.embeds.device)
        self.feature_layer = self.layer - 1 if self.layer < adapter.n_layers else min(1, adapter.n_layers - 1)
        self.state = PruneState(
            self.method, self.layer, adapter.n_layers, prompt.types, prompt.image_index, prompt.content_key
        )
        self.shares: Any = None
        self.steps = 0
        self._caches: dict[int, tuple[Tensor, Tensor]] = {}
        self._filled: dict[int, int] = {}
        # what stands in each slot of the layers >= P: True for tokens, False for padding
        self._occupied: Any = None
        # of the prompt and, behind it, of every token that may follow
        types = torch.nn.functional.pad(prompt.types, (0, max(capacity - 1, 0)), value=RES)
        self._columns_by_type, self._real = type_columns(types), types != PAD
        self._padded = not bool(self._real.all())
        self._step: ModuleStep | None = None  # from the first decode step on
        self._last = prompt.last_position
        self._masks: dict[tuple[int, int], Tensor | None] = {}  # of one step
        self._rows: tuple[Any, Tensor] | None = None

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Read the prompt. Returns the logits of the first response token, [B, vocab]."""
        prompt, state = self.prompt, self.state
        x, rotary = prompt.embeds, self.adapter.rotary(prompt.position_ids, prompt.embeds)
        allowed = padding_allowed(prompt.types)
        for index in range(self.adapter.n_layers):
            if index == self.layer:
                x, rotary, allowed = self._enter_tail(x)
            elif index > self.layer and state.slots[index] < state.slots[index - 1]:
                x, rotary, allowed = self._shrink(index, x, rotary)
            elif index > self.layer and self.method.reversible and state.extent_key(index) != -1:
                allowed = self._tail_allowed(index)  # all are carried, but this layer reads a number of its own
            q, k, v = self.adapter.project(index, self.adapter.normed_input(index, x), rotary)
            self._store(index, k, v)
            x = self.adapter.finish(index, x, attend(q, k, v, allowed, causal=allowed is None))
            if index == self.feature_layer:
                self._look(q, k)
                if self.layer >= self.adapter.n_layers:
                    state.kept = state.n_image
                    state.ranking = torch.arange(state.image_index.shape[1], device=x.device).expand_as(
                        state.image_index
                    )
                    state.reads = state.present
                else:
                    self._choose(x)
        return self.adapter.logits(x[:, -1])

    @torch.no_grad()
    def decode(self, token: Tensor) -> Tensor:
        """Append `token` [B] int64 to every sample. Returns the logits of the next token, [B, vocab]."""
        state, adapter = self.state, self.adapter
        if self._step is None:
            self._step = step_for(adapter, self.prompt.embeds)
        step = self._step
        self.steps += 1
        self._masks.clear()
        x = step.embed(token)
        rotary = step.reply_rotary(self._last, self.steps, max(self.capacity - 1, self.steps))
        for index in range(adapter.n_layers):
            q, k, v = step.project(index, x, rotary)
            keys, values = self._store(index, k, v)
            if index >= self.layer:
                first = state.start_slot(index)
                if first:
                    keys, values = keys[:, :, first:], values[:, :, first:]
            x = step.finish(index, x, attend(q, keys, values, self._step_mask(index, q)))
            if index == self.feature_layer:
                self._look(q, keys)
                if self.layer < adapter.n_layers:
                    state.advance(self.shares, self._scores, x.flatten(1) if self.method.wants_hidden else None)
        return step.logits(x)

    def _choose(self, x: Tensor) -> None:
        """Let the method order the tokens and say how many stay, with x [B, T, D] about to enter layer P."""
        self.state.start(self.shares, self._scores(), x[:, -1] if self.method.wants_hidden else None)

    # -- what a query row sees ------------------------------------------------------------------------------------

    def _look(self, q: Tensor, keys: Tensor) -> None:
        """Attention of the newest row at the feature layer: shares by type; scores of the image tokens for who asks."""
        length = keys.shape[2]
        self._attention = row_attention(q[:, :, -1:], keys, self._real[:, :length] if self._padded else None)
        self.shares = shares_of(self._attention, self._columns_by_type[:, :length])[:, 0]

    def _scores(self) -> Tensor:
        """Scores of the image tokens by the row that `_look` saw last."""
        return image_scores(self._attention, self.prompt.image_index)

    def _step_mask(self, index: int, q: Tensor) -> Tensor | None:
        """What the newest query reads at layer `index`, for `attend`, or None for all; made once a step where layers agree."""
        if index < self.layer:
            if not self._padded:
                return None
            key = (-1, -1)
        else:
            key = (self.state.slots[index], self.state.extent_key(index))
        if key not in self._masks:
            tail = index >= self.layer
            allowed = self._tail_readable(index) if tail else self._real[:, : self._filled[index]]
            first = self.state.start_slot(index) if tail else 0
            self._masks[key] = None if allowed is None else additive(allowed[:, None, None, first:], q)
        return self._masks[key]

    def _tail_readable(self, index: int) -> Tensor | None:
        """[B, entries] bool of a layer >= P, or None where every sample reads everything from the first slot on."""
        state, n = self.state, self.state.slots[index]
        if state.uniform(index) and not self._text_padded:
            return None
        occupied = self._occupied[:, self._occupied.shape[1] - self._n_text :]
        if n:
            occupied = torch.cat((state.slot_reads(index), occupied), dim=1)
        return torch.nn.functional.pad(occupied, (0, self._filled[index] - occupied.shape[1]), value=True)

    # -- the layers from P on -------------------------------------------------------------------------------------

    def _enter_tail(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Drop the tokens: gather what layers >= P receive, in slot order, with positions and mask to match."""
        columns, self._occupied = self.state.tail()
        self._columns = columns
        n = self.state.slots[self.layer]
        self._n_text = columns.shape[1] - n
        self._text_padded = not bool(self._occupied[:, n:].all())
        x = gather_columns(x, columns)
        rotary = self.adapter.rotary(gather_columns(self.prompt.position_ids, columns), x)
        return x, rotary, self._tail_allowed(self.layer)

    def _shrink(
        self, index: int, x: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """A deeper layer keeps fewer: its lowest slots leave at the front."""
        drop = self.state.slots[index - 1] - self.state.slots[index]
        rotary = (rotary[0][:, drop:], rotary[1][:, drop:])
        return x[:, drop:], rotary, self._tail_allowed(index)

    def _tail_allowed(self, index: int) -> Tensor:
        n, text = self.state.slots[index], self._n_text
        columns = self._columns[:, self._columns.shape[1] - n - text :]
        readable = torch.cat((self.state.slot_reads(index), self._occupied[:, self._occupied.shape[1] - text :]), dim=1)
        return masks.causal_allowed(columns, readable)

    def _store(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the old ones, in place; returns views of all so far."""
        filled = self._filled.get(index, 0)
        new = filled + k.shape[2]
        if filled == 0:
            shape = (*k.shape[:2], k.shape[2] + max(self.capacity - 1, 0), k.shape[3])
            self._caches[index] = (k.new_empty(shape), v.new_empty(shape))
        keys, values = self._caches[index]
        keys[:, :, filled:new], values[:, :, filled:new] = k, v
        self._filled[index] = new
        return keys[:, :, :new], values[:, :, :new]

    def kv_lengths(self) -> list[int]:
        """Entries that each layer's next query would read besides its own (the largest of the batch), layer by layer."""
        return [
            self._filled[index] - (self.state.start_slot(index) if index >= self.layer else 0)
            for index in range(self.adapter.n_layers)
        ]

    def snapshot(self) -> Snapshot:
        """See `Runner`."""
        state = self.state
        own = state.method.rank == "step" or state.method.reversible or state.method.refresh
        return Snapshot(state.kept, self.shares, self._by_layer(), state.ranking, state.reads if own else None)

    def _by_layer(self) -> Tensor:
        state, n_layers = self.state, self.adapter.n_layers
        if self.steps == 0 and state.method.reversible:  # the prompt's pass carries every token, whatever is read
            return state.n_image[:, None].expand(-1, n_layers)
        if self._rows is None or self._rows[0] is not state.kept:
            rows = [state.layer_kept(index) for index in range(n_layers)]
            self._rows = (state.kept, torch.stack(rows, dim=-1))
        return self._rows[1]


class RefreshedDecoder:
    """The uncached loop: the whole sequence is run again for every token and pruned by its newest row."""

    def __init__(self, adapter: Adapter, prompt: Prompt, method: Method) -> None:
        self.adapter, self.prompt, self.method = adapter, prompt, method
        self.current = PrunedDecoder(adapter, prompt, method, 1)
        self.layer = self.current.layer

    def prefill(self) -> Tensor:
        return self.current.prefill()

    def decode(self, token: Tensor) -> Tensor:
        old = self.current.prompt
        longer = replace(
            old,
            embeds=torch.cat((old.embeds, self.adapter.embed_tokens(token[:, None]).to(old.embeds.dtype)), dim=1),
            types=torch.cat((old.types, torch.full_like(token[:, None], RES)), dim=1),
            position_ids=torch.cat((old.position_ids, old.last_position + 1), dim=1),
        )
        self.current = PrunedDecoder(self.adapter, longer, self.method, 1)
        return self.current.prefill()

    def snapshot(self) -> Snapshot:
        return self.current.snapshot()
