"""One decode step: functions of a `State` that queue work on the device and wait for nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import masks
from .prefill import image_scores, set_lengths, wanted
from .state import State
from .weights import Weights

if TYPE_CHECKING:
    from .ops import TorchOps


def decode_step(state: State, ops: TorchOps, weights: Weights, n_heads: int, choose: Any) -> None:
    """Read state.token, make the logits of the next one, choose it, and note both in the trace."""
    plan = state.plan
    state.step.add_(1)
    x = weights.embedding.index_select(0, state.token).to(state.logits.dtype)
    for index in range(plan.n_layers):
        w = weights.layers[index]
        keys, values, start, filled = state.entry(index)
        looks: dict[str, Tensor] = {}
        if index == plan.feature:
            looks = {"types": state.entry_types, "shares": state.shares}
            if plan.by_rank == "step" and plan.prunes:
                looks["scores"] = state.scores
        out = ops.decode_attention(
            ops.norm_qkv(x, w), state.cos_step, state.sin_step, state.step, keys, values, state.kept[index], start, filled,
            n_heads, index=state.index if index >= plan.layer else None, **looks,
        )  # fmt: skip
        x = ops.mlp(ops.attention_out(x, out, w), w)
        if index == plan.feature:
            ops.advance(state)
    state.logits.copy_(ops.head(x, weights.norm, weights.eps, weights.head))
    ops.emit(state, choose(state), True)


def advance(state: State) -> None:
    """Let the rule look at the newest row: fewer (or, if reversible, other) image tokens are read from here on."""
    plan = state.plan
    state.seen_shares.index_copy_(0, state.step, state.shares[None])
    if plan.prunes and plan.moves:
        asked = wanted(state, None if state.course is None else state.course.index_select(0, state.step)[0])
        bound = state.n_image if plan.reversible else state.now
        state.now.copy_(torch.minimum(asked.clamp(min=0), bound))
        if plan.own_reads:
            _reorder(state)
        set_lengths(state)
    if plan.own_reads:
        state.seen_reads.index_copy_(0, state.step, state.reads[None])
    state.seen_kept.index_copy_(0, state.step, state.now[None])


def _reorder(state: State) -> None:
    """Which tokens are read: the first `now` of the ranking, or of a new one by the newest row's scores."""
    plan, order = state.plan, state.ranking
    if plan.by_rank == "step":
        scores = image_scores(state)
        if not plan.reversible:
            scores = scores.masked_fill(~state.reads, -torch.inf)
        order = masks.rank_tokens(scores, state.image_index >= 0)
        state.index[:, : order.shape[1]].copy_(torch.gather(state.slot_of, 1, order))
    state.reads.copy_(masks.ranking_to_tokens(masks.prefix_masks(state.now, order.shape[1]), order))


def emit(state: State, token: Tensor | None, grows: bool) -> None:
    """Write the chosen tokens [B] to the reply, those of ended samples as padding, and see who ends with them.

    token: None takes the highest logit. grows: one more entry of text has been filled, in this pass.
    """
    token = state.logits.argmax(-1) if token is None else token
    token = torch.where(state.alive, token, state.pad)
    state.seen_token.index_copy_(0, state.step, token[None])
    state.seen_alive.index_copy_(0, state.step, state.alive[None])
    state.token.copy_(token)
    state.alive.logical_and_((token[:, None] != state.ends).all(-1))
    if grows:
        state.length.add_(1)
        state.text.add_(1)
