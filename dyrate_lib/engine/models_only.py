"""Weights of published dimensions without a model around them: for tuning products, quick to make."""

from __future__ import annotations

import torch

from ..dimensions import llava_dimensions
from .weights import LayerWeights, Weights


def weights_of(size: str, layers: int | None = None) -> Weights:
    """Random bf16 weights on the GPU of LLaVA-1.5 "7b" or "13b"; layers: how many, by default enough to miss every cache."""
    info = llava_dimensions(size)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)

    heads = (info.n_heads + 2 * info.n_kv_heads) * info.head_dim
    made = Weights.__new__(Weights)
    made._fused, made._watch = [], None
    made.layers = [
        LayerWeights(
            qkv=random(heads, info.hidden), qkv_bias=None, o=random(info.hidden, info.n_heads * info.head_dim), o_bias=None,
            gate_up=random(2 * info.mlp, info.hidden), down=random(info.hidden, info.mlp), norm=random(info.hidden),
            post_norm=random(info.hidden), eps=1e-5, post_eps=1e-5,
        )
        for _ in range(layers or 12)
    ]  # fmt: skip
    made.norm, made.eps = random(info.hidden), 1e-5
    made.head = made.embedding = random(info.vocab, info.hidden)
    return made
