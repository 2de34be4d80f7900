"""Pruning under stock transformers: hooks on one model instance, put on and taken off by a context manager.

Nothing global is patched. Greedy, beams, sampling, stopping criteria and streaming are transformers' own; the hooks
change what layers >= P receive. With a cache the prompt's kept image tokens lie in it least important first, then the
text, so that dropping more of them later cuts the front of those layers' keys and values. Beam search reorders the
pruning state with the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import masks
from .attention import image_scores, row_attention, shares_by_type
from .errors import InputError
from .masks import PAD, RES
from .methods.base import Method, PruneState
from .models import Adapter, Prompt, check_prompt, model_info

_STATE = "_dyrate_pruning"  # on a cache: the pruning of the batch it belongs to


class _CachedPruning:
    """What belongs to one batch and travels with its cache: the state, and where things lie in the pruned layers."""

    def __init__(self, prompt: Prompt, state: PruneState) -> None:
        self.prompt, self.state = prompt, state
        self.text: Tensor | None = None  # [B, text slots] bool
        self.first: dict[int, int] = {}  # slots already cut from the front of a layer's cache

    def select(self, index: Tensor) -> None:
        self.state.select(index)
        for key in ("types", "position_ids", "image_index", "content_key"):
            value = getattr(self.prompt, key)
            setattr(self.prompt, key, value.index_select(0, index.to(value.device)))
        self.text = self.text.index_select(0, index.to(self.text.device))


def _follow_reordering(layer: Any, pruning: _CachedPruning) -> None:
    """Let the pruning state take part when beam search reorders or picks rows of the cache (this cache object only)."""
    reorder, pick, repeat = layer.reorder_cache, layer.batch_select_indices, layer.batch_repeat_interleave

    def reorder_cache(beam_idx: Tensor) -> None:
        reorder(beam_idx)
        pruning.select(beam_idx)

    def batch_select_indices(indices: Tensor) -> None:
        pick(indices)
        rows = torch.arange(pruning.state.kept.shape[0], device=pruning.state.kept.device)
        pruning.select(rows[indices.to(rows.device)])

    def batch_repeat_interleave(repeats: int) -> None:
        repeat(repeats)
        pruning.select(torch.arange(pruning.state.kept.shape[0]).repeat_interleave(repeats))

    layer.reorder_cache, layer.batch_select_indices = reorder_cache, batch_select_indices
    layer.batch_repeat_interleave = batch_repeat_interleave


class StockPruning:
    """`with method(model) as pruning:` prunes every forward pass of `model`, stock `generate` included.

    pruning.kept: list of [B] int64, image tokens read at layers >= P in each forward pass since entering.

    Raises:
        InputError: on entering, if the method does not fit the model or another pruning is on; in a forward pass, for
            inputs that cannot be pruned (several pictures in a prompt, several new tokens on a filled cache, a static
            cache, flash attention).
    """

    def __init__(self, model: Any, method: Method) -> None:
        self.adapter, self.method, self.model = Adapter(model), method, model
        self.kept: list[Tensor] = []
        self._handles: list[Any] = []
        self._use_cache: Any = None
        self._now: _CachedPruning | None = None
        self._ids: dict[str, Any] = {}

    def __enter__(self) -> StockPruning:
        if getattr(self.model, _STATE, False):
            raise InputError("This model is already being pruned: leave the first context before entering another.")
        device = next(self.model.parameters()).device
        self.layer = self.method.prepare(self.adapter.n_layers, self.adapter.n_heads, device)
        implementation = self.adapter.text_config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise InputError(
                f"Attention {implementation!r} takes no mask of its own: load the model with 'sdpa' or 'eager'."
            )
        setattr(self.model, _STATE, True)
        self.kept.clear()
        if self.layer < self.adapter.n_layers:
            layers, add = self.adapter.layers, self._handles.append
            add(self.adapter.core.register_forward_pre_hook(self._before_model, with_kwargs=True))
            add(self.adapter.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True))
            add(layers[self.layer - 1].self_attn.register_forward_hook(self._after_feature_layer, with_kwargs=True))
            for index in range(self.layer, self.adapter.n_layers):
                add(layers[index].register_forward_pre_hook(self._before_layer(index), with_kwargs=True))
            add(self.adapter.norm.register_forward_pre_hook(self._before_norm))
        if self.method.refresh:
            self._use_cache = self.model.generation_config.use_cache
            self.model.generation_config.use_cache = False
        return self

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.method.refresh:
            self.model.generation_config.use_cache = self._use_cache
        delattr(self.model, _STATE)
        self._now, self._ids = None, {}

    # -- what a forward pass is ----------------------------------------------------------------------------------

    def _before_model(self, module: Any, args: tuple, kwargs: dict) -> None:
        """Note ids and pixels: the language model sees embeddings only, and types come from ids."""
        if args:
            kwargs = {**dict(zip(("input_ids", "pixel_values", "attention_mask"), args, strict=False)), **kwargs}
        self._ids = {key: kwargs.get(key) for key in ("input_ids", "pixel_values")}

    def _before_language_model(self, module: Any, args: tuple, kwargs: dict) -> None:
        cache = kwargs.get("past_key_values")
        filled = 0 if cache is None else int(cache.get_seq_length())
        embeds = kwargs["inputs_embeds"]
        if filled == 0:
            self._now = self._start(embeds, kwargs.get("attention_mask"), kwargs.get("position_ids"), cache)
            self._prefilling = True
            return
        self._now, self._prefilling = getattr(cache, _STATE, None), False
        if self.method.refresh:
            raise InputError(
                f"{type(self.method).__name__}(refresh=True) prunes anew at every step: call with use_cache=False."
            )
        if self._now is None:
            raise InputError("This cache was filled outside the pruning context: start generating inside it.")
        if embeds.shape[1] != 1:
            raise InputError(
                "Several new tokens at once on a filled cache (chunked or assisted decoding) cannot be pruned."
            )

    def _start(
        self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any
    ) -> _CachedPruning:
        ids = self._ids.get("input_ids")
        if ids is None:
            raise InputError("Pruning needs input_ids to know where the picture is; inputs_embeds alone do not tell.")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise InputError("Pruning needs a 2-D attention_mask; static and compiled caches prepare another kind.")
        mask = None if attention_mask is None else attention_mask[:, : ids.shape[1]]
        adapter = self.adapter
        pictures = self._ids.get("pixel_values")
        check_prompt(ids, mask, pictures, adapter.image_token_id, adapter.max_length, model_info(self.model))
        prompt = adapter.layout(ids, mask, pictures, embeds)
        if position_ids is not None:
            prompt.position_ids = position_ids.expand_as(prompt.types)
        state = PruneState(
            self.method, self.layer, adapter.n_layers, prompt.types, prompt.image_index, prompt.content_key
        )
        pruning = _CachedPruning(prompt, state)
        if cache is not None:
            if any(hasattr(entry, "max_cache_len") for entry in cache.layers):
                raise InputError("A static cache cannot shrink: use the default (dynamic) cache under pruning.")
            setattr(cache, _STATE, pruning)
        return pruning

    # -- layer P - 1 tells, layers >= P obey ---------------------------------------------------------------------

    def _after_feature_layer(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"]
        cache, prompt = kwargs.get("past_key_values"), self._now.prompt
        (q,) = self.adapter.project(self.layer - 1, hidden[:, -1:], (cos[:, -1:], sin[:, -1:]), "q")
        if cache is not None:
            keys = cache.layers[self.layer - 1].keys
        else:
            (keys,) = self.adapter.project(self.layer - 1, hidden, (cos, sin), "k")
        grown = keys.shape[2] - prompt.types.shape[1]
        types = torch.nn.functional.pad(prompt.types, (0, grown), value=RES)
        attention = row_attention(q, keys, types != PAD)
        shares, scores = shares_by_type(attention, types)[:, 0], image_scores(attention, prompt.image_index)
        if self._prefilling:
            self._now.state.start(shares, scores)
        else:
            self._now.state.advance(shares, scores)
        self.kept.append(self._now.state.kept.clone())

    def _before_layer(self, index: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            change = self._prefill_layer if self._prefilling else self._decode_layer
            hidden, new = change(index, hidden, kwargs)
            return (hidden,), {**kwargs, **new}

        return hook

    def _prefill_layer(self, index: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        now, state = self._now, self._now.state
        n = state.slots[index]
        if index == self.layer:
            self._columns, self._occupied = state.tail()
            now.text = self._occupied[:, n:]
            hidden = torch.gather(hidden, 1, self._columns[..., None].expand(-1, -1, hidden.shape[-1]))
            self._positions = torch.gather(now.prompt.position_ids, 1, self._columns)
            cache = kwargs.get("past_key_values")
            if cache is not None:
                while len(cache.layers) <= index:
                    cache.layers.append(cache.layer_class_to_replicate())
                _follow_reordering(cache.layers[index], now)
        drop = hidden.shape[1] - n - now.text.shape[1]
        if drop:  # a deeper layer keeps fewer
            hidden = hidden[:, drop:]
        self._drop = self._columns.shape[1] - hidden.shape[1]
        positions = self._positions[:, self._drop :]
        readable = torch.cat((state.slot_reads(index), now.text), dim=1)
        allowed = masks.causal_allowed(self._columns[:, self._drop :], readable)
        return hidden, {
            "attention_mask": _additive(allowed, hidden.dtype),
            "position_ids": positions,
            "position_embeddings": self.adapter.rotary(positions, hidden),
        }

    def _decode_layer(self, index: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        now, state = self._now, self._now.state
        layer = kwargs["past_key_values"].layers[index]
        first, start = now.first.get(index, 0), state.start_slot(index)
        if start > first:  # these image tokens no sample reads again: discard them
            layer.keys, layer.values = layer.keys[:, :, start - first :], layer.values[:, :, start - first :]
            now.first[index] = start
        readable = torch.cat((state.slot_reads(index)[:, now.first.get(index, 0) :], now.text), dim=1)
        readable = torch.nn.functional.pad(readable, (0, layer.keys.shape[2] + 1 - readable.shape[1]), value=True)
        return hidden, {"attention_mask": _additive(readable[:, None, None], hidden.dtype)}

    def _before_norm(self, module: Any, args: tuple) -> tuple | None:
        """Give the rows that are left back in the prompt's order, padding first, so that logits read as usual."""
        if not self._prefilling:
            return None
        hidden = args[0]
        columns, occupied = self._columns[:, self._drop :], self._occupied[:, self._drop :]
        order = torch.argsort(torch.where(occupied, columns, -1), dim=-1, stable=True)
        return (torch.gather(hidden, 1, order[..., None].expand(-1, -1, hidden.shape[-1])),)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the additive one that every attention implementation of transformers takes."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
