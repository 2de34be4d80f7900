"""The prompt's pass: layers below P on everything, the choice, then the layers from P on what is kept. Functions of a `State`.

Nothing here waits for the host, so each half may be captured. Between the halves the host learns how many tokens stay, for
that is the shape of the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks
from ..layout import gather_columns
from ..masks import RES
from ..models import Adapter
from .batch import last_rows, tail_rows
from .cache import CHUNK
from .state import State
from .twins import classify
from .weights import LayerWeights, Weights

if TYPE_CHECKING:
    from .ops import TorchOps


def take_in(state: State, adapter: Adapter, weights: Weights) -> None:
    """From `state.packed` (and features, or embeds): embeddings, rotary angles, lengths, and a loop at its start."""
    plan = state.plan
    if not plan.given:
        state.embeds.copy_(F.embedding(state.ids, weights.embedding))
        if plan.places:
            state.embeds.view(-1, state.embeds.shape[-1]).index_copy_(0, state.places, state.features)
    ahead = torch.arange(plan.passes, device=state.token.device).view(1, -1, *[1] * (state.last.ndim - 2))
    for buffers, positions in (
        ((state.cos, state.sin), state.positions),
        ((state.cos_step, state.sin_step), state.last + ahead),
    ):
        for buffer, angles in zip(buffers, adapter.rotary(positions, state.embeds), strict=True):
            buffer.copy_(angles)
    for whole, steps in ((state.cos, state.cos_step), (state.sin, state.sin_step)):
        steps[:, 0].copy_(last_rows(whole, state.lengths))
    state.entry_types.fill_(RES)
    state.entry_types[:, : plan.columns].copy_(torch.where(state.types < 0, RES, state.types))
    state.step.zero_()
    state.alive.fill_(True)
    state.kept.zero_()
    state.length.copy_(state.lengths)
    state.text.copy_(state.lengths - state.n_image)


def prompt_layer(
    ops: TorchOps, w: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor], dest: Tensor,
    n_heads: int, allowed: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One layer over whole prompts: x [B, T, D] to the output [B, T, D], which may be x itself.

    lengths [B]: then the second is q, k and v of each sample's last token before their rotation, [B, (H + 2 K) d].
    """
    batch, length, width = x.shape
    flat = x.view(-1, width)
    qkv = ops.norm_qkv(flat, w).view(batch, length, -1)
    last = None if lengths is None else last_rows(qkv, lengths)  # a copy: qkv may be rotated in place
    q, k, v = ops.rope_store(qkv, cos, sin, *cache, dest, n_heads)
    grouped = k.shape[1] != n_heads
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None, enable_gqa=grouped)
    flat = ops.attention_out(flat, out.transpose(1, 2).reshape(batch * length, -1), w)
    if flat.shape[0] <= CHUNK:
        flat = ops.mlp(flat, w)
    else:
        for part in flat.split(CHUNK):
            new = ops.mlp(part, w)
            if new.data_ptr() != part.data_ptr():
                part.copy_(new)
    return flat.view(batch, length, width), last


def last_layer(
    state: State, ops: TorchOps, w: LayerWeights, index: int, x: Tensor, cos: Tensor, sin: Tensor, dest: Tensor,
    n_heads: int, lengths: Tensor,
) -> Tensor:  # fmt: skip
    """The last layer over prompts x [B, R, D], of which only each sample's last row is asked for: [B, D].

    Keys and values of all rows go to the cache; attention, output projection and MLP are the last row's alone.
    """
    keys, values, start, filled = state.entry(index)
    qkv = ops.norm_qkv(x.view(-1, x.shape[-1]), w).view(*x.shape[:2], -1)
    last = last_rows(qkv, lengths)  # a copy: qkv may be rotated in place
    ops.rope_store(qkv, cos, sin, keys, values, dest, n_heads)
    out = ops.decode_attention(
        last, state.cos_step, state.sin_step, state.step, keys, values, state.kept[index], start, filled - 1, n_heads
    )
    if index == state.plan.feature:
        look(state, ops, last, index, n_heads)
    return ops.mlp(ops.attention_out(last_rows(x, lengths), out, w), w)


def look(state: State, ops: TorchOps, last: Tensor, layer: int, n_heads: int) -> None:
    """Shares and scores of the last prompt token at `layer`, whose keys are in the cache: to state.shares and .scores.

    last: [B, (H + 2 K) d], its q, k and v, not rotated.
    """
    keys, values, start, _ = state.entry(layer)
    before = (state.lengths - 1).int()
    ops.decode_attention(
        last, state.cos_step, state.sin_step, state.step, keys, values, state.kept[layer], start, before, n_heads,
        types=state.entry_types, shares=state.shares, scores=state.scores,
    )  # fmt: skip


def image_scores(state: State) -> Tensor:
    """Head-mean attention over the image tokens, from state.scores: [B, N] float32, -inf where absent."""
    columns = state.image_index.clamp(min=0)[:, None].expand(-1, state.scores.shape[1], -1)
    scores = torch.gather(state.scores, 2, columns).exp().mean(1)
    return scores.masked_fill(state.image_index < 0, -torch.inf)


def head(state: State, ops: TorchOps, adapter: Adapter, weights: Weights, n_heads: int) -> None:
    """Layers below P, and the choice where tokens are ranked by attention; without pruning, the logits too."""
    plan = state.plan
    take_in(state, adapter, weights)
    x = state.embeds
    for index in range(plan.layer if plan.prunes else plan.n_layers - 1):
        x, last = prompt_layer(
            ops, weights.layers[index], x, state.cos, state.sin, state.low[index], state.entries, n_heads,
            lengths=state.lengths if index == plan.feature else None,
        )  # fmt: skip
        if last is not None:
            look(state, ops, last, index, n_heads)
    if not plan.prunes:
        end = plan.n_layers - 1
        x = last_layer(
            state, ops, weights.layers[end], end, x, state.cos, state.sin, state.entries, n_heads, state.lengths
        )
        _logits(state, ops, weights, x)
    elif x.data_ptr() != state.embeds.data_ptr():
        state.embeds.copy_(x)
    if not plan.prunes:
        decide(state, torch.arange(plan.images, device=x.device).expand(plan.batch, -1))
    elif plan.ranked:
        decide(state, masks.rank_tokens(image_scores(state)))
        needs(state)


def decide(state: State, ranking: Tensor) -> None:
    """How many tokens the rule keeps for the prompt, by a ranking [B, N] with absent tokens last."""
    plan = state.plan
    state.ranking.copy_(ranking)
    asked = wanted(state, None if state.course is None else state.course[0])
    state.now.copy_(torch.minimum(asked.clamp(min=0), state.n_image))
    set_lengths(state)
    state.seen_kept[0].copy_(state.now)
    state.seen_shares[0].copy_(state.shares)
    if state.reads is not None:
        n = ranking.shape[1]
        places = torch.arange(n, device=ranking.device).expand_as(ranking)
        first = places < state.now[:, None]
        state.reads.copy_(torch.zeros_like(first).scatter(1, ranking, first))
        state.seen_reads[0].copy_(state.reads)
        if plan.by_rank == "step":
            state.slot_of.copy_(torch.zeros_like(ranking).scatter(1, ranking, places))
            state.index[:, :n].copy_(places)


def needs(state: State) -> None:
    """To state.need, of every layer from P on: the most image tokens that a sample has in it, the most rows, and whether it gets
    other tokens than the layer before (0 or 1)."""
    plan = state.plan
    carried = state.n_image.expand(plan.n_layers, -1) if plan.reversible else state.kept.long()
    if plan.capped:
        state.need[0].copy_(carried.amax(-1)[plan.layer :])
        state.need[1].copy_((carried + state.text).amax(-1)[plan.layer :])
        state.need[2].copy_((carried != carried.roll(1, 0)).any(-1)[plan.layer :])
    else:  # one count for all these layers
        state.need[0].copy_(carried[plan.layer].amax())
        state.need[1].copy_((carried[plan.layer] + state.text).amax())
        state.need[2].zero_()


def wanted(state: State, course: Tensor | None) -> Tensor:
    """How many tokens [B] the rule asks for: `course`, the pass's row of it, or where there is none the predictor's choice."""
    if state.classifier is not None:
        state.rate.copy_(classify(state.shares, *state.classifier))
    return state.n_image - (state.n_image * state.rate) // state.plan.n_rates if course is None else course


def set_lengths(state: State) -> None:
    """state.kept of the layers from P on from state.now and the caps."""
    plan = state.plan
    if not plan.prunes:
        return
    if state.caps is None:
        state.kept[plan.layer :].copy_(state.now.expand(plan.n_layers - plan.layer, -1))
    else:
        state.kept[plan.layer :].copy_(torch.minimum(state.now, state.caps[plan.layer :]))


def tail(state: State, ops: TorchOps, weights: Weights, n_heads: int, rows: list[int], cuts: list[bool]) -> None:
    """Layers from P on over what is kept. Leaves the logits.

    rows: the longest sequence that each of them gets; cuts: whether it gets other tokens than the layer before.
    """
    plan, x, dest = state.plan, state.embeds, state.entries
    columns: Tensor | None = None
    cos, sin, allowed = state.cos, state.sin, None
    for index in range(plan.layer, plan.n_layers):
        at = index - plan.layer
        slots = state.shapes[at].slots
        if cuts[at]:
            carried = state.n_image if plan.reversible else state.kept[index]
            fresh, dest = tail_rows(state.types, state.image_index, state.ranking, carried, slots, rows[at])
            x = gather_columns(x, fresh if columns is None else _places(columns, fresh, plan.columns))
            columns = fresh
            cos, sin = gather_columns(state.cos, columns), gather_columns(state.sin, columns)
            allowed = _readable(dest, state.now, slots) if plan.reversible else None
        if index == plan.n_layers - 1:
            lengths = carried + state.lengths - state.n_image
            x = last_layer(state, ops, weights.layers[index], index, x, cos, sin, dest, n_heads, lengths)
            break
        x, _ = prompt_layer(ops, weights.layers[index], x, cos, sin, state.tail[at], dest, n_heads, allowed)
    _logits(state, ops, weights, x)


def _places(columns: Tensor, wanted: Tensor, length: int) -> Tensor:
    """Where the prompt's columns `wanted` [B, R] stand among `columns` [B, S]: [B, R]."""
    places = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
    inverse = columns.new_zeros(columns.shape[0], length).scatter(1, columns, places)
    return torch.gather(inverse, 1, wanted)


def _readable(dest: Tensor, now: Tensor, slots: int) -> Tensor:
    """Where all tokens are carried but only `now` of them read: dest [B, R] entries to the mask [B, 1, R, R] bool."""
    rows = dest.shape[1]
    reads = (dest >= slots) | ((dest >= 0) & (dest < now[:, None]))
    causal = torch.ones(rows, rows, dtype=torch.bool, device=dest.device).tril()
    eye = torch.eye(rows, dtype=torch.bool, device=dest.device)
    return ((causal & reads[:, None]) | eye)[:, None]


def _logits(state: State, ops: TorchOps, weights: Weights, x: Tensor) -> None:
    """x [B, D] to state.logits."""
    state.logits.copy_(ops.head(x, weights.norm, weights.eps, weights.head))
