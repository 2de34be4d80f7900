"""`MergeRate` under stock transformers: the rows of layer P become their groups' averages, and the masks carry the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import text_scores
from .errors import InputError
from .hooks import StockPruning, _additive, _CachedPruning
from .hooks_cache import cache_of
from .layout import gather_columns
from .masks import causal_allowed
from .merging import Groups
from .methods.merge import MergeRate
from .models import Prompt


class _CachedGroups(_CachedPruning):
    """With the batch's groups, once the prompt has reached layer P."""

    groups: Any = None

    def select(self, index: Tensor) -> None:
        super().select(index)
        self.groups.select(index)


class MergedPruning(StockPruning):
    """`with method(model) as pruning:` for `MergeRate`; what it gives and refuses is as in `StockPruning`.

    Raises:
        InputError: also for flash attention, which takes no weights.
    """

    method: MergeRate
    _now: Any

    def _register(self, add: Callable[[Any], None]) -> None:
        if self._implementation == "flash" and self.method.weigh:
            raise InputError(
                "MergeRate adds the logarithm of each group's size to the attention's scores, which flash attention does not "
                "take: load the model with 'sdpa' or 'eager'."
            )
        super()._register(add)

    def _pruning(self, prompt: Prompt) -> Any:
        plain = super()._pruning(prompt)
        return _CachedGroups(plain.prompt, plain.state)

    def _after_feature_layer(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        if self._prefilling and self.method.rated_by == "text":
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            q, k = self.adapter.project(self.layer - 1, hidden, kwargs["position_embeddings"], "qk")
            cache, prompt = cache_of(kwargs), self._now.prompt
            k = k if cache is None else cache.layers[self.layer - 1].keys
            self._rated = text_scores(q, k, prompt.types, prompt.image_index)
        super()._after_feature_layer(module, args, kwargs, output)

    def _begin(self, shares: Tensor, scores: Tensor) -> None:
        scores = self._rated if self.method.rated_by == "text" else scores
        self._seen = shares, scores  # the groups are made of what enters layer P, which this layer has yet to finish

    def _prefill_layer(self, index: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        now = self._now
        if index == self.layer:
            tokens = gather_columns(hidden, now.prompt.image_index.clamp(min=0))
            now.state.start(*self._seen, tokens=tokens)
            now.groups = Groups(self.method, now.state, tokens, now.prompt.picture_index)
            self.kept.append(now.state.kept.clone())
        hidden, new = super()._prefill_layer(index, hidden, kwargs)
        if index == self.layer and now.groups.n:
            by_slot = F.pad(now.groups.tokens.flip(1), (0, 0, 0, now.text.shape[1]))
            hidden = torch.where((self._slots < now.groups.n)[..., None], gather_columns(by_slot, self._slots), hidden)
        return hidden, new

    def _mask(self, readable: Tensor, everything: bool, dtype: torch.dtype, columns: Tensor | None = None) -> Tensor | None:
        groups, state = self._now.groups, self._now.state
        if not groups.n or not self.method.weigh:
            return super()._mask(readable, everything, dtype, columns)
        weights = groups.log_sizes(dtype)
        if columns is not None:
            by_slot = F.pad(weights, (0, readable.shape[1] - groups.n))
            weights, allowed = by_slot.gather(1, self._slots), causal_allowed(columns, readable)
        else:
            weights = weights[:, state.start_slot(self.layer) :]
            weights, allowed = F.pad(weights, (0, readable.shape[1] - weights.shape[1])), readable[:, None, None]
        return _additive(allowed, dtype) + weights[:, None, None]
