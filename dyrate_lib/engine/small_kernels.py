"""RMSNorm, SwiGLU and rotary embedding with the store to the cache, one Triton kernel each. Letters as in `twins`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .twins import split_heads


@triton.jit
def _rms_norm(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    mask = at < WIDTH
    value = tl.load(x + row + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(weight + at, mask=mask, other=0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    # rounded before the weight, as the models do
    tl.store(out + row + at, value.to(out.dtype.element_ty) * g, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `twins.rms_norm`; x [M, D] with rows side by side."""
    rows, width = x.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](x, weight, out, eps, WIDTH=width, BLOCK=block, num_warps=max(1, min(16, block // 512)))
    return out


@triton.jit
def _swiglu(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + at, mask=mask, other=0.0)
    gate = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row * WIDTH + at, gate.to(out.dtype.element_ty) * up, mask=mask)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `twins.swiglu`; gate_up [M, 2 W] with rows side by side."""
    rows, both = gate_up.shape
    out = gate_up.new_empty(rows, both // 2)
    _swiglu[(rows, triton.cdiv(both // 2, 2048))](gate_up, out, WIDTH=both // 2, BLOCK=2048, num_warps=8)
    return out


@triton.jit
def _rope_store(
    qkv, cos, sin, keys, values, dest, length, entries,
    HEADS: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    sample = token // length
    entry = tl.load(dest + token)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (head < HEADS + 2 * KV)[:, None]
    turned = (head < HEADS + KV)[:, None]
    d = tl.arange(0, HEAD // 2)
    low = qkv + (token * (HEADS + 2 * KV) + head)[:, None] * HEAD + d[None, :]
    high = low + HEAD // 2
    # both halves in the same thread: they can be turned in place
    a = tl.load(low, mask=there, other=0.0)
    b = tl.load(high, mask=there, other=0.0)
    angle = token * HEAD + d
    c_low, s_low = tl.load(cos + angle).to(tl.float32)[None, :], tl.load(sin + angle).to(tl.float32)[None, :]
    c_high = tl.load(cos + angle + HEAD // 2).to(tl.float32)[None, :]
    s_high = tl.load(sin + angle + HEAD // 2).to(tl.float32)[None, :]
    kind = qkv.dtype.element_ty
    new_a = tl.where(turned, a.to(tl.float32) * c_low - b.to(tl.float32) * s_low, a.to(tl.float32)).to(kind)
    new_b = tl.where(turned, b.to(tl.float32) * c_high + a.to(tl.float32) * s_high, b.to(tl.float32)).to(kind)
    tl.store(low, new_a, mask=turned)
    tl.store(high, new_b, mask=turned)
    is_key = (head >= HEADS) & (head < HEADS + KV)
    at = ((sample * KV + head - HEADS) * entries + entry)[:, None] * HEAD + d[None, :]
    mask = is_key[:, None] & (entry >= 0)
    tl.store(keys + at, new_a, mask=mask)
    tl.store(keys + at + HEAD // 2, new_b, mask=mask)
    is_value = (head >= HEADS + KV) & (head < HEADS + 2 * KV)
    at = ((sample * KV + head - HEADS - KV) * entries + entry)[:, None] * HEAD + d[None, :]
    mask = is_value[:, None] & (entry >= 0)
    tl.store(values + at, new_a, mask=mask)
    tl.store(values + at + HEAD // 2, new_b, mask=mask)


def rope_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, dest: Tensor, n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `twins.rope_store`, but in place: q, k and v are views of qkv [B, T, (H + 2 K) d]."""
    batch, length = qkv.shape[:2]
    n_kv, entries, d = keys.shape[1:]
    block = 16
    _rope_store[(batch * length, triton.cdiv(n_heads + 2 * n_kv, block))](
        qkv, cos.contiguous(), sin.contiguous(), keys, values, dest.contiguous(), length, entries,
        HEADS=n_heads, KV=n_kv, HEAD=d, BLOCK=block, num_warps=4,
    )  # fmt: skip
    q, k, v = split_heads(qkv, n_heads, n_kv)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
