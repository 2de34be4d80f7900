"""The query row's attention and its shares by token type, and scaled dot-product attention as the loop uses it.

Full attention maps are never made on the generation path: the one row needed is computed apart, so any kernel may do
the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .masks import INS, PAD, RES

if TYPE_CHECKING:
    from .models import Adapter


def repeat_heads(x: Tensor, n_heads: int) -> Tensor:
    """[B, kv_heads, T, d] to [B, n_heads, T, d] for grouped-query attention."""
    return x if x.shape[1] == n_heads else x.repeat_interleave(n_heads // x.shape[1], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention of q [B, H, R, d] over k, v [B, H or kv, T, d]: [B, H, R, d].

    allowed: bool, broadcastable to [B, H, R, T], True where a row reads a column, or `additive`; None reads all (or causally).
    """
    one = q.shape[2] == 1 and q.dtype == torch.float32 and q.device.type == "cuda"
    if one and not causal and not torch.is_grad_enabled():
        return attend_one_row(q, k, v, allowed)
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal)


def attend_one_row(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """`attend` for one query row, q [B, H, 1, d], by two products and a softmax.

    torch's float32 kernels on a GPU work on 64 query rows whatever there are, which at one row is mostly waste: 250 rows of six
    heads over 640 keys take an H200 0.43 ms by them and 0.11 ms by these products, which read keys and values once (floor 0.06).
    On a CPU there is no such difference.
    """
    batch, heads, _, width = q.shape
    shared = q.reshape(batch, k.shape[1], heads // k.shape[1], width)  # rows that read the same keys
    scores = (shared * width**-0.5) @ k.transpose(-1, -2)
    if allowed is not None:
        if allowed.ndim == 4 and allowed.shape[1] == heads != k.shape[1]:  # a mask a head
            allowed = allowed.reshape(batch, *shared.shape[1:3], -1)
        scores = scores.masked_fill(~allowed, -torch.inf) if allowed.dtype == torch.bool else scores + allowed
    return (torch.softmax(scores, dim=-1) @ v).reshape(batch, heads, 1, width)


def additive(allowed: Tensor, q: Tensor) -> Tensor:
    """A bool mask as `attend` takes it best: on a CPU the floats (0, -inf) that every layer would make of it, in q's dtype."""
    if q.device.type != "cpu":
        return allowed
    return q.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)


def row_attention(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax attention of a few query rows, in float32.

    q: [B, H, R, d] rotated queries; k: [B, H or kv, T, d] rotated keys; allowed: bool [B, T] or [B, R, T], None is all.
    Returns [B, H, R, T] float32, each row summing to 1.
    """
    k = repeat_heads(k, q.shape[1])
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    if allowed is None:
        return torch.softmax(scores, dim=-1)
    allowed = allowed[:, None, None] if allowed.ndim == 2 else allowed[:, None]
    return torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)


def shares_by_type(attention: Tensor, types: Tensor) -> Tensor:
    """Sum of a row's attention over each of the four token types: v_t of `method.md`, step 1.

    attention: [B, H, R, T] float32; types: [B, T]. Returns [B, R, H, 4] (sys, img, ins, res), each summing to 1.
    """
    return shares_of(attention, type_columns(types))


def type_columns(types: Tensor) -> Tensor:
    """[B, T] types to [B, T, 4] float32: 1 in the column of its type, padding in none."""
    return F.one_hot(types.clamp(min=0), 4).float() * (types != PAD)[..., None]


def shares_of(attention: Tensor, columns: Tensor) -> Tensor:
    """`shares_by_type` with the `type_columns` of the types."""
    return torch.einsum("bhrt,btc->brhc", attention, columns)


def image_scores(attention: Tensor, image_index: Tensor) -> Tensor:
    """FastV's importance: head-mean attention of one row over the image tokens.

    attention: [B, H, 1, T]; image_index: [B, N] columns, -1 absent. Returns [B, N] float32, absent tokens -inf.
    """
    row = attention[:, :, -1].mean(1)
    scores = torch.gather(row, 1, image_index.clamp(min=0))
    return scores.masked_fill(image_index < 0, -torch.inf)


ROWS = 64  # of a prompt's text whose attention is held at once


def text_scores(q: Tensor, k: Tensor, types: Tensor, image_index: Tensor) -> Tensor:
    """What the prompt's text after the picture looks at: the largest weight over heads, averaged over the text's rows.

    q, k: [B, H or kv, T, d] of the whole prompt, rotated; types [B, T]; image_index [B, N] columns, -1 absent. A prompt without
    text after its picture is rated by its last row. Returns [B, N] float32, absent tokens -inf.
    """
    asks, real, place = types == INS, types != PAD, torch.arange(types.shape[1], device=types.device)
    asks = asks | (~asks.any(-1, keepdim=True) & (place == types.shape[1] - 1))
    columns = torch.argsort(asks.long(), dim=-1, stable=True)[:, types.shape[1] - int(asks.sum(-1).max()) :]
    counted, total = torch.gather(asks, 1, columns), torch.zeros(types.shape, device=types.device)
    for some, real_rows in zip(columns.split(ROWS, 1), counted.split(ROWS, 1), strict=True):
        rows = torch.gather(q, 2, some[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        allowed = (place <= some[..., None]) & (real[:, None] | (place == some[..., None]))  # no row is empty
        total += (row_attention(rows, k, allowed).amax(1) * real_rows[..., None]).sum(1)
    mean = total / counted.sum(1, keepdim=True)
    return torch.gather(mean, 1, image_index.clamp(min=0)).masked_fill(image_index < 0, -torch.inf)


def causal_layer(
    adapter: Adapter, index: int, x: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One unpruned decoder layer over a whole sequence: (output [B, T, D], q, k, v). `allowed` None means plain causal."""
    q, k, v = adapter.project(index, adapter.normed_input(index, x), rotary)
    out = adapter.finish(index, x, attend(q, k, v, allowed, causal=allowed is None))
    return out, q, k, v


def padding_allowed(types: Tensor) -> Tensor | None:
    """The causal mask with padding columns closed, [B, 1, T, T] bool, or None where nothing is padded."""
    real = types != PAD
    if bool(real.all()):
        return None
    length = types.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=types.device).tril()
    eye = torch.eye(length, dtype=torch.bool, device=types.device)
    return ((causal & real[:, None, :]) | eye)[:, None]


def with_response(adapter: Adapter, prompt: Any, response_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt and its response as one sequence: embeds [B, T + R, D], types and position_ids [B, T + R]."""
    steps = response_ids.shape[1]
    embeds = torch.cat((prompt.embeds, adapter.embed_tokens(response_ids).to(prompt.embeds.dtype)), dim=1)
    types = torch.cat((prompt.types, torch.full_like(response_ids, RES)), dim=1)
    steps_on = torch.arange(1, steps + 1, device=response_ids.device)
    after = prompt.last_position + steps_on.view(1, -1, *[1] * (prompt.position_ids.ndim - 2))
    return embeds, types, torch.cat((prompt.position_ids, after), dim=1)


@torch.no_grad()
def attention_shares(model: Any, inputs: Any, response_ids: Tensor, layers: list[int] | None = None) -> Tensor:
    """Attention shares of the unpruned model at every layer and iteration (Figs. 1 and 2), teacher-forced.

    inputs: as for `generate`; response_ids: [B, R] int64 (the model's own reply, or a reference).
    Returns float32 [B, layers, R, H, 4]: at iteration t the query row is the last prompt token (t = 0) or response
    token t - 1, i.e. the row that predicts response token t. Shares are of sys, img, ins, res and sum to 1.

    Raises:
        InputError: a layer out of range, none, responses of another batch size, or more than the model's context holds.
    """
    from .layout import check_inputs
    from .models import Adapter

    adapter = Adapter(model)
    wanted = list(range(adapter.n_layers)) if layers is None else list(layers)
    if not wanted or any(not 0 <= layer < adapter.n_layers for layer in wanted):
        raise InputError(f"Layers {wanted} must be at least one, all in 0..{adapter.n_layers - 1}.")
    check_inputs(inputs)
    rows, length = inputs["input_ids"].shape
    if response_ids.ndim != 2 or response_ids.shape[0] != rows:
        raise InputError(f"response_ids must be [batch, tokens] for the same batch, got {tuple(response_ids.shape)}.")
    if length + response_ids.shape[1] > adapter.max_length:
        raise InputError(
            f"Prompt ({length} tokens) and response ({response_ids.shape[1]}) exceed the model's context of "
            f"{adapter.max_length}: shorten one of them."
        )
    prompt = adapter.embed(inputs)
    start, steps = prompt.types.shape[1] - 1, response_ids.shape[1]
    x, types, position_ids = with_response(adapter, prompt, response_ids)
    rotary, allowed = adapter.rotary(position_ids, x), padding_allowed(types)
    total = types.shape[1]
    rows = torch.arange(start, start + steps, device=types.device)
    readable = (torch.arange(total, device=types.device) <= rows[:, None]) & (types != PAD)[:, None]
    out = []
    for index in range(max(wanted) + 1):
        x, q, k, _ = causal_layer(adapter, index, x, rotary, allowed)
        if index in wanted:
            out.append((index, shares_by_type(row_attention(q[:, :, rows], k, readable), types)))
    found = dict(out)
    return torch.stack([found[index] for index in wanted], dim=1)
