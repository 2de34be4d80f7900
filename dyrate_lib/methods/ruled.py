"""What methods share whose rate is another method's: DyRate's predictor, or a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..predictor import RatePredictor
from .base import Method, PrefillView, StepView
from .dyrate import DyRate
from .schedule import RatePath


@dataclass
class Ruled(Method):
    """How many tokens stay is `DyRate`'s or `RatePath`'s answer; a subclass says which, and what becomes of the others.

    predictor, rates: one of the two, as in `DyRate` and `RatePath`. layer: P; None takes the predictor's own, and for a schedule
    `schedule_layer`.

    Raises:
        InputError: not one of predictor and rates, or what the two methods refuse.
    """

    predictor: RatePredictor | str | Path | None = None
    rates: Sequence | None = None
    layer: int | None = None
    schedule_layer: ClassVar[int] = 3
    _rule: DyRate | RatePath = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.predictor is None) == (self.rates is None):
            raise InputError(f"{type(self).__name__}: give a predictor or rates, one of the two.")
        if self.rates is not None:
            self._rule = RatePath(self.schedule_layer if self.layer is None else self.layer, self.rates)
        else:
            self._rule = DyRate(self.predictor, self.layer)  # type: ignore[arg-type]
            self.predictor = self._rule.predictor
        self.layer = self._rule.layer

    @property
    def wants_hidden(self) -> bool:
        return self._rule.wants_hidden

    def prepare(self, n_layers: int, n_heads: int, device: torch.device) -> int:
        return self._rule.prepare(n_layers, n_heads, device)

    def check_rows(self, rows: int) -> None:
        self._rule.check_rows(rows)

    def prefill(self, view: PrefillView) -> Tensor:
        return self._rule.prefill(view)

    def step(self, view: StepView) -> Tensor:
        return self._rule.step(view)

    def plan(self, n_image: int, n_layers: int, steps: int = 1) -> np.ndarray:
        self._rule.plan(n_image, n_layers, steps)  # refuses where the rate depends on what is seen
        return super().plan(n_image, n_layers, steps)
