"""Pruning under stock transformers: hooks on one model instance, put on and taken off by a context manager.

Nothing global is patched. Greedy, beams, sampling, stopping criteria and streaming are transformers' own; the hooks
change what layers >= P receive. The prompt's rows run in the prompt's order, so that causality needs no mask of its own
(flash attention takes none) and logits read as usual. In the cache the kept image tokens then lie least important
first, before the text, so that dropping more of them later cuts the front of those layers' keys and values. Beam search
reorders the pruning state with the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import masks
from .attention import image_scores, row_attention, shares_by_type
from .errors import InputError
from .hooks_cache import cache_of
from .hooks_pictures import PictureWatch
from .layout import gather_columns, take_entries
from .masks import IMG, PAD, RES
from .methods.base import PRUNED, Method
from .methods.prune_state import PruneState
from .models import Adapter, Prompt

_STATE = PRUNED  # on a cache: the pruning of the batch it belongs to


class _CachedPruning:
    """What belongs to one batch and travels with its cache: the state, and where things lie in the pruned layers."""

    def __init__(self, prompt: Prompt, state: PruneState) -> None:
        self.prompt, self.state = prompt, state
        self.text: Any = None  # [B, text slots] bool, once layer P was reached
        self.padded = False  # whether a slot of `text` holds no token
        self.first: dict[int, int] = {}  # slots already cut from the front of a layer's cache

    def select(self, index: Tensor) -> None:
        self.state.select(index)
        self.prompt = self.prompt.select(index)
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


class StockPruning(PictureWatch):
    """`with method(model) as pruning:` prunes every forward pass of `model`, stock `generate` included.

    pruning.kept: list of [B] int64, image tokens read at layers >= P in each forward pass since entering.

    Raises:
        InputError: on entering, if the method does not fit the model or another pruning is on; in a forward pass, for
            inputs that cannot be pruned (several new tokens on a filled cache, a static cache).
    """

    def __init__(self, model: Any, method: Method) -> None:
        super().__init__(Adapter(model))
        self.method, self.model = method, model
        self.kept: list[Tensor] = []
        self._handles: list[Any] = []
        self._use_cache: Any = None
        self._now: Any = None  # the batch of the pass that runs

    def __enter__(self) -> StockPruning:
        if getattr(self.model, _STATE, False):
            raise InputError("This model is already being pruned: leave the first context before entering another.")
        device = next(self.model.parameters()).device
        self.layer = self.method.prepare(self.adapter.n_layers, self.adapter.n_heads, device)
        implementation = self.adapter.text_config._attn_implementation
        self._implementation = "flash" if "flash" in implementation else implementation
        if self._implementation not in ("sdpa", "eager", "flash"):
            raise InputError(
                f"Attention {implementation!r} is not supported under pruning: load the model with 'sdpa', 'eager' or "
                "'flash_attention_2'."
            )
        if self.method.wants_hidden:
            raise InputError(
                f"{type(self.method).__name__} reads the hidden state that enters layer {self.layer}; under stock generate it "
                f"has to choose before layer {self.layer - 1} has made it: use dyrate_lib.generate."
            )
        if self._implementation == "flash" and self.method.reversible:
            raise InputError(
                f"{type(self.method).__name__}(reversible=True) reads the prompt under a mask of its own, which flash "
                "attention does not take: load the model with 'sdpa' or 'eager'."
            )
        setattr(self.model, _STATE, True)
        self.kept.clear()
        self._use_cache = self.model.generation_config.use_cache
        try:
            self._keep_pictures_with_rows()
            if self.layer < self.adapter.n_layers:
                self._register(self._handles.append)
                self._watch_pictures()
            if self.method.refresh:
                self.model.generation_config.use_cache = False
        except BaseException:
            self.__exit__()
            raise
        return self

    def _register(self, add: Callable[[Any], None]) -> None:
        """Put the hooks on, handing each one's handle to `add`."""
        layers = self.adapter.layers
        add(self.adapter.core.register_forward_pre_hook(self._before_model, with_kwargs=True))
        add(self.adapter.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True))
        add(layers[self.layer - 1].self_attn.register_forward_hook(self._after_feature_layer, with_kwargs=True))
        for index in range(self.layer, self.adapter.n_layers):
            add(layers[index].register_forward_pre_hook(self._before_layer(index), with_kwargs=True))
            add(layers[index].register_forward_hook(self._after_layer(index), with_kwargs=True))

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.method.refresh:
            self.model.generation_config.use_cache = self._use_cache
        delattr(self.model, _STATE)
        self._now = None
        self._forget_pictures()

    # -- what a forward pass is ----------------------------------------------------------------------------------

    def _before_language_model(self, module: Any, args: tuple, kwargs: dict) -> None:
        cache = cache_of(kwargs)
        filled = 0 if cache is None else int(cache.get_seq_length())
        embeds = kwargs["inputs_embeds"]
        if filled == 0:
            self._now = self._start(embeds, kwargs.get("attention_mask"), kwargs.get("position_ids"), cache)
            self._prefilling = True
            return
        if self.method.refresh:
            raise InputError(
                f"{type(self.method).__name__}(refresh=True) prunes anew at every step: call with use_cache=False."
            )
        self._now, self._prefilling = self._resumed(cache, embeds), False

    def _resumed(self, cache: Any, embeds: Tensor) -> Any:
        """What lies on a filled cache, for a pass that brings one new token."""
        now = getattr(cache, _STATE, None)
        if now is None:
            raise InputError("This cache was filled outside the pruning context: start generating inside it.")
        if embeds.shape[1] != 1:
            raise InputError(
                "Several new tokens at once on a filled cache (chunked or assisted decoding) cannot be pruned."
            )
        return now

    def _start(
        self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any
    ) -> _CachedPruning:
        given, times = self._given(attention_mask)
        prompt = self.adapter.layout(given, embeds)
        if times > 1:
            prompt = prompt.select(torch.arange(len(given["input_ids"])).repeat_interleave(times))
        if position_ids is not None:
            prompt.position_ids = self.adapter.stock_positions(position_ids, prompt.types)
        pruning = self._pruning(prompt)
        if cache is not None:
            self._put_on(cache, pruning)
        return pruning

    def _put_on(self, cache: Any, now: Any) -> None:
        if any(hasattr(entry, "max_cache_len") for entry in cache.layers):
            raise InputError(
                "A static cache is laid out for the unpruned prompt: use the default (dynamic) cache under pruning."
            )
        setattr(cache, _STATE, now)

    def _pruning(self, prompt: Prompt) -> Any:
        """What a new batch carries with its cache."""
        types, index, key = prompt.types, prompt.image_index, prompt.content_key
        if self._implementation == "flash" and bool((types[:, -1] == IMG).any()):
            raise InputError(
                "A prompt ends with its picture: its last row reads what others do not, which takes a mask that flash attention "
                "does not know. Load the model with 'sdpa' or 'eager', or put text behind the picture."
            )
        return _CachedPruning(prompt, PruneState(self.method, self.layer, self.adapter.n_layers, types, index, key))

    # -- layer P - 1 tells, layers >= P obey ---------------------------------------------------------------------

    def _after_feature_layer(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cos, sin = kwargs["position_embeddings"]
        cache, prompt = cache_of(kwargs), self._now.prompt
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
            self._begin(shares, scores)
        else:
            self._now.state.advance(shares, scores)
            self.kept.append(self._now.state.kept.clone())

    def _begin(self, shares: Tensor, scores: Tensor) -> None:
        """Let the method order the prompt's tokens and say how many stay."""
        self._now.state.start(shares, scores)
        self.kept.append(self._now.state.kept.clone())

    def _before_layer(self, index: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]
            kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            change = self._prefill_layer if self._prefilling else self._decode_layer
            hidden, new = change(index, hidden, kwargs)
            return (hidden,), {**kwargs, **new}

        return hook

    def _after_layer(self, index: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            """The prompt's rows are in the cache: from their order there to the order of slots."""
            cache = cache_of(kwargs)
            if self._prefilling and cache is not None:
                layer, places = cache.layers[index], torch.argsort(self._slots, dim=-1)
                layer.keys, layer.values = take_entries(layer.keys, places), take_entries(layer.values, places)

        return hook

    def _prefill_layer(self, index: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """The rows that stay, in the prompt's order, padding first; `_slots` says which slot each is."""
        now, state = self._now, self._now.state
        n = state.slots[index]
        if index == self.layer:
            columns, occupied = state.tail()
            now.text = occupied[:, n:]
            now.padded = not bool(now.text.all())
            rows = torch.where(occupied, columns, -1)
            rows[:, -1] = columns[:, -1]  # the last token's row, to be read by others or not
            self._slots = torch.argsort(rows, dim=-1, stable=True)
            self._columns = torch.gather(columns, 1, self._slots)
            hidden = gather_columns(hidden, self._columns)
            cache = cache_of(kwargs)
            if cache is not None:
                while len(cache.layers) <= index:
                    cache.layers.append(cache.layer_class_to_replicate())
                _follow_reordering(cache.layers[index], now)
        drop = hidden.shape[1] - n - now.text.shape[1]
        if drop:  # a deeper layer keeps fewer: the lowest slots leave
            stays = self._slots >= drop
            hidden = hidden[stays].view(hidden.shape[0], -1, hidden.shape[-1])
            self._columns = self._columns[stays].view(hidden.shape[0], -1)
            self._slots = self._slots[stays].view(hidden.shape[0], -1) - drop
        positions = gather_columns(now.prompt.position_ids, self._columns)
        readable = torch.cat((state.slot_reads(index), now.text), dim=1).gather(1, self._slots)
        everything = state.uniform(index) and not now.padded
        return hidden, {
            "attention_mask": self._mask(readable, everything, hidden.dtype, self._columns),
            # flash attention would read gaps in the positions as borders between packed sequences
            "position_ids": None if self._implementation == "flash" else positions,
            "position_embeddings": self.adapter.rotary(positions, hidden),
        }

    def _decode_layer(self, index: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        now, state = self._now, self._now.state
        layer = cache_of(kwargs).layers[index]
        first, start = now.first.get(index, 0), state.start_slot(index)
        if start > first:  # these image tokens no sample reads again: discard them
            layer.keys, layer.values = layer.keys[:, :, start - first :], layer.values[:, :, start - first :]
            now.first[index] = start
        readable = torch.cat((state.slot_reads(index)[:, now.first.get(index, 0) :], now.text), dim=1)
        readable = torch.nn.functional.pad(readable, (0, layer.keys.shape[2] + 1 - readable.shape[1]), value=True)
        everything = state.uniform(index) and not now.padded
        return hidden, {"attention_mask": self._mask(readable, everything, hidden.dtype)}

    def _mask(self, readable: Tensor, everything: bool, dtype: torch.dtype, columns: Tensor | None = None) -> Tensor | None:
        """The mask as the model's attention takes it; readable [B, entries] bool, columns [B, entries] of the prompt's rows.

        Flash attention takes which entries are read by all rows, or nothing; the others a sum over single pairs. None
        stands for all, causally, but not to eager attention.
        """
        if everything and (self._implementation != "eager" or columns is None):
            return None
        if self._implementation == "flash":
            return readable
        allowed = readable[:, None, None] if columns is None else masks.causal_allowed(columns, readable)
        return _additive(allowed, dtype)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the additive one that every attention implementation of transformers takes."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
