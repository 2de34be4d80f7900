"""Attention under a multiplicative mask (eq. 6) with gradients in the mask, written out so that training is quick.

Autograd through the plain formula keeps about ten [B, H, T, T] tensors a layer and reads each several times; on a GPU
that traffic is most of a training step. The backward pass below needs two, and gives the same gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import repeat_heads

_EMPTY = 1e-30  # a row that reads nothing divides by this


class _MaskedAttention(torch.autograd.Function):
    """q, k, v [B, H, T, d] (q scaled), mask [B, T, T], causal [T, T] bool -> [B, H, T, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: Tensor) -> Tensor:
        e = q @ k.transpose(-1, -2)
        e.masked_fill_(~causal, -torch.inf)
        e.sub_(e.amax(-1, keepdim=True)).exp_()
        p = e * mask[:, None]
        z = p.sum(-1, keepdim=True).clamp_(min=_EMPTY)
        out = (p @ v) / z
        ctx.save_for_backward(q, k, v, mask, e, z, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, e, z, out = ctx.saved_tensors
        scaled = grad / z
        # d loss / d p_ij = g_i (v_j - out_i) / z_i, with p = e m; then m gets e of it and the scores e m of it
        dp = scaled @ v.transpose(-1, -2)
        dp.sub_((scaled * out).sum(-1, keepdim=True)).mul_(e)
        dmask = dp.sum(1) if ctx.needs_input_grad[3] else None
        ds = dp.mul_(mask[:, None])
        dq = ds @ k if ctx.needs_input_grad[0] else None
        dk = ds.transpose(-1, -2) @ q if ctx.needs_input_grad[1] else None
        dv = (e * mask[:, None]).transpose(-1, -2) @ scaled if ctx.needs_input_grad[2] else None
        return dq, dk, dv, dmask, None


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """exp(s) m / sum exp(s) m: attention with a multiplicative mask (eq. 6), differentiable in all four.

    q: [B, H, T, d]; k, v: [B, H or fewer, T, d]; mask: [B, T, T] in [0, 1], causal part included. Dropped entries are
    multiplied away rather than set to minus infinity: their gradient tells the predictor what keeping them would have
    done. Computed in float32 at least; returned in v's dtype.
    """
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    exact = torch.promote_types(q.dtype, torch.float32)
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scaled = q.to(exact) * q.shape[-1] ** -0.5
    return _MaskedAttention.apply(scaled, k.to(exact), v.to(exact), mask.to(exact), causal).to(v.dtype)
