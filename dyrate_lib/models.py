"""The one place that knows how transformers builds a VLM.

Everything else in the library sees a model through `Adapter`: its layers, how a layer makes queries, keys and values,
how it ends, and how a batch of prompts and pictures becomes embeddings with a type for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .masks import IMG, INS, PAD, SYS


@dataclass(frozen=True)
class ModelInfo:
    """The dimensions that token counts, FLOPs and bytes depend on. All counts are plain integers."""

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


@dataclass
class Prompt:
    """A batch of prompts as the language model sees it.

    embeds: [B, T, D]; types: [B, T] int64 (PAD, SYS, IMG, INS of `masks`); position_ids: [B, T] int64, 0 on padding;
    image_index: [B, N] int64, the column of every image token in order, -1 where a row has fewer than N;
    content_key: [B] int64, a number made from the row's own ids and pixels, the same in any batch.
    """

    embeds: Tensor
    types: Tensor
    position_ids: Tensor
    image_index: Tensor
    content_key: Tensor

    @property
    def n_image(self) -> Tensor:
        """[B] int64: image tokens in each row."""
        return (self.types == IMG).sum(-1)

    @property
    def length(self) -> Tensor:
        """[B] int64: prompt tokens in each row, image tokens counted, padding not."""
        return (self.types != PAD).sum(-1)


def token_types(input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int) -> Tensor:
    """Type of every prompt token by its position: [B, T] int64 of PAD, SYS, IMG, INS.

    SYS is all before the (first) picture, INS all after it that is not a picture. A row without a picture is all INS.
    """
    image = input_ids == image_token_id
    real = torch.ones_like(image) if attention_mask is None else attention_mask.bool()
    image = image & real
    seen = image.long().cumsum(-1) > 0
    has_image = image.any(-1, keepdim=True)
    types = torch.where(seen | ~has_image, INS, SYS)
    types = torch.where(image, IMG, types)
    return torch.where(real, types, PAD)


def image_columns(types: Tensor) -> Tensor:
    """Columns of the image tokens: [B, N] int64 in order, -1 where a row has fewer than the largest N."""
    image = types == IMG
    n = int(image.sum(-1).max()) if image.numel() else 0
    order = torch.argsort((~image).long(), dim=-1, stable=True)[:, :n]
    return torch.where(torch.gather(image, 1, order), order, -1)


def content_key(input_ids: Tensor, types: Tensor, pixel_values: Tensor | None) -> Tensor:
    """[B] int64 made by integer arithmetic from a row's ids and its pictures' pixels: independent of the batch around it."""
    real = types != PAD
    n_cols = real.long().cumsum(-1) * real
    key = (input_ids.long() * real * (n_cols * 2654435761 % 1000003)).sum(-1)
    if pixel_values is not None and pixel_values.numel():
        flat = (pixel_values.float() * 997).round().long().flatten(1)
        weights = torch.arange(flat.shape[1], device=flat.device) % 8191 + 1
        pictures = (flat * weights).sum(-1).to(key.device)
        owners = (types == IMG).any(-1).nonzero()[:, 0]
        if len(owners) == len(pictures):
            key = key.index_add(0, owners, pictures)
    return key % (2**31 - 1)


class Adapter:
    """A LLaVA-style model as the library uses it: layers, rotary embedding, head, and prompts as embeddings.

    Works on any `LlavaForConditionalGeneration` whose language model is a LLaMA-like decoder.

    Raises:
        InputError: the model is of a family that has no adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        if type(model).__name__ != "LlavaForConditionalGeneration":
            raise InputError(
                f"{type(model).__name__} is not supported: pass a LlavaForConditionalGeneration, e.g. from load_vlm()."
            )
        self.model = model
        self.core: Any = model.model
        self.language_model: Any = model.model.language_model
        self.layers: Any = self.language_model.layers
        self.norm: Any = self.language_model.norm
        self.config = model.config
        self.text_config = model.config.text_config
        self.image_token_id = int(model.config.image_token_id)

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

    def layout(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor | None, embeds: Tensor
    ) -> Prompt:
        """The batch's token types and positions, as stock `generate` sets them under left padding."""
        types = token_types(input_ids, attention_mask, self.image_token_id)
        position_ids = ((types != PAD).long().cumsum(-1) - 1).clamp(min=0)
        return Prompt(embeds, types, position_ids, image_columns(types), content_key(input_ids, types, pixel_values))

    @torch.no_grad()
    def embed(self, inputs: Any) -> Prompt:
        """Run the vision tower and the projector once and put their tokens in place.

        inputs: input_ids [B, T], attention_mask [B, T] or absent, pixel_values [pictures, 3, h, w] or absent.

        Raises:
            InputError: ids, pictures and placeholders do not fit, or the prompt is longer than the model's context.
        """
        input_ids = inputs["input_ids"]
        pixel_values = inputs.get("pixel_values")
        attention_mask = inputs.get("attention_mask")
        check_prompt(
            input_ids, attention_mask, pixel_values, self.image_token_id, self.max_length, model_info(self.model)
        )
        embeds = self.core.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.core.get_image_features(
                pixel_values=pixel_values.to(embeds.dtype),
                vision_feature_layer=self.config.vision_feature_layer,
                vision_feature_select_strategy=self.config.vision_feature_select_strategy,
                return_dict=True,
            ).pooler_output
            features = torch.cat(list(features), dim=0).to(embeds.dtype)
            embeds = embeds.masked_scatter((input_ids == self.image_token_id).unsqueeze(-1), features)
        return self.layout(input_ids, attention_mask, pixel_values, embeds)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """[..] ids to [.., D] embeddings."""
        return self.core.get_input_embeddings()(ids)

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [B, T, head_dim], in `like`'s dtype."""
        return self.language_model.rotary_emb(like, position_ids=position_ids)

    def project(
        self, index: int, normed: Tensor, rotary: tuple[Tensor, Tensor], what: str = "qkv"
    ) -> tuple[Tensor, ...]:
        """Queries, keys, values ([B, heads, T, head_dim]) of layer `index` from its normalised input [B, T, D]."""
        attention = self.layers[index].self_attn
        shape = (*normed.shape[:-1], -1, attention.head_dim)
        cos, sin = (part.unsqueeze(1) for part in rotary)
        out = []
        for letter in what:
            x = getattr(attention, f"{letter}_proj")(normed).view(shape).transpose(1, 2)
            if letter != "v":
                half = x.shape[-1] // 2
                x = x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
            out.append(x)
        return tuple(out)

    def normed_input(self, index: int, x: Tensor) -> Tensor:
        """Layer `index`'s input norm of x [B, T, D]."""
        return self.layers[index].input_layernorm(x)

    def finish(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of layer `index`: x [B, T, D] and attention output [B, heads, T, head_dim] to the layer's output."""
        layer = self.layers[index]
        x = x + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and LM head: [.., D] to [.., vocab]."""
        return self.model.lm_head(self.norm(x))


def model_info(model: nn.Module) -> ModelInfo:
    """The model's dimensions (see `ModelInfo`), read from its config."""
    config = model.config
    text, vision = config.text_config, config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    cls = 0 if config.vision_feature_select_strategy == "default" else 1
    n_features = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    return ModelInfo(
        name=getattr(model, "dyrate_name", getattr(config, "_name_or_path", "") or type(model).__name__),
        n_layers=text.num_hidden_layers,
        n_heads=text.num_attention_heads,
        n_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        vocab=text.vocab_size,
        n_image_tokens=patches + cls,
        vision_layers=vision.num_hidden_layers,
        vision_hidden=vision.hidden_size,
        vision_mlp=vision.intermediate_size,
        vision_heads=vision.num_attention_heads,
        vision_tokens=patches + 1,
        patch=vision.patch_size,
        image_size=vision.image_size,
        projector_hidden=text.hidden_size,
        feature_dim=vision.hidden_size * n_features,
    )


def check_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None,
    image_token_id: int,
    max_length: int,
    info: ModelInfo,
) -> None:
    """Refuse a batch that the model would misread, before any work.

    Raises:
        InputError: wrong shapes, right padding, placeholders without pictures or the reverse, several pictures in one
            prompt, or a prompt longer than the context.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise InputError(
            f"input_ids must be [batch, tokens] with at least one token, got shape {tuple(input_ids.shape)}."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} differ in shape."
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise InputError("The batch is padded on the right; set processor.tokenizer.padding_side = 'left' to generate.")
    if input_ids.shape[1] > max_length:
        raise InputError(
            f"The prompt has {input_ids.shape[1]} tokens, image tokens counted, "
            f"the model's context {max_length}: shorten the prompt."
        )
    per_row = (input_ids == image_token_id).sum(-1)
    pictures = 0 if pixel_values is None else pixel_values.shape[0]
    if int(per_row.sum()) != pictures * info.n_image_tokens:
        raise InputError(
            f"{pictures} picture(s) need {pictures * info.n_image_tokens} image tokens, the prompts hold {int(per_row.sum())}: "
            "give each picture one <image> placeholder, and each placeholder a picture."
        )
    if int(per_row.max()) > info.n_image_tokens:
        raise InputError("A prompt holds several pictures; one picture a prompt is supported.")
