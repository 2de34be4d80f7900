"""Products of a few rows with a large matrix, bound by the reading of the matrix: x [M, K] times weight [N, K] transposed.

One kernel, with what stands before and after it folded in, since at these sizes a launch of its own costs as much as the work:
RMSNorm before (its scale per row is applied at the end, so x is read once), then a bias, SwiGLU, or the residual.
M = 1 multiplies and adds; M = 2..64 uses the matrix unit, padded to 16 rows.

With `early`, a kernel starts while the one before it ends (programmatic dependent launch, Hopper and later): M = 1 has its first
piece of the matrix under way before it waits for x, which is what a chain of short kernels otherwise loses at every seam.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import twins

MOST_ROWS = 64


@dataclass(frozen=True)
class Config:
    """Rows of the matrix and columns at once, warps, and pipeline stages of one program."""

    rows: int = 16
    columns: int = 256
    warps: int = 4
    stages: int = 3


CANDIDATES = {
    "one": (
        Config(4, 1024, 4, 1), Config(8, 512, 4, 1), Config(8, 1024, 8, 1), Config(16, 256, 4, 1), Config(16, 512, 8, 1),
        Config(2, 2048, 4, 1),
    ),
    "few": (
        Config(16, 256, 4, 4), Config(16, 128, 4, 6), Config(32, 256, 4, 4), Config(32, 128, 4, 5), Config(64, 128, 4, 4),
        Config(64, 128, 8, 4),
    ),
}  # fmt: skip


@triton.jit
def _one(
    x, weight, norm, bias, residual, out, eps, n_out,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORMED: tl.constexpr, BIASED: tl.constexpr,
    GATED: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    there = row < n_out
    k = tl.arange(0, BK)
    first = weight + row.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(first, mask=there[:, None] & (k < K)[None, :], other=0.0)
    w_up = w
    if GATED:
        w_up = tl.load(first + n_out * K, mask=there[:, None] & (k < K)[None, :], other=0.0)
    if EARLY:
        gdc_wait()
    acc = tl.zeros([BN, BK], tl.float32)
    gate = tl.zeros([BN, BK], tl.float32)
    square = tl.zeros([BK], tl.float32)
    for base in range(0, K, BK):
        inside = (base + k) < K
        more = there[:, None] & ((base + BK + k) < K)[None, :]
        w_next = tl.load(first + base + BK, mask=more, other=0.0)
        up_next = w_next
        if GATED:
            up_next = tl.load(first + n_out * K + base + BK, mask=more, other=0.0)
        value = tl.load(x + base + k, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            square += value * value
            value = value * tl.load(norm + base + k, mask=inside, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * value[None, :]
        if GATED:
            gate += w_up.to(tl.float32) * value[None, :]
        w, w_up = w_next, up_next
    total = tl.sum(acc, 1)
    other = tl.sum(gate, 1)
    if NORMED:
        scale = tl.rsqrt(tl.sum(square, 0) / K + eps)
        total, other = total * scale, other * scale
    if BIASED:
        total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * other
    if ADDED:
        total += tl.load(residual + row, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def _few(
    x, weight, norm, bias, residual, out, eps, n_rows, n_out,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORMED: tl.constexpr,
    BIASED: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    sample = tl.arange(0, BM)
    there, real = row < n_out, sample < n_rows
    k = tl.arange(0, BK)
    first = weight + row.to(tl.int64)[None, :] * K + k[:, None]
    source = x + sample[:, None] * K + k[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    gate = tl.zeros([BM, BN], tl.float32)
    square = tl.zeros([BM], tl.float32)
    for base in range(0, K, BK):
        inside = (base + k) < K
        value = tl.load(source + base, mask=real[:, None] & inside[None, :], other=0.0)
        w = tl.load(first + base, mask=inside[:, None] & there[None, :], other=0.0)
        if NORMED:
            wide = value.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            g = tl.load(norm + base + k, mask=inside, other=0.0).to(tl.float32)
            value = (wide * g[None, :]).to(w.dtype)
        acc += tl.dot(value, w, input_precision="ieee")
        if GATED:
            w_up = tl.load(first + n_out * K + base, mask=inside[:, None] & there[None, :], other=0.0)
            gate += tl.dot(value, w_up, input_precision="ieee")
    if NORMED:
        scale = tl.rsqrt(square / K + eps)[:, None]
        acc, gate = acc * scale, gate * scale
    if BIASED:
        acc += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * gate
    at = sample[:, None] * n_out + row[None, :]
    mask = real[:, None] & there[None, :]
    if ADDED:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


def skinny(
    x: Tensor, weight: Tensor, config: Config, norm: Tensor | None = None, eps: float = 0.0, bias: Tensor | None = None,
    gated: bool = False, residual: Tensor | None = None, early: bool = False,
) -> Tensor:  # fmt: skip
    """[M, K] and [N, K] to [M, N]: rms_norm(x) weight^T + bias.

    gated: N = 2 W rows (gates, ups) to silu(g) u [M, W]; residual [M, N] is added; early counts for M = 1 alone. Sums in
    float32; x scaled by the norm's weight is rounded to the matrix's type for M > 1.
    """
    m, width = x.shape
    n_out = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(m, n_out)
    flags = {"NORMED": norm is not None, "BIASED": bias is not None, "GATED": gated, "ADDED": residual is not None}
    extra = (x if norm is None else norm, x if bias is None else bias, x if residual is None else residual)
    shape = {
        "K": width,
        "BN": config.rows,
        "BK": min(config.columns, triton.next_power_of_2(width)),
    }
    grid = (triton.cdiv(n_out, config.rows),)
    if m == 1:
        flags |= {"EARLY": early} | ({"launch_pdl": True} if early else {})
        _one[grid](x, weight, *extra, out, eps, n_out, **shape, **flags, num_warps=config.warps)
    else:
        rows = max(16, triton.next_power_of_2(m))
        _few[grid](
            x, weight, *extra, out, eps, m, n_out, BM=rows, **shape, **flags, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip
    return out


def plain(
    x: Tensor, weight: Tensor, norm: Tensor | None = None, eps: float = 0.0, bias: Tensor | None = None,
    gated: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The twin of `skinny`."""
    wide = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    value = x if norm is None else twins.rms_norm(x, norm, eps)
    out = value.to(wide) @ weight.to(wide).t()
    out = out if bias is None else out + bias.to(wide)
    out = twins.swiglu(out) if gated else out
    return (out if residual is None else out + residual.to(wide)).to(x.dtype)
