"""Every kernel of the engine in plain PyTorch: what the kernels are tested against, and what runs where there is no GPU.

A layer's cache is one buffer of S entries a sample, in two segments: entries 0..kept-1 are image tokens, the most important
first, and entries start..start+filled-1 are text, in order; the newest token is written at start + filled. Layers below P
hold the whole prompt as text (start 0, kept 0). Dropping a token lowers `kept`; nothing moves.

Letters: B samples, H heads, K key-value heads, d head size, S entries of a buffer, D hidden width, M rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [M, D] to [M, D]; the mean square in float32 (or wider)."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """[M, 2 W], gates then ups, to silu(gate) * up [M, W]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [M, C] to [M, C]; mean and variance in float32 (or wider)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta [M, C], rounded to their type, and its LayerNorm [M, C]. May write to x."""
    total = x + delta
    return total, layer_norm(total, weight, bias, eps)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) of [M, W], rounded once. May write to x."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [.., d] by cos and sin [.., d]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def split_heads(qkv: Tensor, n_heads: int, n_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """[.., (H + 2 K) d] to q [.., H, d], k and v [.., K, d], as views."""
    d = qkv.shape[-1] // (n_heads + 2 * n_kv)
    parts = qkv.unflatten(-1, (n_heads + 2 * n_kv, d))
    return parts[..., :n_heads, :], parts[..., n_heads : n_heads + n_kv, :], parts[..., n_heads + n_kv :, :]


def rope_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, dest: Tensor, n_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate a prompt's queries and keys and store keys and values in the cache.

    qkv [B, T, (H + 2 K) d]; cos, sin [B, T, d]; keys, values [B, K, S, d], written in place; dest [B, T] int32, the entry
    each row goes to, -1 for none. Returns q [B, H, T, d], k and v [B, K, T, d].
    """
    q, k, v = split_heads(qkv, n_heads, keys.shape[1])
    cos, sin = cos[:, :, None], sin[:, :, None]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    row, column = (dest >= 0).nonzero(as_tuple=True)
    entry = dest[row, column].long()
    keys[row, :, entry], values[row, :, entry] = k[row, column], v[row, column]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def decode_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, step: Tensor, keys: Tensor, values: Tensor, kept: Tensor, start: int,
    filled: Tensor, n_heads: int, index: Tensor | None = None, types: Tensor | None = None, shares: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One new token a sample: rotate it, store it, and attend to what is read, itself included.

    qkv [B, (H + 2 K) d], not rotated; cos, sin [B, steps, d] and step [1] int64, the row of them to use;
    keys, values [B, K, S, d]; kept, filled [B] int32: entries read in the image segment, and in the text segment before
    this one. index [B, n] int32 or None: the entries read in the image segment are index[b, :kept] instead of 0..kept-1.
    types [B, S] int8 and shares [B, H, 4] float32 (written): attention summed by type of token.
    scores [B, H, S] float32 (written): attention logits minus their log-sum-exp, -inf for what is not read.
    Returns [B, H d].
    """
    batch, n_kv, entries, d = keys.shape
    q, k, v = split_heads(qkv, n_heads, n_kv)
    now = step.expand(batch)
    rows = torch.arange(batch, device=qkv.device)
    c, s = cos[rows, now][:, None], sin[rows, now][:, None]
    q, k = rotate(q, c, s), rotate(k, c, s)
    place = start + filled.long()
    keys[rows, :, place], values[rows, :, place] = k, v

    column = torch.arange(entries, device=qkv.device)
    text = (column >= start) & (column <= place[:, None])
    if index is None:
        image = column < kept[:, None]
    else:
        first = torch.arange(index.shape[1], device=qkv.device) < kept[:, None]
        image = torch.zeros_like(text)
        row, slot = first.nonzero(as_tuple=True)
        image[row, index[row, slot].long()] = True
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).view(batch, n_kv, -1, d)
    logits = (grouped @ keys.to(wide).transpose(-1, -2)) * d**-0.5
    logits = logits.masked_fill(~(image | text)[:, None, None], -torch.inf)
    logits = torch.log_softmax(logits, dim=-1)
    weight = logits.exp()
    out = weight @ values.to(wide).masked_fill(~(image | text)[:, None, :, None], 0.0)
    if shares is not None and types is not None:
        one_hot = F.one_hot(types.long().clamp(min=0), 4).to(wide)
        shares.copy_((weight.flatten(1, 2) @ one_hot).to(shares.dtype))
    if scores is not None:
        scores[:, :, :entries].copy_(logits.flatten(1, 2).to(scores.dtype))
    return out.reshape(batch, -1).to(qkv.dtype)


def classify(shares: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The predictor's choice: shares [B, H, 4], weight [R, 4 H] and bias [R] float32 to the rate's number [B] int64."""
    return F.linear(shares.flatten(1).to(weight.dtype), weight, bias).argmax(-1)
