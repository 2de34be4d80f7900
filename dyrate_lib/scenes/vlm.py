"""The scenes VLMs: real LLaVA models (CLIP tower, projector, LLaMA) of two sizes, and a fast pass to train them.

The fast pass computes what the transformers modules compute, from the same parameters, but for a packed layout: one
image prefix followed by several independent (instruction, response) slots that all see the prefix and none another
slot. Positions restart behind the prefix in each slot, so every slot is trained exactly as it will be used alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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


# How the packed pass computes attention: by an additive mask on the suffix's rows, the prefix causal by itself; or by flex
# attention's block-sparse kernel, which skips what no row of a block sees (worth it only where it is compiled).
ATTENTIONS = ("masked", "flex")


def _linear(x, weight, bias=None):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _heads(x, n):
    return x.view(x.shape[0], x.shape[1], n, -1).transpose(1, 2)


def _merge(x):
    return x.transpose(1, 2).flatten(2)


def _layer_norm(x, weight, bias, eps, dtype):
    return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, eps).to(dtype)


def _rms_norm(x, weight, eps, dtype):
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight).to(dtype)


def _rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def vision_block(h, heads: int, eps: float, dtype, last: bool, w: list[torch.Tensor]):
    """One CLIP encoder layer; ``h`` float32 [B, T, D]; ``w`` in the order of :func:`_vision_weights`.

    ``last``: only the CLS token is carried on, [B, 1, D], for of the last layer nothing else is read.
    """
    n1w, n1b, qw, qb, kw, kb, vw, vb, ow, ob, n2w, n2b, f1w, f1b, f2w, f2b = w
    x = _layer_norm(h, n1w, n1b, eps, dtype)
    if last:
        h = h[:, :1]
        q = _linear(x[:, :1], qw, qb)
        k, v = _linear(x, torch.cat((kw, vw)), torch.cat((kb, vb))).chunk(2, dim=-1)
    else:  # one product for all three: the rows are many and narrow, so reading them is what takes the time
        q, k, v = _linear(x, torch.cat((qw, kw, vw)), torch.cat((qb, kb, vb))).chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(_heads(q, heads), _heads(k, heads), _heads(v, heads))
    h = h + _linear(_merge(mixed), ow, ob)
    x = _linear(_layer_norm(h, n2w, n2b, eps, dtype), f1w, f1b)
    return h + _linear(x * torch.sigmoid(1.702 * x), f2w, f2b)


def text_block(h, cos, sin, mask, prefix: int, heads: int, eps: float, dtype, last: bool, w: list[torch.Tensor]):
    """One LLaMA layer over the packed layout; ``h`` float32 [B, T, D].

    ``mask``: additive [1, 1, T - prefix, T] for the suffix's rows, or a flex-attention ``BlockMask`` of all T rows.
    ``last``: only the suffix is carried on, [B, T - prefix, D], for the prefix is never predicted from.
    """
    n1, qw, kw, vw, ow, n2, gate, up, down = w
    x = _rms_norm(h, n1, eps, dtype)
    if last:
        h = h[:, prefix:]
        q = _linear(x[:, prefix:], qw)
        k, v = _linear(x, torch.cat((kw, vw))).chunk(2, dim=-1)
        turned = _rotate(_heads(q, heads), cos[:, :, prefix:], sin[:, :, prefix:])
    else:
        q, k, v = _linear(x, torch.cat((qw, kw, vw))).chunk(3, dim=-1)
        turned = _rotate(_heads(q, heads), cos, sin)
    k, v = _rotate(_heads(k, heads), cos, sin), _heads(v, heads)
    if isinstance(mask, torch.Tensor):
        back = F.scaled_dot_product_attention(turned if last else turned[:, :, prefix:], k, v, attn_mask=mask)
        if not last:
            first, keys, values = turned[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix]
            back = torch.cat((F.scaled_dot_product_attention(first, keys, values, is_causal=True), back), dim=2)
    else:
        back = flex_attention(turned, k, v, block_mask=mask)
    h = h + _linear(_merge(back), ow)
    x = _rms_norm(h, n2, eps, dtype)
    wide, gated = _linear(x, torch.cat((up, gate))).chunk(2, dim=-1)
    return h + _linear(F.silu(gated) * wide, down)


def _vision_weights(layer) -> list[torch.Tensor]:
    a, m = layer.self_attn, layer.mlp
    parts = (layer.layer_norm1, a.q_proj, a.k_proj, a.v_proj, a.out_proj, layer.layer_norm2, m.fc1, m.fc2)
    return [t for p in parts for t in (p.weight, p.bias)]


def _text_weights(layer) -> list[torch.Tensor]:
    a, m = layer.self_attn, layer.mlp
    parts = (layer.input_layernorm, a.q_proj, a.k_proj, a.v_proj, a.o_proj, layer.post_attention_layernorm)
    return [p.weight for p in (*parts, m.gate_proj, m.up_proj, m.down_proj)]


def _slot_mask(owner: torch.Tensor, first: int):
    """The packed layout for flex attention, rows from ``first`` on; ``owner`` int64 [T]: each token's slot, -1 the prefix."""

    def sees(b, h, row, column):
        row = row + first
        return (row >= column) & ((owner[column] == -1) | (owner[column] == owner[row]))

    return create_block_mask(sees, None, None, len(owner) - first, len(owner), device=owner.device)


class PackedForward:
    """Forward pass of a scenes VLM over the packed layout, optionally with its two blocks compiled.

    Args:
        model: a ``LlavaForConditionalGeneration`` as :func:`build_model` makes it.
        prefix_ids: int64 [P], the tokens up to and with the image's placeholders.
        slots: length of each slot; the suffix is their concatenation, S tokens.
        dtype: of the matrix work (norms, softmax statistics and the residual stream stay float32).
        attention: how the language model's attention is computed, of :data:`ATTENTIONS`; the same up to rounding.

    Raises:
        InputError: for an unknown kind of attention.
    """

    def __init__(
        self, model, prefix_ids: torch.Tensor, slots: tuple[int, ...], dtype: torch.dtype, attention: str = "masked"
    ):
        if attention not in ATTENTIONS:
            raise InputError(f"unknown attention {attention!r}: choose one of {', '.join(ATTENTIONS)}")
        self.model, self.dtype, self.slots = model, dtype, slots
        device = next(model.parameters()).device
        self.prefix_ids = prefix_ids.to(device)
        self.prefix = len(prefix_ids)
        is_image = prefix_ids == model.config.image_token_id
        self.image_start = int(is_image.nonzero()[0])
        assert int(is_image.sum()) == self.prefix - self.image_start, "the prefix must end with the image's tokens"
        offsets = torch.cat([torch.arange(n) for n in slots])
        owner = torch.cat([torch.full((n,), i) for i, n in enumerate(slots)])
        positions = torch.cat([torch.arange(self.prefix), self.prefix + offsets])
        if attention == "flex":
            rows = torch.cat((torch.full((self.prefix,), -1), owner)).to(device)
            self.masks = _slot_mask(rows, 0), _slot_mask(rows, self.prefix)
        else:
            allowed = (owner[:, None] == owner[None, :]) & (offsets[:, None] >= offsets[None, :])
            allowed = torch.cat([torch.ones(len(owner), self.prefix, dtype=torch.bool), allowed], dim=1)
            bias = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
            self.masks = (bias[None, None].to(device, dtype),) * 2
        text = model.model.language_model
        cos, sin = text.rotary_emb(torch.zeros(1, device=device), positions[None].to(device))
        self.cos, self.sin = cos[:, None].to(dtype), sin[:, None].to(dtype)
        self.vision_block, self.text_block = vision_block, text_block

    def compile(self) -> None:
        """Compile one block of either tower; all layers share the code, so this costs seconds, not minutes."""
        self.vision_block = torch.compile(vision_block, dynamic=False)
        self.text_block = torch.compile(text_block, dynamic=False)

    def vision(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected image tokens [B, 576, D] and the pooled CLS token float32 [B, Dv] (last layer, normalised)."""
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        config = self.model.config.vision_config
        layers = tower.encoder.layers
        h = tower.pre_layrnorm(tower.embeddings(pixel_values))
        for i, layer in enumerate(layers):
            if i == len(layers) - 1:  # vision_feature_layer = -2: what the last layer reads
                features = h[:, 1:]
            last = i == len(layers) - 1
            h = self.vision_block(
                h, config.num_attention_heads, config.layer_norm_eps, self.dtype, last, _vision_weights(layer)
            )
        projector = self.model.model.multi_modal_projector
        x = _linear(features.to(self.dtype), projector.linear_1.weight, projector.linear_1.bias)
        x = _linear(F.gelu(x), projector.linear_2.weight, projector.linear_2.bias)
        return x, tower.post_layernorm(h[:, 0])

    def __call__(self, pixel_values: torch.Tensor, suffix_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every suffix position and the pooled CLS token.

        Args:
            pixel_values: float32 [B, 3, 336, 336], normalised as CLIP's.
            suffix_ids: int64 [B, S].

        Returns:
            Logits float32 [B, S, V] and CLS float32 [B, Dv].
        """
        text, config = self.model.model.language_model, self.model.config.text_config
        image, cls = self.vision(pixel_values)
        batch = len(suffix_ids)
        front = text.embed_tokens(self.prefix_ids[: self.image_start]).expand(batch, -1, -1)
        h = torch.cat((front, image.float(), text.embed_tokens(suffix_ids)), dim=1)
        for i, layer in enumerate(text.layers):
            last = i == len(text.layers) - 1
            h = self.text_block(
                h,
                self.cos,
                self.sin,
                self.masks[last],
                self.prefix,
                config.num_attention_heads,
                config.rms_norm_eps,
                self.dtype,
                last,
                _text_weights(layer),
            )
        h = _rms_norm(h, text.norm.weight, config.rms_norm_eps, self.dtype)
        return _linear(h, self.model.lm_head.weight).float(), cls
