"""Our loop under a staged method: prefill with cuts, then decode over caches of unequal length, in plain sight."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import additive, attend, padding_allowed, row_attention, shares_by_type
from .decoder import Snapshot
from .layout import take_entries
from .masks import PAD
from .methods.staged import Staged
from .models import Adapter, Prompt
from .staged_state import Memory, StagedState
from .step import ModuleStep, step_for


class StagedDecoder:
    """One batch from prompt to reply under a staged method; a `Runner` of `decoder.py`.

    capacity: how many tokens may be generated; the caches are allocated for it.
    """

    def __init__(self, adapter: Adapter, prompt: Prompt, method: Staged, capacity: int) -> None:
        self.adapter, self.prompt, self.method, self.capacity = adapter, prompt, method, capacity
        self.layer = method.prepare(adapter.n_layers, adapter.n_heads, prompt.embeds.device)
        self.state = StagedState(method, adapter.n_layers, prompt)
        self.shares: Tensor | None = None
        self._caches: list[tuple[Tensor, Tensor]] = []  # buffers, room for the reply behind the prompt
        self._first: list[int] = []  # the first entry that is still read
        self._filled: list[int] = []
        self._step: ModuleStep | None = None  # from the first decode step on

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Read the prompt, cutting on the way. Returns the logits of the first response token, [B, vocab]."""
        adapter, state, x = self.adapter, self.state, self.prompt.embeds
        attention: Tensor | None = None
        rotary, allowed = adapter.rotary(state.rows.position_ids, x), padding_allowed(state.rows.types)
        for index in range(adapter.n_layers):
            if index in state.stages:
                if attention is None:
                    attention = state.look(adapter, index, adapter.normed_input(index, x), rotary)
                x, attention = state.cut(index, x, attention), None
                rotary, allowed = adapter.rotary(state.rows.position_ids, x), padding_allowed(state.rows.types)
            normed = adapter.normed_input(index, x)
            q, k, v = adapter.project(index, normed, rotary)
            x = adapter.finish(index, x, attend(q, k, v, allowed, causal=allowed is None))
            if index + 1 in state.stages and self.method.looks == "before":
                attention = state.look(adapter, index, normed, rotary, k)
            if index == self.layer - 1:
                self.shares = shares_by_type(row_attention(q[:, :, -1:], k, state.rows.real), state.rows.types)[:, 0]
            columns = state.enter(index).columns
            self._keep(k, v) if columns is None else self._keep(take_entries(k, columns), take_entries(v, columns))
        return adapter.logits(x[:, -1])

    @torch.no_grad()
    def decode(self, token: Tensor) -> Tensor:
        """Append `token` [B] int64 to every sample. Returns the logits of the next token, [B, vocab]."""
        adapter, state = self.adapter, self.state
        if self._step is None:
            self._step = step_for(adapter, self.prompt.embeds)
        step = self._step
        state.advance()
        x = step.embed(token)
        allowed: Tensor | None = None
        seen: Memory | None = None
        for index in range(adapter.n_layers):
            if index == 0 or (state.renumber and index in state.stages):
                rotary = step.rotary(state.positions(index))
            q, k, v = step.project(index, x, rotary)
            keys, values = self._append(index, k, v)
            if self.method.anneals:
                keys, values = self._let_go(index, q, keys, values)
            memory = state.memories[index]
            if seen is None or memory.types is not seen.types or memory.start != seen.start:  # layers between cuts agree
                readable, seen = state.readable(index), memory
                allowed = None if readable is None else additive(readable[:, None, None], q)
            x = step.finish(index, x, attend(q, keys, values, allowed))
            if index == self.layer - 1:
                types = state.types(index)
                self.shares = shares_by_type(row_attention(q, keys, types != PAD), types)[:, 0]
        return step.logits(x)

    def snapshot(self) -> Snapshot:
        """See `Runner`. `reads` and `ranking` are those of layer P; merged tokens have no place in them (-1)."""
        state = self.state
        assert self.shares is not None, "snapshot() before prefill()"
        return Snapshot(state.kept, self.shares, state.by_layer(), state.ranking, state.reads())

    def kv_lengths(self) -> list[int]:
        """Entries that each layer's next query would read besides its own (the largest of the batch), layer by layer."""
        return [filled - first for filled, first in zip(self._filled, self._first)]

    # -- caches --------------------------------------------------------------------------------------------------

    def _keep(self, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values of the prompt, with room for the reply."""
        shape = (*k.shape[:2], k.shape[2] + max(self.capacity - 1, 0), k.shape[3])
        keys, values = k.new_empty(shape), v.new_empty(shape)
        keys[:, :, : k.shape[2]], values[:, :, : k.shape[2]] = k, v
        self._caches.append((keys, values))
        self._first.append(0)
        self._filled.append(k.shape[2])

    def _append(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the newest key and value in place; returns views of all that is still held."""
        (keys, values), filled = self._caches[index], self._filled[index]
        keys[:, :, filled : filled + 1], values[:, :, filled : filled + 1] = k, v
        self._filled[index] = filled + 1
        held = slice(self._first[index], filled + 1)
        return keys[:, :, held], values[:, :, held]

    def _let_go(self, index: int, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Drop what leaves for good: the image entries are put in order in place, and the view starts later."""
        leaving = self.state.leaving(index, q, keys)
        if leaving is None:
            return keys, values
        order, drop = leaving
        n = order.shape[1]
        keys[:, :, :n], values[:, :, :n] = take_entries(keys, order), take_entries(values, order)
        self._first[index] += drop
        return keys[:, :, drop:], values[:, :, drop:]
