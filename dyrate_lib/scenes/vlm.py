"""The scenes VLMs: real LLaVA models (CLIP tower, projector, LLaMA) of two sizes; `packed_forward` is what trains them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError
from .tokenizer import IMAGE_SIZE, PATCH_SIZE, build_tokenizer


@dataclass(frozen=True)
class VLMSize:
    """Layers x width of the two towers; heads are 32 wide everywhere."""

    name: str
    vision_layers: int
    vision_width: int
    vision_mlp: int
    layers: int
    width: int
    mlp: int


SIZES = {
    "small": VLMSize("scenes-small", 6, 192, 768, 16, 192, 512),
    "base": VLMSize("scenes-base", 6, 224, 896, 24, 224, 576),
    "tiny": VLMSize("scenes-tiny", 2, 64, 128, 4, 64, 128),  # for tests only, never shipped
}


def build_model(size: str = "small", seed: int = 0):
    """A freshly initialised ``LlavaForConditionalGeneration`` of one of :data:`SIZES`, float32 on the CPU.

    Raises:
        InputError: for an unknown size.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    if size not in SIZES:
        raise InputError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    s, tokenizer = SIZES[size], build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=s.vision_width,
        intermediate_size=s.vision_mlp,
        num_hidden_layers=s.vision_layers,
        num_attention_heads=s.vision_width // 32,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=s.vision_width,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=s.width,
        intermediate_size=s.mlp,
        num_hidden_layers=s.layers,
        num_attention_heads=s.width // 32,
        num_key_value_heads=s.width // 32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(  # type: ignore[call-arg]
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float()
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 64
    with torch.no_grad():  # keeps the residual stream's scale the same at any depth
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_((2 * s.layers) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * s.layers) ** -0.5)
    return model
