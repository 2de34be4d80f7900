"""The one place that knows how transformers builds a VLM, with `llama_layers.py`, `families.py` and `step.py` beside it.

Everything else in the library sees a model through `Adapter`: its layers, how a layer makes queries, keys and values,
how it ends, and how a batch of prompts and pictures becomes embeddings with a type for every token. The base holds what
all LLaMA-like decoders share, and LLaVA-1.5's pictures; a further family is one subclass in `families.py` that says where
its parts are, how many tokens a picture has and what it costs (CONTRIBUTING.md tells how).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .clip_tower import ClipTower
from .errors import InputError
from .layout import (
    Prompt,
    check_batch,
    content_key,
    image_columns,
    picture_numbers,
    picture_owners,
    token_types,
)
from .llama_layers import LlamaLayers
from .masks import PAD

FEATURES = "picture_features"  # among inputs: what `Adapter.joined_features` gave for their pictures, [image tokens, D]

# decoders whose layers are built like LLaMA's: pre-norm, q/k/v/o projections with or without biases, full rotary, gated MLP
DECODERS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text")


@dataclass(frozen=True)
class ModelInfo:
    """The dimensions that token counts, FLOPs and bytes depend on. All counts are plain integers.

    n_image_tokens: tokens of a picture, 0 in families where that depends on the picture; what the vision side of these
    costs is counted prompt by prompt (`Prompt.vision_flops`), not from these dimensions.
    """

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocab: int
    n_image_tokens: int
    vision_layers: int
    vision_hidden: int
    vision_mlp: int
    vision_heads: int
    vision_tokens: int
    patch: int
    image_size: int
    projector_hidden: int
    feature_dim: int


class Adapter(ClipTower, LlamaLayers):
    """A VLM as the library uses it: layers, rotary embedding, head, and prompts as embeddings.

    `Adapter(model)` gives the adapter of the model's family. This class is that of LLaVA-1.5, and the base of the others.

    classes, model_types: the names that transformers has for the family; inputs: what a picture comes in, beside ids and
    mask, and needed: those that cannot be left out; pictures_in_rows: whether row k of each of them is picture k (stock
    transformers then mixes pictures up where it repeats prompts with several of them); decoder, tower:
    attributes of the core model that hold the language model and the vision tower.

    Raises:
        InputError: the model is of a family that has no adapter, or its decoder is none that the base knows.
    """

    classes: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration",)
    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    needed: ClassVar[tuple[str, ...]] = ("pixel_values",)
    pictures_in_rows: ClassVar[bool] = True
    decoder: ClassVar[str] = "language_model"
    tower: ClassVar[str] = "vision_tower"

    def __new__(cls, model: nn.Module | None = None) -> Adapter:
        return super().__new__(adapter_class(model) if cls is Adapter and model is not None else cls)

    def __init__(self, model: Any) -> None:
        if model is None:
            adapter_class(model)  # says what is supported; `__new__` lets None pass, for copies
        self.model = model
        self.core: Any = model.model
        self.language_model: Any = getattr(self.core, self.decoder)
        self.layers: Any = self.language_model.layers
        self.norm: Any = self.language_model.norm
        self.config: Any = model.config
        self.text_config: Any = self.config.text_config
        self.image_token_id = int(self.config.image_token_id)
        self._info: ModelInfo | None = None
        if self.text_config.model_type not in DECODERS:
            raise InputError(
                f"The language model is a {self.text_config.model_type!r}; decoders built like {', '.join(DECODERS)} are "
                "supported."
            )
        kinds = getattr(self.text_config, "layer_types", None) or ("sliding_attention",)
        if getattr(self.text_config, "sliding_window", None) and "sliding_attention" in kinds:
            raise InputError(
                "The language model has layers with a sliding window; pruning needs full attention in all."
            )

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        return int(self.text_config.num_attention_heads)

    @property
    def max_length(self) -> int:
        """The longest sequence (prompt and response, in tokens) that the model's positions were made for."""
        return int(self.text_config.max_position_embeddings)

    @property
    def eos_token_ids(self) -> list[int]:
        config = getattr(self.model, "generation_config", None)
        eos = getattr(config, "eos_token_id", None)
        eos = self.text_config.eos_token_id if eos is None else eos
        return [] if eos is None else [int(e) for e in (eos if isinstance(eos, list | tuple) else [eos])]

    @property
    def pad_token_id(self) -> int:
        pad = getattr(getattr(self.model, "generation_config", None), "pad_token_id", None)
        pad = self.text_config.pad_token_id if pad is None else pad
        return int(pad) if pad is not None else (self.eos_token_ids[0] if self.eos_token_ids else 0)

    # -- pictures and prompts: what a family overrides --------------------------------------------------------------

    def picture_sizes(self, inputs: Mapping[str, Any]) -> list[int]:
        """Image tokens of every picture of the batch, in order."""
        shape, side = list(inputs["pixel_values"].shape), self.info().image_size
        if len(shape) != 4 or shape[-2:] != [side, side]:
            raise InputError(
                f"pixel_values must be [pictures, 3, {side}, {side}] for this model, got {shape}: use its own processor."
            )
        return [self.info().n_image_tokens] * shape[0]

    def picture_crops(self, inputs: Mapping[str, Any]) -> list[int]:
        """How many inputs of the vision tower each picture is."""
        return [1] * len(self.picture_sizes(inputs))

    def picture_pixels(self, inputs: Mapping[str, Any]) -> Tensor | Sequence[Tensor]:
        """The pixels of every picture, whatever their shape: they only tell pictures apart."""
        return inputs["pixel_values"]

    def picture_features(self, inputs: Mapping[str, Any], dtype: torch.dtype) -> Sequence[Tensor] | Tensor:
        """Tokens of every picture from vision tower and projector: [tokens, D] each."""
        return self.core.get_image_features(
            pixel_values=inputs["pixel_values"].to(dtype),
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output

    def picture_flops(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """FLOPs of (vision tower, projector) for every picture, as FlopCounterMode counts them."""
        from .accounting import vision_flops

        cost = vision_flops(self.info(), self.info().n_image_tokens)
        return [(cost["vision"], cost["projector"])] * inputs["pixel_values"].shape[0]

    def positions(self, types: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Positions of the prompt's tokens (see `Prompt`), as stock `generate` sets them under left padding."""
        return ((types != PAD).long().cumsum(-1) - 1).clamp(min=0)

    def stock_positions(self, position_ids: Tensor, types: Tensor) -> Tensor:
        """Positions as the language model was given them by stock transformers, in `Prompt`'s layout."""
        return position_ids.expand_as(types)

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [B, T, head_dim], in `like`'s dtype, of positions in `Prompt`'s layout."""
        return self.language_model.rotary_emb(like, position_ids=position_ids)

    def vision_dimensions(self) -> dict[str, int]:
        """The part of `ModelInfo` that depends on the vision side."""
        config, vision, patches = self.config, self.config.vision_config, self.clip_patches
        layers = config.vision_feature_layer
        return {
            "n_image_tokens": patches + (0 if config.vision_feature_select_strategy == "default" else 1),
            "vision_layers": vision.num_hidden_layers,
            "vision_hidden": vision.hidden_size,
            "vision_mlp": vision.intermediate_size,
            "vision_heads": vision.num_attention_heads,
            "vision_tokens": patches + 1,
            "patch": vision.patch_size,
            "image_size": vision.image_size,
            "projector_hidden": self.text_config.hidden_size,
            "feature_dim": vision.hidden_size * (1 if isinstance(layers, int) else len(layers)),
        }

    # -- the model and a batch --------------------------------------------------------------------------------------

    def info(self) -> ModelInfo:
        """The model's dimensions, read from its config once: transformers' configs take 0.3 ms to read."""
        if self._info is None:
            self._info = self._read_info()
        return self._info

    def _read_info(self) -> ModelInfo:
        model, text = self.model, self.text_config
        return ModelInfo(
            name=getattr(model, "dyrate_name", getattr(self.config, "_name_or_path", "") or type(model).__name__),
            n_layers=text.num_hidden_layers,
            n_heads=text.num_attention_heads,
            n_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            hidden=text.hidden_size,
            mlp=text.intermediate_size,
            vocab=text.vocab_size,
            **self.vision_dimensions(),
        )

    def check(self, inputs: Mapping[str, Any]) -> list[int]:
        """Refuse a batch that the model would misread, before any work. Returns the row of every picture.

        Raises:
            InputError: wrong shapes, right padding, a prompt longer than the context, placeholders and pictures that do
                not fit, or inputs that the family takes in another form.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        check_batch(ids, mask, self.max_length)
        image = ids == self.image_token_id
        if mask is not None and bool((image & ~mask.bool()).any()):
            raise InputError("attention_mask hides image tokens: padding must not hold picture placeholders.")
        has_pixels = inputs.get("pixel_values") is not None
        missing = [key for key in self.needed if has_pixels and inputs.get(key) is None]
        if missing:
            raise InputError(f"{', '.join(missing)} is missing: pass all that the processor returned for the pictures.")
        sizes = self.picture_sizes(inputs) if has_pixels else []
        return picture_owners(image.sum(-1).tolist(), sizes)

    def repeat_pictures(self, inputs: Mapping[str, Any], times: int) -> dict[str, Tensor]:
        """What the pictures come in for a batch whose every row stands `times` in a row. For `pictures_in_rows` only."""
        owners = self.check(inputs)
        order = [
            k for row in sorted(set(owners)) for _ in range(times) for k, owner in enumerate(owners) if owner == row
        ]
        return {key: inputs[key][order] for key in self.inputs}

    def layout(self, inputs: Mapping[str, Any], embeds: Tensor) -> Prompt:
        """Types, positions and pictures of a batch whose embeddings are there. Errors as `check`."""
        ids, has_pixels = inputs["input_ids"], inputs.get("pixel_values") is not None
        owners = self.check(inputs)
        types = token_types(ids, inputs.get("attention_mask"), self.image_token_id)
        columns = image_columns(types)
        sizes = self.picture_sizes(inputs) if has_pixels else []
        cost = [[0, 0] for _ in range(types.shape[0])]
        for owner, parts in zip(owners, self.picture_flops(inputs) if has_pixels else [], strict=True):
            cost[owner] = [so_far + part for so_far, part in zip(cost[owner], parts, strict=True)]
        return Prompt(
            embeds=embeds, types=types, position_ids=self.positions(types, inputs), image_index=columns,
            content_key=content_key(ids, types, self.picture_pixels(inputs) if has_pixels else (), owners),
            picture_index=picture_numbers(owners, sizes, columns),
            vision_flops=torch.tensor(cost, dtype=torch.long, device=types.device),
        )  # fmt: skip

    @torch.no_grad()
    def embed(self, inputs: Mapping[str, Any]) -> Prompt:
        """Run the vision tower and the projector once and put their tokens in place.

        inputs: input_ids [B, T], attention_mask [B, T] or absent, and what the family's processor makes of pictures
        (`Adapter.inputs`; LLaVA-1.5: pixel_values [pictures, 3, h, w]), absent where there are none. With `FEATURES` among them
        the tower does not run again.

        Raises:
            InputError: as `check`.
        """
        self.check(inputs)
        embeds = self.embed_tokens(inputs["input_ids"])
        if inputs.get("pixel_values") is not None:
            features = inputs[FEATURES] if FEATURES in inputs else self.joined_features(inputs, embeds.dtype)
            places = (inputs["input_ids"] == self.image_token_id).unsqueeze(-1)
            if FEATURES in inputs and features.shape != (int(places.sum()), embeds.shape[-1]):
                raise InputError(f"{FEATURES} are {list(features.shape)}, the prompts hold {int(places.sum())} image tokens.")
            embeds = embeds.masked_scatter(places, features)
        return self.layout(inputs, embeds)

    def joined_features(self, inputs: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        """Tokens of all pictures one after the other, [image tokens, D]."""
        return torch.cat(list(self.picture_features(inputs, dtype)), dim=0).to(dtype)


def adapter_class(model: nn.Module | None) -> type[Adapter]:
    """The adapter of a model's family. Raises InputError where there is none."""
    name = type(model).__name__
    found = next((family for family in families() if name in family.classes), None)
    if found is None:
        known = ", ".join(known for family in families() for known in family.classes)
        raise InputError(f"{name} is not supported: pass a model from load_vlm(), or one of {known}.")
    return found


def families() -> tuple[type[Adapter], ...]:
    """The adapters of all supported families."""
    from .families import FAMILIES

    return FAMILIES


def model_info(model: nn.Module) -> ModelInfo:
    """The model's dimensions (see `ModelInfo`), read from its config. Raises InputError for an unsupported family."""
    return Adapter(model).info()


__all__ = ["Adapter", "ModelInfo", "Prompt", "adapter_class", "families", "image_columns", "model_info", "token_types"]
