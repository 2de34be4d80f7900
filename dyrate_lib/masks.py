"""Rates, nested masks, their selection, and the attention masks made of them: pure functions on tensors (eqs. 1-6).

Words as everywhere: N image tokens, `n_rates` discrete rates, `ranking` the image tokens from the most to the least
important, `kept` how many of the ranking's first tokens remain. Types of tokens by position are SYS, IMG, INS, RES.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError

PAD, SYS, IMG, INS, RES = -1, 0, 1, 2, 3
TYPE_NAMES = ("sys", "img", "ins", "res")


def rates(n_rates: int) -> Tensor:
    """The rates r_k = (k - 1) / n_rates, k = 1..n_rates (eq. 1): [n_rates] float32; r_1 = 0 keeps all."""
    if n_rates < 1:
        raise InputError(f"n_rates must be at least 1, got {n_rates}.")
    return torch.arange(n_rates, dtype=torch.float32) / n_rates


def kept_counts(n_image: Tensor, n_rates: int) -> Tensor:
    """Tokens kept at each rate: N - floor(r_k N), in exact integer arithmetic. [..] int64 to [.., n_rates] int64."""
    k = torch.arange(n_rates, device=n_image.device)
    return n_image[..., None] - (n_image[..., None] * k) // n_rates


def rank_tokens(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Image tokens from the most to the least important: [.., N] scores to [.., N] int64 indices.

    Equal scores keep their order. Tokens that are not `valid` ([.., N] bool) come last.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    return torch.argsort(scores, dim=-1, descending=True, stable=True)


def prefix_masks(kept: Tensor, n: int) -> Tensor:
    """Masks over the ranking that keep its first `kept` tokens (eq. 3, in the reading of r_1 = 0 keeps all).

    [..] int64 to [.., n] bool. As kept falls the masks are nested.
    """
    return torch.arange(n, device=kept.device) < kept[..., None]


def ranking_to_tokens(mask: Tensor, ranking: Tensor) -> Tensor:
    """A mask over the ranking ([.., N]) as a mask over the image tokens in raster order. Differentiable in `mask`."""
    index = ranking.expand(mask.shape)
    return torch.zeros_like(mask).scatter(-1, index, mask)


def gumbel_one_hot(logits: Tensor, tau: float, generator: torch.Generator | None = None) -> Tensor:
    """Straight-through Gumbel-softmax (eq. 4): one-hot forward, soft gradient. [.., n_rates] to [.., n_rates].

    Sampled with `generator` so that training is reproducible; torch's own function takes none.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float32)
    noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    soft = torch.softmax((logits.float() + noise) / tau, dim=-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard + soft - soft.detach()


def select_masks(one_hot: Tensor, rate_masks: Tensor, reversible: bool = False) -> Tensor:
    """m = sum_k y_k m^k (eq. 5), made final over steps unless `reversible`: m_t = m_{t-1} * sum_k y_{t,k} m^k.

    one_hot: [B, steps, n_rates]; rate_masks: [B, n_rates, N] float. Returns [B, steps, N], monotone falling in steps if final.
    """
    selected = one_hot @ rate_masks.to(one_hot.dtype)
    return selected if reversible else torch.cumprod(selected, dim=1)


def running_rate_distribution(probabilities: Tensor) -> Tensor:
    """Distribution of the highest rate drawn so far, when each step draws independently from its own distribution.

    probabilities: [B, steps, n_rates] rows summing to 1. Returns the same shape. Since discarding is final, this is what
    the expected FLOPs of a step depend on: the product over steps of the cumulative distributions, differenced.
    """
    cumulative = probabilities.cumsum(-1).clamp(max=1.0).cumprod(dim=1)
    return torch.diff(cumulative, dim=-1, prepend=torch.zeros_like(cumulative[..., :1]))


def response_mask(image_keep: Tensor, image_index: Tensor, types: Tensor, steps: int) -> Tensor:
    """The multiplicative mask of eq. 6 on top of the causal one, for a prompt and its response in one pass.

    image_keep: [B, steps + 1, N] in raster order, row 0 for every prompt row, row t for response row t (1..steps).
    image_index: [B, N] columns (-1 absent); types: [B, T] of the prompt. Returns [B, T + steps, T + steps]: column j of
    row i is 1 where i may read j; dropped image columns are 0 for all but their own row (the diagonal), padding columns 0.
    Differentiable in `image_keep`.
    """
    batch, prompt = types.shape
    total = prompt + steps
    device = types.device
    base = torch.ones(batch, steps + 1, total, device=device, dtype=image_keep.dtype)
    base[:, :, :prompt] = (types != PAD).to(base.dtype)[:, None]
    present = (image_index >= 0)[:, None]
    columns = image_index.clamp(min=0)[:, None].expand_as(image_keep)
    # absent image slots point at column 0: give them that column's own value so that the write changes nothing
    values = torch.where(present, image_keep, base[:, :, :1])
    rows = base.scatter(-1, columns, values)
    rows = torch.cat((rows[:, :1].expand(-1, prompt, -1), rows[:, 1:]), dim=1)
    eye = torch.eye(total, dtype=torch.bool, device=device)
    rows = torch.where(eye, torch.ones((), dtype=rows.dtype, device=device), rows)
    return rows * torch.ones(total, total, dtype=rows.dtype, device=device).tril()


def tail_order(types: Tensor, image_index: Tensor, ranking: Tensor, n_slots: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of the layers >= P lie: `n_slots` image tokens from the least to the most important, then the text.

    Lowest rank first means that dropping more tokens later only moves the start of what is read: a length, not a copy.
    types [B, T], image_index [B, N], ranking [B, N]. Returns columns [B, n_slots + text] int64 (into T) and the same
    shape bool: True where the slot holds a token of that row. Text is right-aligned, so the last slot is the last token.

    The reply starts from the last token's row, whatever is kept. So an image token at the end has the last slot besides its
    own, as a row that reads and that nobody else reads (False): what it tells others, it tells from its own slot, if kept.
    """
    text = (types != IMG) & (types != PAD)
    carried = text.clone()
    carried[:, -1] = True
    n_text = int(carried.sum(-1).max())
    text_columns = torch.argsort(carried.long(), dim=-1, stable=True)[:, text.shape[1] - n_text :]
    text_valid = torch.gather(text, 1, text_columns)
    image = torch.gather(image_index, 1, ranking[:, :n_slots].flip(-1)) if n_slots else image_index[:, :0]
    columns = torch.cat((image.clamp(min=0), text_columns), dim=1)
    return columns, torch.cat((image >= 0, text_valid), dim=1)


def slot_reads(reads: Tensor, ranking: Tensor, n_slots: int) -> Tensor:
    """[B, N] bool over image tokens in raster order, as [B, n_slots] over the slots of `tail_order`."""
    return torch.gather(reads, 1, ranking[:, :n_slots].flip(-1))


def causal_allowed(positions: Tensor, readable: Tensor) -> Tensor:
    """Which slot may read which: [B, S] positions and [B, S] bool to [B, 1, S, S] bool.

    A slot reads readable slots at positions before its own, and always itself (eq. 6), so that no row is empty and none reads
    its own token twice (`tail_order`).
    """
    allowed = (positions[:, None, :] < positions[:, :, None]) & readable[:, None, :]
    eye = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device)
    return (allowed | eye)[:, None]
