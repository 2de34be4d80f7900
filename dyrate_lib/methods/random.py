"""Random pruning: FastV's budget with tokens drawn at random. The control every learned or scored method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import masks
from ..errors import check_whole
from .base import Method, PrefillView, check_rate, round_kept


@dataclass
class RandomPrune(Method):
    """Keep round(N (1 - rate)) image tokens from layer `layer` on, drawn uniformly.

    The draw depends on `seed` and on the sample's own content, so a sample gets the same tokens alone and in any batch,
    while different pictures get different ones.
    """

    layer: int = 2
    rate: float = 0.5
    seed: int = 0
    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        check_rate(self, self.rate)
        check_whole("RandomPrune: seed", self.seed)

    def order(self, view: PrefillView) -> Tensor:
        rows = []
        for key in view.content_key.tolist():
            generator = torch.Generator().manual_seed((key * 1000003 + self.seed) % 2**63)
            rows.append(torch.rand(view.scores.shape[1], generator=generator))
        scores = torch.stack(rows).to(view.scores.device) if rows else view.scores
        return masks.rank_tokens(scores, view.scores > -torch.inf)

    def prefill(self, view: PrefillView) -> Tensor:
        return round_kept(view.n_image, self.rate)
