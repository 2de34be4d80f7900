"""DyRate: a linear classifier reads the attention shares of each newest token and sets the pruning rate.

Source: Liang et al., "Dynamic Token Reduction during Generation for Vision Language Models", Secs. III-B and III-C;
no code was released, so this is the reading written down in DEVIATIONS.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from .. import masks
from ..errors import InputError
from ..predictor import RatePredictor
from ..predictor_inputs import BLIND, unit_rms
from .base import Method, PrefillView, StepView


@dataclass
class DyRate(Method):
    """At each step k = argmax of the predictor on v_t (4 shares a head, layer P - 1); keep N - floor(r_k N) tokens.

    predictor: a trained `RatePredictor`, or the path of one; instead of v_t it may read what a control reads (its `inputs`), but
    an oracle's rates are replayed (`oracle_rates`). layer: P; None takes the predictor's own (3 if it has none).
    rank: "prefill" (the paper: FastV's rule, ranked once) or "step" (ranked anew by each newest query row).
    reversible: a dropped token may come back; then the prompt is read in full and only the reads of the cache fall.
    """

    predictor: RatePredictor | str | Path
    layer: int | None = None
    rank: str = "prefill"
    reversible: bool = False
    name: ClassVar[str] = "dyrate"
    _placed: RatePredictor | None = field(default=None, init=False, repr=False, compare=False)
    _source: tuple[torch.device, list[Tensor]] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.predictor, str | Path):
            self.predictor = RatePredictor.load(self.predictor)
        if not isinstance(self.predictor, RatePredictor):
            raise InputError(
                f"DyRate: predictor must be a RatePredictor or the path of one, got {type(self.predictor).__name__}."
            )
        if self.predictor.inputs == "oracle":
            raise InputError(
                "DyRate: an oracle knows what a token needs before it is said, which no loop does: replay its rates by "
                "RatePath(rates=[oracle_rates(predictor, needs), ...])."
            )
        if self.rank not in ("prefill", "step"):
            raise InputError(f"DyRate: rank={self.rank!r} must be 'prefill' or 'step'.")
        trained = self.predictor.layer
        if self.layer is None:
            self.layer = 3 if trained is None else trained
        elif trained is not None and trained != self.layer:
            raise InputError(
                f"DyRate: the predictor was trained for layer {trained}, not {self.layer}: leave layer out, or train one."
            )

    @property
    def loaded(self) -> RatePredictor:
        """`predictor`, which was read when the method was made if it was given as a path."""
        return cast(RatePredictor, self.predictor)

    @property
    def wants_hidden(self) -> bool:
        return self.loaded.inputs == "hidden"

    def prepare(self, n_layers: int, n_heads: int, device: torch.device) -> int:
        layer = self.resolve_layer(n_layers)
        if self.loaded.n_heads != n_heads and self.loaded.inputs not in BLIND:
            raise InputError(
                f"DyRate: the predictor reads {self.loaded.n_heads} heads, the model has {n_heads}: it was trained for "
                "another model; train one for this model (notebook 02)."
            )
        self._place(device)
        return layer

    def _place(self, device: torch.device) -> None:
        """Have a copy of the predictor on `device`: the last call's where no weight has changed, as copying a module is slow
        beside a step of a small model. A predictor on a GPU is copied every time: to compare would make the host wait."""
        now = list(self.loaded.state_dict().values())
        here = all(value.device.type == "cpu" for value in now)
        known = self._source
        if self._placed is None or not here or known is None or known[0] != device or not all(map(torch.equal, known[1], now)):
            self._placed = copy.deepcopy(self.loaded).to(device)
            self._source = (device, [value.clone() for value in now]) if here else None

    def plan(self, n_image: int, n_layers: int, steps: int = 1) -> np.ndarray:
        if self.loaded.inputs in BLIND:
            return super().plan(n_image, n_layers, steps)
        raise InputError(
            "DyRate chooses its rates by what it sees, so its cost is not known beforehand: train the predictor for a "
            "budget (train_predictor(..., target=...), notebook 02) and read the trace of a run."
        )

    def _kept(self, view: PrefillView | StepView, step: int) -> Tensor:
        assert self._placed is not None  # by prepare
        rate = self._placed(_features(self._placed, view, step)).argmax(-1, keepdim=True)
        return masks.kept_counts(view.n_image, self.loaded.n_rates).gather(-1, rate)[..., 0]

    def prefill(self, view: PrefillView) -> Tensor:
        return self._kept(view, 0)

    def step(self, view: StepView) -> Tensor:
        return self._kept(view, view.step)


def _features(predictor: RatePredictor, view: PrefillView | StepView, step: int) -> Tensor:
    """What a predictor reads of a view, as `RatePredictor.forward` takes it."""
    if predictor.inputs == "step":
        return torch.full_like(view.n_image, step)
    if predictor.inputs == "none":
        return view.shares.new_empty(len(view.n_image), 0)
    if predictor.inputs == "foreign":
        assert view.content_key is not None  # only a view made up by `imagined_counts` has none
        return predictor.foreign_shares(view.content_key, step).to(view.shares.device)
    if predictor.inputs == "hidden":
        if view.hidden is None:  # whoever runs the method has been asked for it
            raise InputError("DyRate: this predictor reads the hidden state, which this loop does not show.")
        return unit_rms(view.hidden)
    return view.shares
