"""Decode attention in Triton: one new token a sample over two segments of a cache, reading only what is kept.

Each program takes one sample, one key-value head and one share of the entries that are read; the shares are as long as the
lengths on the device ask for, so that dropped tokens cost nothing and no program idles. The program of the first share also
rotates and stores the new key and value. A second, small kernel puts the shares together. Letters as in `twins`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rotated(base, c, s, rows, d, n_rows, HEAD: tl.constexpr, PAIRED: tl.constexpr):
    """Rows [R, d] of heads at `base`, rotated, float32. PAIRED: what each value is rotated with lies half a head away."""
    mask = (rows < n_rows)[:, None]
    x = tl.load(base + rows[:, None] * HEAD + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if PAIRED:
        other = tl.load(base + rows[:, None] * HEAD + ((d + HEAD // 2) % HEAD)[None, :], mask=mask, other=0.0)
        sign = tl.where(d < HEAD // 2, -1.0, 1.0)
        x = x * c[None, :] + sign[None, :] * other.to(tl.float32) * s[None, :]
    return x


@triton.jit
def _attend(
    qkv, cos, sin, step, keys, values, kept, filled, index, types, out, maxima, sums, shares, scores,
    start, entries, passes, index_stride, types_stride, scores_stride, scale,
    HEADS: tl.constexpr, KV: tl.constexpr, HEAD: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, DOT: tl.constexpr, INDEXED: tl.constexpr, LOOKS: tl.constexpr,
    SCORED: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sample, head, split = tl.program_id(0) // KV, tl.program_id(0) % KV, tl.program_id(1)
    image, text = tl.load(kept + sample), tl.load(filled + sample)
    total = image + text  # the new one is not among them
    share = tl.cdiv(tl.cdiv(total, SPLITS), BLOCK) * BLOCK
    low = split * share
    high = tl.minimum(total, low + share)
    rows = tl.arange(0, ROWS)
    d = tl.arange(0, HEAD)
    real = rows < GROUP
    heads = sample * HEADS + head * GROUP + rows  # of the output
    at = heads * SPLITS + split
    if (split > 0) & (low >= high):
        tl.store(maxima + at, tl.full([ROWS], -float("inf"), tl.float32), mask=real)
        return
    now = tl.load(step)
    angle = (sample * passes + now) * HEAD + d
    c, s = tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)
    mine = qkv + sample.to(tl.int64) * (HEADS + 2 * KV) * HEAD
    q = _rotated(mine + head * GROUP * HEAD, c, s, rows, d, GROUP, HEAD, True) * (scale * LOG2E)
    cache = (sample * KV + head).to(tl.int64) * entries

    top = tl.full([ROWS], -float("inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    sys = tl.zeros([ROWS], tl.float32)
    img = tl.zeros([ROWS], tl.float32)
    ins = tl.zeros([ROWS], tl.float32)
    res = tl.zeros([ROWS], tl.float32)
    if split == 0:
        one = tl.arange(0, 1)
        place = start + text
        k_new = _rotated(mine + (HEADS + head) * HEAD, c, s, one, d, 1, HEAD, True).to(keys.dtype.element_ty)
        v_new = _rotated(mine + (HEADS + KV + head) * HEAD, c, s, one, d, 1, HEAD, False).to(values.dtype.element_ty)
        tl.store(keys + (cache + place) * HEAD + one[:, None] * HEAD + d[None, :], k_new)
        tl.store(values + (cache + place) * HEAD + one[:, None] * HEAD + d[None, :], v_new)
        top = tl.sum(q * k_new.to(tl.float32), 1)
        norm += 1.0
        acc += v_new.to(tl.float32)
        if LOOKS:
            kind = tl.load(types + sample * types_stride + place).to(tl.int32)
            sys += tl.where(kind == 0, 1.0, 0.0)
            img += tl.where(kind == 1, 1.0, 0.0)
            ins += tl.where(kind == 2, 1.0, 0.0)
            res += tl.where(kind == 3, 1.0, 0.0)
        if SCORED:
            tl.store(scores + heads.to(tl.int64) * scores_stride + place, top * LN2, mask=real)

    for base in range(low, high, BLOCK):
        i = base + tl.arange(0, BLOCK)
        there = i < high
        first = i < image
        slot = i
        if INDEXED:
            slot = tl.load(index + sample * index_stride + i, mask=there & first, other=0)
        slot = tl.where(first, slot, start + i - image)
        where = (cache + slot)[:, None] * HEAD + d[None, :]
        k = tl.load(keys + where, mask=there[:, None], other=0.0)
        v = tl.load(values + where, mask=there[:, None], other=0.0)
        if DOT:
            logits = tl.dot(q.to(k.dtype), tl.trans(k), input_precision=PRECISION)
        else:
            logits = tl.sum(q * k.to(tl.float32), 1)[None, :]
        logits = tl.where(there[None, :], logits, -float("inf"))
        if SCORED:
            to = heads.to(tl.int64)[:, None] * scores_stride + slot[None, :]
            tl.store(scores + to, logits * LN2, mask=real[:, None] & there[None, :])
        higher = tl.maximum(top, tl.max(logits, 1))
        fade = tl.exp2(top - higher)
        weight = tl.exp2(logits - higher[:, None])
        norm = norm * fade + tl.sum(weight, 1)
        if DOT:
            acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        else:
            acc = acc * fade[:, None] + tl.sum(tl.trans(weight) * v.to(tl.float32), 0)[None, :]
        top = higher
        if LOOKS:
            kind = tl.load(types + sample * types_stride + slot, mask=there, other=-1).to(tl.int32)
            sys = sys * fade + tl.sum(tl.where((kind == 0)[None, :], weight, 0.0), 1)
            img = img * fade + tl.sum(tl.where((kind == 1)[None, :], weight, 0.0), 1)
            ins = ins * fade + tl.sum(tl.where((kind == 2)[None, :], weight, 0.0), 1)
            res = res * fade + tl.sum(tl.where((kind == 3)[None, :], weight, 0.0), 1)

    if SPLITS == 1:
        acc = acc / norm[:, None]
    tl.store(out + at[:, None] * HEAD + d[None, :], acc.to(out.dtype.element_ty), mask=real[:, None])
    tl.store(maxima + at, top, mask=real)
    tl.store(sums + at, norm, mask=real)
    if LOOKS:
        if SPLITS == 1:
            sys, img, ins, res = sys / norm, img / norm, ins / norm, res / norm
        tl.store(shares + at * 4, sys, mask=real)
        tl.store(shares + at * 4 + 1, img, mask=real)
        tl.store(shares + at * 4 + 2, ins, mask=real)
        tl.store(shares + at * 4 + 3, res, mask=real)


@triton.jit
def _combine(
    parts, maxima, sums, part_shares, out, shares, SPLITS: tl.constexpr, HEAD: tl.constexpr, LOOKS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, HEAD)
    at = head * SPLITS + split
    top = tl.load(maxima + at)
    used = top > -float("inf")
    scale = tl.where(used, tl.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(tl.where(used, scale * tl.load(sums + at, mask=used, other=0.0), 0.0), 0)
    part = tl.load(parts + at[:, None] * HEAD + d[None, :], mask=used[:, None], other=0.0)
    tl.store(out + head * HEAD + d, (tl.sum(part * scale[:, None], 0) / total).to(out.dtype.element_ty))
    if LOOKS:
        kind = tl.arange(0, 4)
        part = tl.load(part_shares + at[:, None] * 4 + kind[None, :], mask=used[:, None], other=0.0)
        tl.store(shares + head * 4 + kind, tl.sum(part * scale[:, None], 0) / total)


def splits_for(programs: int, entries: int, wanted: int = 1584) -> int:
    """Shares of a cache: enough for `wanted` programs in all (twelve a multiprocessor of an H200, one warp each), of 64 entries
    or more each. Measured there over batches of 1 to 64 and caches of 200 to 3,000 entries: see `decode_attention`."""
    splits = 1
    while splits * programs < wanted and splits * 64 < entries and splits < 32:
        splits *= 2
    return splits


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, step: Tensor, keys: Tensor, values: Tensor, kept: Tensor, start: int,
    filled: Tensor, n_heads: int, index: Tensor | None = None, types: Tensor | None = None, shares: Tensor | None = None,
    scores: Tensor | None = None, block: int = 16, splits: int | None = None, warps: int = 1,
    early: bool = False,
) -> Tensor:  # fmt: skip
    """As `twins.decode_attention`; with `scores`, entries that are not read keep what was there, less the log-sum-exp.

    block: entries at once; splits: programs for one head; early: start while the kernel before ends (see `skinny_kernel`).
    """
    launch = {"EARLY": early} | ({"launch_pdl": True} if early else {})
    batch, n_kv, entries, d = keys.shape
    group = n_heads // n_kv
    dot = group > 1
    splits = splits_for(batch * n_kv, entries) if splits is None else splits
    out = qkv.new_empty(batch, n_heads * d)
    wide = torch.float32
    parts = out if splits == 1 else torch.empty(batch, n_heads, splits, d, dtype=wide, device=qkv.device)
    maxima = torch.empty(2, batch, n_heads, splits, dtype=wide, device=qkv.device)
    looks = shares is not None and types is not None
    part_shares = shares if splits == 1 or not looks else parts.new_empty(batch, n_heads, splits, 4)
    _attend[(batch * n_kv, splits)](
        qkv, cos, sin, step, keys, values, kept, filled, index if index is not None else kept,
        types if types is not None else kept, parts, maxima[0], maxima[1], part_shares if looks else maxima,
        scores if scores is not None else maxima, start, entries, cos.shape[1],
        index.stride(0) if index is not None else 0, types.stride(0) if types is not None else 0,
        scores.stride(1) if scores is not None else 0, d**-0.5,
        HEADS=n_heads, KV=n_kv, HEAD=d, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)) if dot else 1,
        BLOCK=block, SPLITS=splits, DOT=dot, INDEXED=index is not None, LOOKS=looks, SCORED=scores is not None,
        PRECISION="ieee", num_warps=warps, **launch,
    )  # fmt: skip
    if splits > 1:
        _combine[(batch * n_heads,)](
            parts, maxima[0], maxima[1], part_shares if looks else maxima, out, shares if looks else out,
            SPLITS=splits, HEAD=d, LOOKS=looks, num_warps=max(1, min(4, splits * d // 512)), **launch,
        )  # fmt: skip
    if scores is not None:
        top = maxima[0].amax(-1, keepdim=True)
        total = (maxima[1] * torch.exp2(maxima[0] - top)).nan_to_num(0.0).sum(-1)
        scores.sub_((top[..., 0] * 0.6931471805599453 + total.log())[..., None])
    return out
