"""One teacher-forced pass of a frozen VLM, with masks for what would be discarded: what predictor training differentiates.

Layers below P see every token and need no gradient; from P on dropped image tokens are multiplied away (eq. 6). Autograd
through that formula keeps about ten [B, H, T, T] tensors a layer and reads each several times; on a GPU that traffic is
most of a training step. The backward pass below needs two, and gives the same gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import masks
from .attention import (
    causal_layer,
    image_scores,
    padding_allowed,
    repeat_heads,
    row_attention,
    shares_by_type,
    with_response,
)
from .masks import PAD
from .memory import computed_again
from .models import Adapter, Prompt

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


def _later_layer(adapter: Adapter, index: int, rotary: tuple[Tensor, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    """One layer >= P under a mask, as a function of its input: where all layers' activations do not fit, it is run twice."""
    q, k, v = adapter.project(index, adapter.normed_input(index, x), rotary)
    return adapter.finish(index, x, masked_attention(q, k, v, mask))


@dataclass
class TeacherForced:
    """One teacher-forced pass up to the input of layer P.

    x [B, T + R, D]: hidden states; shares [B, R, H, 4]: features of the rows that predict the R response tokens;
    scores [B, N]: importance of the image tokens; rotary: what the layers >= P turn queries and keys by.
    """

    prompt: Prompt
    x: Tensor
    shares: Tensor
    scores: Tensor
    rotary: tuple[Tensor, Tensor]
    layer: int
    steps: int

    @property
    def ranking(self) -> Tensor:
        """[B, N] int64: FastV's rule, ranked once by the last prompt row."""
        return masks.rank_tokens(self.scores)


@torch.no_grad()
def read_prompt_and_response(adapter: Adapter, prompt: Prompt, response_ids: Tensor, layer: int) -> TeacherForced:
    """Run layers 0..P-1 on prompt and response, unpruned. response_ids: [B, R] int64."""
    steps = response_ids.shape[1]
    x, types, position_ids = with_response(adapter, prompt, response_ids)
    rotary, allowed = adapter.rotary(position_ids, x), padding_allowed(types)
    start, total = prompt.types.shape[1] - 1, types.shape[1]
    for index in range(layer):
        x, q, k, _ = causal_layer(adapter, index, x, rotary, allowed)
    rows = torch.arange(start, start + steps, device=types.device)
    readable = (torch.arange(total, device=types.device) <= rows[:, None]) & (types != PAD)[:, None]
    attention = row_attention(q[:, :, rows], k, readable)
    shares = shares_by_type(attention, types)
    scores = image_scores(attention[:, :, :1], prompt.image_index)
    return TeacherForced(prompt, x, shares, scores, rotary, layer, steps)


def masked_logits(adapter: Adapter, forced: TeacherForced, image_keep: Tensor) -> Tensor:
    """Layers >= P under masks, and the logits of the response: [B, R, vocab].

    image_keep: [B, R, N] over the ranking; row t is the mask of the row that predicts response token t (row 0: every
    prompt row). The row of the last response token predicts nothing here, it repeats the mask before it.
    """
    raster = masks.ranking_to_tokens(image_keep, forced.ranking[:, None])
    raster = torch.cat((raster, raster[:, -1:]), dim=1)
    mask = masks.response_mask(raster, forced.prompt.image_index, forced.prompt.types, forced.steps)
    x = forced.x
    again = mask.requires_grad and computed_again(adapter.info(), x, mask, forced.layer, forced.steps)
    for index in range(forced.layer, adapter.n_layers):
        run = partial(_later_layer, adapter, index, forced.rotary)
        x = checkpoint(run, x, mask, use_reentrant=False) if again else run(x, mask)
    start = forced.prompt.types.shape[1] - 1
    return adapter.logits(x[:, start : start + forced.steps])
