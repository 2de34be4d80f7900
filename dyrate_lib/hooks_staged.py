"""Staged methods under stock transformers: the same cuts as in our loop, by hooks on the layers of one model instance.

What leaves and what stays is `StagedState`'s; here are only the places where transformers must be told: the rows, mask and
rotary positions that each layer receives, and the entries that leave a cache. Put on and taken off by `hooks.StockPruning`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .hooks import StockPruning, _follow_reordering
from .hooks_cache import cache_of
from .layout import take_entries
from .methods.staged import Staged
from .models import Prompt
from .staged_state import StagedState


class _CachedStages:
    """What belongs to one batch and travels with its cache."""

    def __init__(self, state: StagedState) -> None:
        self.state = state

    def select(self, index: Tensor) -> None:
        self.state.select(index)


class StagedPruning(StockPruning):
    """`with method(model) as pruning:` for a staged method; what it gives and refuses is as in `StockPruning`.

    pruning.kept: list of [B] int64, image tokens read at layer P in each forward pass since entering.
    """

    method: Staged
    _now: Any

    def _register(self, add: Callable[[Any], None]) -> None:
        layers = self.adapter.layers
        add(self.adapter.core.register_forward_pre_hook(self._before_model, with_kwargs=True))
        add(self.adapter.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True))
        if self.method.looks == "before":
            for cut in self.method.cuts(self.adapter.n_layers):
                add(layers[cut - 1].self_attn.register_forward_hook(self._after_attention(cut - 1), with_kwargs=True))
        for index in range(self.adapter.n_layers):
            add(layers[index].register_forward_pre_hook(self._before_layer(index), with_kwargs=True))
            if self.method.anneals:
                add(layers[index].register_forward_hook(self._after_layer(index), with_kwargs=True))

    def _pruning(self, prompt: Prompt) -> Any:
        self._attention: Tensor | None = None
        return _CachedStages(StagedState(self.method, self.adapter.n_layers, prompt))

    def _before_language_model(self, module: Any, args: tuple, kwargs: dict) -> None:
        super()._before_language_model(module, args, kwargs)
        self._rotary: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        if not self._prefilling:
            self._now.state.advance()

    def _after_attention(self, index: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            """The layer before a cut has run: what its asked rows attend to."""
            if self._prefilling:
                normed = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                cache = cache_of(kwargs)
                keys = None if cache is None else cache.layers[index].keys
                rotary = kwargs["position_embeddings"]
                self._attention = self._now.state.look(self.adapter, index, normed, rotary, keys)

        return hook

    def _prefill_layer(self, index: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        state, cache = self._now.state, cache_of(kwargs)
        if index in state.stages:
            rows = state.rows
            if self._attention is None:
                normed = self.adapter.normed_input(index, hidden)
                rotary = self.adapter.rotary(rows.position_ids, hidden)
                self._attention = state.look(self.adapter, index, normed, rotary)
            hidden, self._attention = state.cut(index, hidden, self._attention), None
        state.enter(index)
        if index == self.layer:
            self.kept.append(state.kept)
            if cache is not None:
                while len(cache.layers) <= index:
                    cache.layers.append(cache.layer_class_to_replicate())
                _follow_reordering(cache.layers[index], self._now)
        if index < self.layer:
            return hidden, {}
        real, positions = state.rows.real, state.rows.position_ids
        columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
        mask = self._mask(real, bool(real.all()), hidden.dtype, columns)
        return hidden, {"attention_mask": mask, **self._placed(index, positions, hidden)}

    def _decode_layer(self, index: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        state, layer, new = self._now.state, cache_of(kwargs).layers[index], {}
        if state.renumber and index >= self.layer:
            new = self._placed(index, state.positions(index), hidden)
        if self.method.anneals:
            self._let_go(index, layer, hidden, kwargs["position_embeddings"])
        if index == self.layer:
            self.kept.append(state.kept)
        if index >= self.layer or self.method.anneals:
            readable = state.readable(index)
            everything = readable is None
            readable = state.memories[index].readable(state.steps) if everything else readable
            new["attention_mask"] = self._mask(readable, everything, hidden.dtype)
        return hidden, new

    def _placed(self, index: int, positions: Tensor, hidden: Tensor) -> dict[str, Any]:
        """Positions and their rotary angles, made once for all layers between two cuts."""
        segment = self._now.state.segments[index]
        if segment not in self._rotary:
            self._rotary[segment] = (positions, self.adapter.rotary(positions, hidden))
        positions, rotary = self._rotary[segment]
        # flash attention would read gaps in the positions as borders between packed sequences
        return {
            "position_ids": None if self._implementation == "flash" else positions,
            "position_embeddings": rotary,
        }

    # -- annealing: the caches shrink --------------------------------------------------------------------------------

    def _after_layer(self, index: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            """The prompt's rows are in the cache: image tokens first, so that those that leave are cut off in front."""
            cache = cache_of(kwargs)
            if not self._prefilling or cache is None:
                return
            layer, memory = cache.layers[index], self._now.state.memories[index]
            prompt = layer.keys.shape[2]
            layer.keys, layer.values = (
                take_entries(layer.keys, memory.columns),
                take_entries(layer.values, memory.columns),
            )
            if index == 0:  # generate asks this layer how far the sequence is: what has left counts
                more = memory.columns.shape[1] - prompt
                layer.get_seq_length = lambda: layer.keys.shape[2] + memory.start - more

        return hook

    def _let_go(self, index: int, layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Cut off the image entries that the newest token's query drops for good."""
        normed = self.adapter.normed_input(index, hidden)
        q, k = self.adapter.project(index, normed, rotary, "qk")
        leaving = self._now.state.leaving(index, q, torch.cat((layer.keys, k), dim=2))
        if leaving is None:
            return
        order, drop = leaving
        for name in ("keys", "values"):
            entries, n = getattr(layer, name), order.shape[1]
            setattr(layer, name, torch.cat((take_entries(entries, order)[:, :, drop:], entries[:, :, n:]), dim=2))
