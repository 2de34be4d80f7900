"""RelookRate: ours, not the paper's. Dropping that can be taken back, ranked by several rows, with counts that differ by layer.

DyRate ranks the image tokens once, by the last prompt token, and what it drops stays dropped. Where a reply needs the picture
late, neither holds. Three parts of this are known from elsewhere: ranking by a window of query rows (Li et al., "SnapKV",
arXiv 2404.14469; theirs are prompt rows, these the newest), budgets that fall or rise with depth (Cai et al., "PyramidKV", arXiv
2406.02069), and keeping what is not read (Tang et al., "Quest", arXiv 2406.10774). The rate is DyRate's predictor, a control's,
or a schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError, check_whole
from .base import Method
from .ruled import Ruled

POOLS = ("mean", "max")


def check_tilt(owner: Method, tilt: float) -> None:
    """Refuse a `tilt` (`tilted`) that is no number from -1 to 1. Raises InputError."""
    if isinstance(tilt, bool) or not isinstance(tilt, Real) or not math.fabs(tilt) <= 1:
        raise InputError(f"{type(owner).__name__}: tilt={tilt!r} must be a number from -1 to 1.")


def tilted(kept: Tensor, n_image: Tensor, tilt: float, layer: int, first: int, n_layers: int) -> Tensor:
    """What layer `layer` of first..n_layers-1 reads where they read `kept` [B] int64 of n_image each on average: [B] int64."""
    if not tilt or n_layers - first < 2:
        return kept
    lean = tilt * (1 - 2 * (layer - first) / (n_layers - 1 - first))
    return kept + torch.round(lean * torch.minimum(kept, n_image - kept).double()).long()


@dataclass
class RelookRate(Ruled):
    """At each step read the k tokens that the newest rows look at most, of all N; k by a predictor or a schedule.

    predictor: a `RatePredictor` or its path, as in `DyRate` (best trained with reversible=True); or rates: a schedule as in
    `RatePath`. One of the two. layer: P; None takes the predictor's own, 3 for a schedule.
    window, pool: importance [N] is the "mean" or "max", over the newest `window` query rows (the last prompt row and those of the
    reply), of head-mean attention at layer P - 1. window=1 is `DyRate(rank="step", reversible=True)`.
    tilt: of the count over the layers from P on, in [-1, 1]. A layer reads k + round(tilt (1 - 2 u) min(k, N - k)) tokens, u = 0
    at layer P to 1 at the last: above 0 the first read more and the deepest fewer, below 0 the reverse. Over the layers it
    adds up to k each, and k = 0 or N is so everywhere.

    Nothing is dropped for good: the prompt is read in full, keys and values stay, and what is read falls, or rises again.

    Raises:
        InputError: settings out of range, not one of predictor and rates, or a predictor that `DyRate` refuses.
    """

    window: int = 4
    pool: str = "mean"
    tilt: float = 0.0
    name: ClassVar[str] = "relook"
    _tail: tuple[int, int] = field(default=(0, 1), init=False, repr=False, compare=False)  # P, L
    rank = "step"
    reversible = True

    def __post_init__(self) -> None:
        check_whole("RelookRate: window", self.window, 1)
        if self.pool not in POOLS:
            raise InputError(f"RelookRate: pool={self.pool!r} must be one of {', '.join(POOLS)}.")
        check_tilt(self, self.tilt)
        super().__post_init__()

    def prepare(self, n_layers: int, n_heads: int, device: torch.device) -> int:
        self._tail = (super().prepare(n_layers, n_heads, device), n_layers)
        return self._tail[0]

    def pooled(self, rows: Tensor) -> Tensor:
        return rows.mean(0) if self.pool == "mean" else rows.amax(0)

    def at_layer(self, layer: int, kept: Tensor, n_image: Tensor) -> Tensor:
        return tilted(kept, n_image, self.tilt, layer, *self._tail)
