"""What a step does beside the model, in two small Triton kernels: the predictor and the lengths, and the end of the step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .state import MOST_ENDS, State


@triton.jit
def _advance(
    shares, weight, bias, course, caps, step, n_image, rate, now, kept, seen_kept, seen_shares,
    batch, layer, n_layers,
    FEATURES: tl.constexpr, WIDTH: tl.constexpr, RATES: tl.constexpr, ROWS: tl.constexpr, LAYERS: tl.constexpr,
    MOVES: tl.constexpr, CLASSIFIES: tl.constexpr, TABLE: tl.constexpr, CAPPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sample = tl.program_id(0)
    t = tl.load(step)
    at = tl.arange(0, WIDTH)
    mask = at < FEATURES
    value = tl.load(shares + sample * FEATURES + at, mask=mask, other=0.0)
    tl.store(seen_shares + (t * batch + sample) * FEATURES + at, value, mask=mask)
    count = tl.load(now + sample)
    if MOVES:
        wanted = count
        if CLASSIFIES:
            row = tl.arange(0, ROWS)
            real = row < RATES
            w = tl.load(weight + row[:, None] * FEATURES + at[None, :], mask=real[:, None] & mask[None, :], other=0.0)
            score = tl.sum(w * value[None, :], 1) + tl.load(bias + row, mask=real, other=0.0)
            chosen = tl.argmax(tl.where(real, score, -float("inf")), 0).to(tl.int64)
            tl.store(rate + sample, chosen)
            images = tl.load(n_image + sample)
            wanted = images - (images * chosen) // RATES
        if TABLE:
            wanted = tl.load(course + t * batch + sample)
        count = tl.minimum(tl.maximum(wanted, 0), count)
        tl.store(now + sample, count)
        index = tl.arange(0, LAYERS)
        deep = (index >= layer) & (index < n_layers)
        reads = tl.zeros([LAYERS], tl.int64) + count
        if CAPPED:
            reads = tl.minimum(reads, tl.load(caps + index * batch + sample, mask=deep, other=0))
        tl.store(kept + index * batch + sample, reads.to(tl.int32), mask=deep)
    tl.store(seen_kept + t * batch + sample, count)


def advance(state: State, early: bool = False) -> None:
    """As `step.advance`, for plans whose reads are a prefix of the first ranking."""
    plan, shares = state.plan, state.shares
    batch, features = shares.shape[0], shares.shape[1] * 4
    classifies = state.classifier is not None and plan.prunes
    weight, bias = state.classifier if classifies else (shares, shares)  # type: ignore[misc]
    _advance[(batch,)](
        shares, weight, bias, state.course if plan.table else state.now, state.caps if plan.capped else state.now, state.step,
        state.n_image, state.rate, state.now, state.kept, state.seen_kept, state.seen_shares, batch, plan.layer, plan.n_layers,
        FEATURES=features, WIDTH=triton.next_power_of_2(features), RATES=max(plan.n_rates, 1),
        ROWS=triton.next_power_of_2(max(plan.n_rates, 1)), LAYERS=triton.next_power_of_2(plan.n_layers),
        MOVES=plan.moves and plan.prunes, CLASSIFIES=classifies, TABLE=plan.table, CAPPED=plan.capped, EARLY=early,
        num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


@triton.jit
def _emit(
    logits, chosen, token, alive, ends, pad, step, seen_token, seen_alive, length, text, batch,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, ENDS: tl.constexpr, GREEDY: tl.constexpr, GROWS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    t = tl.load(step)
    if GREEDY:
        at = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], -float("inf"), tl.float32)
        place = tl.zeros([BLOCK], tl.int32)
        for base in range(0, VOCAB, BLOCK):
            value = tl.load(
                logits + sample.to(tl.int64) * VOCAB + base + at, mask=base + at < VOCAB, other=-float("inf")
            ).to(tl.float32)
            place = tl.where(value > best, base + at, place)  # of equal ones the first
            best = tl.maximum(best, value)
        top = tl.max(best, 0)
        next_token = tl.min(tl.where(best == top, place, VOCAB), 0).to(tl.int64)
    else:
        next_token = tl.load(chosen + sample)
    lives = tl.load(alive + sample) != 0
    next_token = tl.where(lives, next_token, tl.load(pad))
    tl.store(seen_token + t * batch + sample, next_token)
    tl.store(seen_alive + t * batch + sample, lives.to(tl.uint8))
    tl.store(token + sample, next_token)
    end = tl.load(ends + tl.arange(0, ENDS))
    over = tl.max((end == next_token).to(tl.int32), 0)
    tl.store(alive + sample, (lives & (over == 0)).to(tl.uint8))
    if GROWS:
        tl.store(length + sample, tl.load(length + sample) + 1)
        tl.store(text + sample, tl.load(text + sample) + 1)


def emit(state: State, chosen: Tensor | None, grows: bool) -> None:
    """As `step.emit`; chosen [B] None takes the highest logit. grows: one more entry of text is filled."""
    logits = state.logits
    batch, vocab = logits.shape
    _emit[(batch,)](
        logits, state.token if chosen is None else chosen, state.token, state.alive.view(torch.uint8), state.ends, state.pad,
        state.step, state.seen_token, state.seen_alive.view(torch.uint8), state.length, state.text, batch,
        VOCAB=vocab, BLOCK=min(8192, triton.next_power_of_2(vocab)), ENDS=MOST_ENDS, GREEDY=chosen is None, GROWS=grows,
        num_warps=16,
    )  # fmt: skip
