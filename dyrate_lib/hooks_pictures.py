"""Which pictures belong to which prompts of a pass under stock transformers: noted where it encodes and repeats them.

The language model sees embeddings only. Ids tell where the pictures stand, and the call that encodes them what they are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from .errors import InputError
from .models import Adapter


class PictureWatch:
    """The half of `hooks.StockPruning` that knows the prompts of a pass as they were given to the model."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._ids: Tensor | None = None
        self._pictures: dict[str, Any] = {}

    def _keep_pictures_with_rows(self) -> None:
        """Where `generate` repeats rows (beams, several sequences), repeat all pictures of a row before those of the next.

        transformers 5.17 repeats picture by picture, so that prompts with several pictures get each other's.
        """
        expand, adapter = self.adapter.model._expand_inputs_for_generation, self.adapter

        def by_rows(expand_size: int = 1, input_ids: Tensor | None = None, **inputs: Any) -> Any:
            pictures = {}
            if expand_size > 1 and adapter.pictures_in_rows and inputs.get("pixel_values") is not None:
                pictures = adapter.repeat_pictures({**inputs, "input_ids": input_ids}, expand_size)
            ids, expanded = expand(expand_size=expand_size, input_ids=input_ids, **inputs)
            return ids, {**expanded, **pictures}

        self.adapter.model._expand_inputs_for_generation = by_rows

    def _watch_pictures(self) -> None:
        """Note the pictures where they are encoded: in the forward pass, or (transformers 5.18 on) before, in `generate`."""
        encode = self.adapter.core.get_image_features
        names = list(inspect.signature(encode).parameters)

        @functools.wraps(encode)  # transformers asks for its signature
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self._before_pictures(given)
            features = encode(*args, **kwargs)
            self._pictures = {**given, "rows": sum(len(feature) for feature in features.pooler_output)}
            return features

        self.adapter.core.get_image_features = get_image_features

    def _before_model(self, module: Any, args: tuple, kwargs: dict) -> None:
        """Note the ids: the language model sees embeddings only, and types come from ids."""
        self._ids = kwargs.get("input_ids", args[0] if args else None)

    def _before_pictures(self, given: dict[str, Any]) -> None:
        """Called with what the pictures are encoded from, before they are."""

    def _forget_pictures(self) -> None:
        """The model as it was, and nothing remembered."""
        vars(self.adapter.core).pop("get_image_features", None)
        vars(self.adapter.model).pop("_expand_inputs_for_generation", None)
        self._ids, self._pictures = None, {}

    def _given(self, attention_mask: Tensor | None) -> tuple[dict[str, Any], int]:
        """The prompts of this pass (ids, mask, pictures), each once, and how many times in a row each stands in it."""
        ids = self._ids
        if ids is None:
            raise InputError("Pruning needs input_ids to know where the picture is; inputs_embeds alone do not tell.")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise InputError("Pruning needs a 2-D attention_mask; static and compiled caches prepare another kind.")
        pictures, times = self._pictures_of(ids)
        mask = None if attention_mask is None else attention_mask[::times, : ids.shape[1]]
        return {"input_ids": ids[::times], "attention_mask": mask, **pictures}, times

    def _pictures_of(self, ids: Tensor) -> tuple[dict[str, Any], int]:
        """The pictures behind a batch as they were given to the model, and how many times in a row `generate` repeated
        each prompt after encoding them."""
        total = int((ids == self.adapter.image_token_id).sum())
        if not total:
            return {}, 1
        rows = self._pictures.get("rows", 0)
        if not rows or total % rows or ids.shape[0] % (total // rows):
            raise InputError(
                f"The prompts hold {total} image tokens, but the pictures encoded under pruning give {rows}: give each "
                "picture one <image> placeholder and pass its pixel_values inside the context."
            )
        return {key: self._pictures.get(key) for key in self.adapter.inputs}, total // rows
