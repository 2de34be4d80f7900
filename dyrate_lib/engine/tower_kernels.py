"""What stands between the products of a CLIP layer: the sum and its LayerNorm, and quick-GELU, one Triton kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_layer_norm(x, delta, weight, bias, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    mask = at < WIDTH
    total = tl.load(x + row + at, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(delta + row + at, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(x.dtype.element_ty)
    tl.store(x + row + at, rounded, mask=mask)
    total = rounded.to(tl.float32)  # the norm is that of what the next layer reads
    total = tl.where(mask, total - tl.sum(total, 0) / WIDTH, 0.0)
    total = total * tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    g = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row + at, (total * g + b).to(out.dtype.element_ty), mask=mask)


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `twins.add_layer_norm`; x + delta is written to x, whose rows lie side by side."""
    rows, width = x.shape
    out = torch.empty_like(delta)
    block = triton.next_power_of_2(width)
    _add_layer_norm[(rows,)](
        x, delta, weight, bias, out, eps, WIDTH=width, BLOCK=block, num_warps=max(1, min(8, block // 256))
    )
    return x, out


@triton.jit
def _quick_gelu(x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + at, (value / (1.0 + tl.exp(-1.702 * value))).to(x.dtype.element_ty), mask=mask)


def quick_gelu(x: Tensor) -> Tensor:
    """As `twins.quick_gelu`, in place."""
    _quick_gelu[(triton.cdiv(x.numel(), 2048),)](x, x.numel(), BLOCK=2048, num_warps=8)
    return x
