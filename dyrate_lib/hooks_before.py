"""Cutting before the language model under stock transformers: its input is exchanged, and nothing else is touched.

On the prompt's pass the language model receives the reduced prompt; on each later one the mask and the positions that go
with it, since stock `generate` goes on counting from the unpruned prompt. The mask stays the usual two-dimensional one,
so that any attention takes it. What belongs to a batch lies on its cache and follows beam search.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from .hooks import StockPruning, _follow_reordering
from .hooks_cache import cache_name, cache_of
from .layout import Prompt
from .masks import INS, PAD, RES
from .methods.before import BeforeLLM, watch_tower


class _Reduced:
    """What later passes need of a reduced batch. real [B, T'] bool; last [B, 1] or [B, 1, axes] int64; kept [B] int64."""

    def __init__(self, prompt: Prompt) -> None:
        self.real, self.last, self.kept = prompt.types != PAD, prompt.last_position, prompt.n_image
        self.state = self  # as `_follow_reordering` asks

    def select(self, index: Tensor) -> None:
        index = index.to(self.real.device)
        self.real, self.last, self.kept = self.real[index], self.last[index], self.kept[index]


class StockReduction(StockPruning):
    """`with method(model) as pruning:` cuts the pictures of every prompt that `model` reads, stock `generate` included.

    pruning.kept: list of [B] int64, picture rows that the language model read in each forward pass since entering.

    Raises:
        InputError: on entering, if the method does not fit the model or another pruning is on; in a forward pass, for
            inputs that cannot be cut (several new tokens on a filled cache, a static cache, embeddings without ids).
    """

    method: BeforeLLM

    def __init__(self, model: Any, method: BeforeLLM) -> None:
        super().__init__(model, method)
        self._prompt_ids: Tensor | None = None  # of the first pass, where no cache tells prompt and reply apart
        self._seen: list[list[Tensor]] = []

    def __enter__(self) -> StockReduction:
        self.method.check(self.adapter)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._prompt_ids = None
        self._seen.clear()

    def _register(self, add: Callable[[Any], None]) -> None:
        adapter = self.adapter
        add(adapter.core.register_forward_pre_hook(self._before_model, with_kwargs=True))
        add(adapter.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True))
        if self.method.tower:
            for handle in watch_tower(adapter, self._seen):
                add(handle)

    def _before_pictures(self, given: dict[str, Any]) -> None:
        """Check the pictures before they are encoded, and forget what the tower made of earlier ones."""
        self.method.check(self.adapter, given)
        self._seen.clear()

    def _before_language_model(self, module: Any, args: tuple, kwargs: dict) -> Any:
        cache: Any = cache_of(kwargs)
        config: Any = self.adapter.text_config
        filled = 0 if cache is None else int(cache.get_seq_length())
        kwargs = {key: value for key, value in kwargs.items() if key != "cache_position"}
        if filled == 0:
            prompt = self._reduced(kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("position_ids"))
            now: Any = _Reduced(prompt)
            if cache is None and kwargs.get("use_cache", True) and config.use_cache:
                cache = kwargs[cache_name(kwargs)] = DynamicCache(config=config)  # as the model would
            if cache is not None:
                self._attach(cache, now)
            mask, positions = now.real, prompt.position_ids
            kwargs["inputs_embeds"] = prompt.embeds
        else:
            now = self._resumed(cache, kwargs["inputs_embeds"])
            mask = F.pad(now.real, (0, filled + 1 - now.real.shape[1]), value=True)
            positions = now.last + filled + 1 - now.real.shape[1]
        self.kept.append(now.kept.clone())
        kwargs["attention_mask"] = mask.long()
        kwargs["position_ids"] = positions if positions.ndim == 2 else positions.movedim(-1, 0)
        return args, kwargs

    def _attach(self, cache: Any, now: Any) -> None:
        self._put_on(cache, now)
        if not cache.layers:
            cache.layers.append(cache.layer_class_to_replicate())
        _follow_reordering(cache.layers[0], now)

    def _reduced(self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Prompt:
        """The batch's prompts with their pictures cut."""
        adapter, ids = self.adapter, self._ids
        inputs, times = self._given(attention_mask)
        assert ids is not None  # or _given would have refused
        prompt = adapter.layout(inputs, embeds[::times])
        if prompt.position_ids.ndim > 2 and position_ids is not None:  # kept ones, so those that stock would use
            every = prompt.types.repeat_interleave(times, dim=0)
            prompt.position_ids = adapter.stock_positions(position_ids, every)[::times]
        prompt.types = self._without_reply(ids, prompt.types)
        prompt = self.method.cut(adapter, prompt, inputs, self._seen)
        if times > 1:
            rows = torch.arange(len(ids) // times, device=ids.device).repeat_interleave(times)
            repeated = prompt.embeds[rows]
            prompt = prompt.select(rows)
            prompt.embeds = repeated
        return prompt

    def _without_reply(self, ids: Tensor, types: Tensor) -> Tensor:
        """Types in which the reply so far is no instruction: without a cache every pass brings the prompt and the reply."""
        first = ids if self._prompt_ids is None else self._prompt_ids
        if len(ids) != len(first) or ids.shape[1] <= first.shape[1] or not torch.equal(ids[:, : first.shape[1]], first):
            self._prompt_ids = ids
            return types
        reply = torch.arange(types.shape[1], device=types.device) >= first.shape[1]
        return torch.where(reply & (types == INS), RES, types)
