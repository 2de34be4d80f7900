"""Fixed schedules: a rate for every step (to replay or to force a path), and a rate for every depth (Table IVb's DP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from .base import Method, PrefillView, StepView, check_rate, round_kept


@dataclass
class RatePath(Method):
    """Remove floor(rate_t N) tokens at step t; after the last given rate it stays as it is.

    layer: P. rates: one number a step for all samples, or one such sequence a sample.
    Discarding is final unless `reversible`; rank as in `DyRate`.
    """

    layer: int = 3
    rates: Sequence = (0.0,)
    rank: str = "prefill"
    reversible: bool = False
    name: ClassVar[str] = "path"

    def __post_init__(self) -> None:
        if self.rank not in ("prefill", "step"):
            raise InputError(f"RatePath: rank={self.rank!r} must be 'prefill' or 'step'.")
        try:
            listed = not isinstance(self.rates, str | bytes | Mapping)  # these would be read letter by letter, or by their keys
            rows = self._rows() if listed and len(self.rates) else []
        except InputError:
            raise
        except (TypeError, ValueError, LookupError):
            listed = False
        if not listed:
            raise InputError(
                f"RatePath: rates={self.rates!r} must be a list of numbers from 0 to 1, one a step, or one such list a sample."
            )
        if not rows:
            raise InputError("RatePath: give at least one rate.")
        for row in rows:
            for rate in row:
                check_rate(self, rate)

    def _rows(self) -> list[list[float]]:
        nested = isinstance(self.rates[0], Sequence | Tensor) and not isinstance(self.rates[0], float)
        rows = [list(map(float, row)) for row in self.rates] if nested else [list(map(float, self.rates))]
        if any(len(row) == 0 for row in rows):
            raise InputError("RatePath: a sample has no rate; give each at least one.")
        return rows

    def check_rows(self, rows: int) -> None:
        given = len(self._rows())
        if given not in (1, rows):
            raise InputError(
                f"RatePath has rates for {given} samples, the batch holds {rows}: give one list a sample, or one for all."
            )

    def _kept(self, step: int, n_image: Tensor) -> Tensor:
        rows = self._rows()
        self.check_rows(n_image.shape[0])
        now = torch.tensor([row[min(step, len(row) - 1)] for row in rows], dtype=torch.float64, device=n_image.device)
        # 1e-9: a rate such as 0.3 is stored a hair low or high, floor must not lose or gain a token by it
        return n_image - torch.floor(now * n_image + 1e-9).long()

    def prefill(self, view: PrefillView) -> Tensor:
        return self._kept(0, view.n_image)

    def step(self, view: StepView) -> Tensor:
        return self._kept(view.step, view.n_image)


@dataclass
class DepthPrune(Method):
    """Depth-based pruning: the deeper the layer the fewer image tokens, the same at every step (Table IVb, "DP").

    rates: first layer -> share removed from that layer on; the first one is P. The paper's formula uses its step
    function twice and leaves R' undefined, so this is a reading of it: see DEVIATIONS.md.
    """

    rates: Mapping[int, float] = field(default_factory=lambda: {3: 0.5})
    name: ClassVar[str] = "depth"

    def __post_init__(self) -> None:
        if not isinstance(self.rates, Mapping) or not self.rates:
            raise InputError(f"DepthPrune: rates={self.rates!r} must give at least one layer and its rate, as in {{3: 0.5}}.")
        for layer in self.rates:
            if isinstance(layer, bool) or not isinstance(layer, Real) or not float(layer).is_integer():
                raise InputError(f"DepthPrune: {layer!r} is no layer: give whole numbers and their rates, as in {{3: 0.5}}.")
        ordered = sorted(self.rates.items())
        for _, rate in ordered:
            check_rate(self, rate)
        if any(after < before for (_, before), (_, after) in zip(ordered, ordered[1:], strict=False)):
            raise InputError(f"DepthPrune: rates must not fall with depth (dropping is final), got {dict(ordered)}.")
        self.layer = ordered[0][0]

    def prepare(self, n_layers: int, n_heads: int, device: torch.device) -> int:
        if max(self.rates) >= n_layers:
            raise InputError(f"DepthPrune: layer {max(self.rates)} is out of range for a model of {n_layers} layers.")
        return self.resolve_layer(n_layers)

    def prefill(self, view: PrefillView) -> Tensor:
        return round_kept(view.n_image, self.rates[min(self.rates)])

    def caps(self, layer: int, n_image: Tensor) -> Tensor | None:
        reached = [start for start in self.rates if start <= layer]
        return round_kept(n_image, self.rates[max(reached)]) if reached else None
