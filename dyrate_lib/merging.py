"""Image tokens in groups: which tokens stand for the others, who joins whom, and how much each then weighs.

Pure tensor functions behind `MergeRate`. Ranks count from 0 over a ranking [B, N] of image tokens, as in `masks`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks

if TYPE_CHECKING:
    from .methods.merge import MergeRate
    from .methods.prune_state import PruneState

APART = 2.0  # taken from a cosine between tokens of different pictures, so that any token of the own picture goes first


def spread_order(scores: Tensor, tokens: Tensor, most: int, spread: float) -> Tensor:
    """A ranking whose first tokens are looked at most and, in between, least like those before them.

    Args:
        scores: [B, N] float, -inf where there is no token; tokens: [B, N, D].
        most: how many are picked one by one; the others follow by their scores.
        spread: share of the picks, in [0, 1], that take the token farthest from all picked so far (by cosine, as DivPrune's
            greedy rule), in turns with those that take the highest score left. Any beginning of the ranking has that share.

    Returns:
        [B, N] int64, a permutation; absent tokens come last. Among equals the earlier goes first.
    """
    present = torch.isfinite(scores)
    batch, n = scores.shape
    order = masks.rank_tokens(scores, present)
    most = min(most, n)
    if not most or not spread:
        return order
    unit, rows = F.normalize(tokens.float(), dim=-1), torch.arange(batch, device=scores.device)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(most, most + n, device=scores.device).expand(batch, n))
    left, gap = present.clone(), torch.full_like(scores, 2.0, dtype=torch.float32)
    for j in range(most):
        far = math.floor((j + 1) * spread + 1e-9) > math.floor(j * spread + 1e-9)
        pick = (gap if far else scores).masked_fill(~left, -torch.inf).argmax(1)
        place[rows, pick] = torch.where(left[rows, pick], j, place[rows, pick])  # a row may have run out of tokens
        left[rows, pick] = False
        gap = torch.minimum(gap, 1.0 - torch.einsum("bnd,bd->bn", unit, unit[rows, pick]))
    return torch.argsort(place, dim=-1)


def owners(tokens: Tensor, ranking: Tensor, kept: Tensor, pictures: Tensor | None = None) -> Tensor:
    """The rank of the kept token that each token joins: the most alike by cosine, of its own picture while there is one.

    tokens [B, N, D]; ranking [B, n], the first n ranks, n >= kept; kept [B] int64; pictures [B, N] int64 (`Prompt.picture_index`)
    or None. Returns [B, N] int64 in raster order: kept tokens own themselves, and where kept is 0 all say 0.
    """
    n = ranking.shape[1]
    unit = F.normalize(tokens.float(), dim=-1)
    chosen = torch.gather(unit, 1, ranking[..., None].expand(-1, -1, unit.shape[-1]))
    alike = unit @ chosen.transpose(1, 2)
    if pictures is not None:
        alike = alike - APART * (pictures[:, :, None] != torch.gather(pictures, 1, ranking)[:, None])
    stays = masks.prefix_masks(kept, n)
    found = alike.masked_fill(~stays[:, None], -torch.inf).argmax(-1)
    itself = torch.arange(n, device=kept.device).expand_as(ranking)
    return found.scatter(1, ranking, torch.where(stays, itself, torch.gather(found, 1, ranking)))


def sizes(owner: Tensor, counted: Tensor, n: int) -> Tensor:
    """What each rank stands for: the sum of `counted` [B, N] (1 a token, 0 where absent) over those it owns: [B, n] float32."""
    return torch.zeros(*owner.shape[:1], n, device=owner.device).scatter_add_(1, owner, counted.float())


def averages(tokens: Tensor, owner: Tensor, present: Tensor, n: int) -> Tensor:
    """The mean of every rank's tokens, [B, n, D] in `tokens`' dtype, summed in float32. Ranks that own none are 0."""
    total = tokens.new_zeros(tokens.shape[0], n, tokens.shape[2], dtype=torch.float32)
    total.scatter_add_(1, owner[..., None].expand_as(tokens), tokens.float() * present[..., None])
    return (total / sizes(owner, present, n).clamp(min=1)[..., None]).to(tokens.dtype)


class Groups:
    """What the kept tokens of one batch stand for in the layers >= P. Both loops that merge hold one, beside the `PruneState`.

    Made when the state has started. tokens: [B, n, D], what each rank's token is as it enters layer P.
    """

    def __init__(self, method: MergeRate, state: PruneState, tokens: Tensor, pictures: Tensor | None) -> None:
        """tokens [B, N, D]: the image tokens as they enter layer P, in raster order; pictures: `Prompt.picture_index`."""
        self.weigh, self.state, self.n = method.weigh, state, state.slots[state.layer]
        ranking = state.ranking[:, : self.n]
        self.tokens = torch.gather(tokens, 1, ranking[..., None].expand(-1, -1, tokens.shape[-1]))
        self._pictures = None if pictures is None else torch.gather(pictures, 1, ranking)
        self._sizes = tokens.new_ones(ranking.shape, dtype=torch.float32)  # at layer P, by rank
        if self.n:
            owner = owners(tokens, ranking, state.kept, pictures)
            self._sizes = sizes(owner, state.present, self.n)
            if method.average:
                self.tokens = averages(tokens, owner, state.present, self.n)
        self._now: tuple[Tensor, Tensor] | None = None

    def sizes(self) -> Tensor:
        """Image tokens that the token in each slot (`masks.tail_order`) stands for now, [B, n] float32; 0 where none is read."""
        kept = self.state.kept
        if self._now is None or self._now[0] is not kept:
            found = self._sizes
            if self.n and self.state.steps:  # of the groups that there were at layer P, those that left join again
                ranks = torch.arange(self.n, device=kept.device).expand(kept.shape[0], -1)
                found = sizes(owners(self.tokens, ranks, kept, self._pictures), found, self.n)
            self._now = (kept, (found * masks.prefix_masks(kept, self.n)).flip(-1))
        return self._now[1]

    def log_sizes(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of each slot's token, [B, n]: log of its size; 0 where the method does not weigh."""
        now = self.sizes()
        return (now.clamp(min=1).log() if self.weigh else torch.zeros_like(now)).to(dtype)

    def select(self, index: Tensor) -> None:
        """Reorder the samples (beam search), as `PruneState.select` does."""
        self.tokens, self._sizes = self.tokens.index_select(0, index), self._sizes.index_select(0, index)
        self._pictures = None if self._pictures is None else self._pictures.index_select(0, index)
        self._now = None
