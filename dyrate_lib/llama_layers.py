"""The decoder side of an adapter, shared by all families: how a LLaMA-like layer makes queries, keys and values, and how it ends.

A part of `models.Adapter` in a file of its own; decoders that are built otherwise are refused by the adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LlamaLayers:
    """Embedding, layers and head of the language model. `model`, `core`, `layers` and `norm` are the adapter's."""

    model: Any
    core: Any
    layers: Any
    norm: Any

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """[..] ids to [.., D] embeddings."""
        return self.core.get_input_embeddings()(ids)

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
