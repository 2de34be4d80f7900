"""Notebook 04: whose counts of image tokens are timed: a recorded course replayed, and courses scaled to a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..accounting import flops
from ..errors import InputError
from ..methods import VTW, FastV, Method, NoReduction
from ..methods.base import PrefillView, StepView
from ..models import ModelInfo
from ..predictor import RatePredictor
from .benchmarks import remembered
from .context import Record, Study
from .training_runs import LAYER, N_RATES

TEXT_TOKENS = 64  # of a timed prompt, BOS included
STEPS = 64
PAPER_VTW = 16  # Table III: layer 16 for both sizes


@dataclass
class Replay(Method):
    """A recorded course of kept counts, with the predictor run (and ignored) at every step: DyRate's work on other weights.

    layer: P; kept: image tokens kept at step t, the last one from then on. The predictor is an untrained one of the right size;
    predict=False leaves it out, which shows what it costs.
    """

    layer: int = LAYER
    kept: tuple[int, ...] = (0,)
    predict: bool = True
    name: ClassVar[str] = "replay"
    _course: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _predictor: RatePredictor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.kept or any(b > a for a, b in zip(self.kept, self.kept[1:], strict=False)):
            raise InputError(f"Replay: kept must be given and never rise, got {self.kept}")

    def prepare(self, n_layers: int, n_heads: int, device: torch.device) -> int:
        layer = self.resolve_layer(n_layers)
        self._course = torch.tensor(self.kept, device=device)
        if self.predict:
            if self._predictor is None or self._predictor.n_heads != n_heads:
                self._predictor = RatePredictor(n_heads, N_RATES, layer)
            self._predictor = self._predictor.to(device)
        return layer

    def _at(self, step: int, shares: Tensor, n_image: Tensor) -> Tensor:
        if self._predictor is not None:
            self._predictor(shares).argmax(-1)
        return torch.minimum(self._course[min(step, len(self.kept) - 1)].expand_as(n_image), n_image)  # type: ignore[index]

    def prefill(self, view: PrefillView) -> Tensor:
        return self._at(0, view.shares, view.n_image)

    def step(self, view: StepView) -> Tensor:
        return self._at(view.step, view.shares, view.n_image)


def long_cell(study: Study, key: str) -> Record:
    """Replies of the 33.3 % predictor (first seed) to the narrative set."""
    role = "flickr30k" if study.on_scenes else "coco"
    seed = study.scale.predictor_seeds[0]
    return remembered(study, ("long", key), lambda: study.captions(key, role, study.method("dyrate", key, seed=seed)))


def scene_cells(study: Study, key: str) -> dict[str, Record]:
    """Replies to the short captions by method, for FLOPs on scenes: original, fastv-2, fastv-3, vtw, dyrate."""
    kinds = ("original", "fastv-3", "fastv-2", "vtw", "dyrate")
    return remembered(
        study,
        ("scene cells", key),
        lambda: {kind: study.captions(key, "coco", study.method(kind, key)) for kind in kinds},
    )


def course(study: Study, key: str) -> tuple[int, ...]:
    """Image tokens that the 33.3 % predictor of a scenes model keeps at each step of a long caption, mean over pictures.

    Of the narrative set, whose replies are about as long as what is timed. Step t averages over pictures still generating.
    """
    rows = long_cell(study, key)["payload"]
    longest = max(len(row["kept"]) for row in rows)
    n_image = max(row["n_image"] for row in rows)
    means = [np.mean([row["kept"][t] / row["n_image"] for row in rows if len(row["kept"]) > t]) for t in range(longest)]
    counts = np.minimum.accumulate(np.round(np.array(means) * n_image).astype(int))
    return tuple(int(count) for count in counts)


def stretched(kept: tuple[int, ...], was: int, n_image: int) -> tuple[int, ...]:
    """A course over `was` image tokens as one over `n_image`."""
    return tuple(min(n_image, round(count * n_image / was)) for count in kept)


def kept_by_layer(
    info: ModelInfo,
    layer: int,
    kept: Mapping[int, int] | tuple[int, ...],
    steps: int = STEPS,
    n_image: int | None = None,
) -> np.ndarray:
    """[steps, L] image tokens: all `n_image` (default: one picture's) below `layer`, the course `kept` (its last value from its
    end on) from there on."""
    values = tuple(kept.values()) if isinstance(kept, Mapping) else kept
    counts = np.array([values[min(t, len(values) - 1)] for t in range(steps)])
    table = np.full((steps, info.n_layers), info.n_image_tokens if n_image is None else n_image)
    table[:, layer:] = counts[:, None]
    return table


def course_ratio(
    info: ModelInfo, layer: int, kept: tuple[int, ...], convention: str = "paper", n_image: int | None = None
) -> float:
    """FLOPs of a course over those of the unpruned model, for `STEPS` new tokens."""
    n_image = info.n_image_tokens if n_image is None else n_image
    table = kept_by_layer(info, layer, kept, n_image=n_image)
    return flops(info, TEXT_TOKENS + n_image, n_image, table, convention, includes_vision=convention == "cached").ratio


def scaled_course(
    info: ModelInfo, kept: tuple[int, ...], ratio: float = 1 / 3, n_image: int | None = None
) -> tuple[int, ...]:
    """The course multiplied (and cut off at all tokens) by the factor that gives `ratio` in the paper's convention on these
    dimensions, or comes closest."""
    most = info.n_image_tokens if n_image is None else n_image

    def times(factor: float) -> tuple[int, ...]:
        return tuple(min(most, round(k * factor)) for k in kept)

    low, high = 0.0, most / max(min(kept), 1)
    for _ in range(40):
        middle = (low + high) / 2
        above = course_ratio(info, LAYER, times(middle), n_image=most) > ratio
        low, high = (low, middle) if above else (middle, high)
    return times(high) if ratio >= 1 else times(low)


def least_ratio(info: ModelInfo, n_image: int | None = None) -> float:
    """The least FLOPs that any course with P = `LAYER` can have, in the paper's convention: nothing kept from P on."""
    return course_ratio(info, LAYER, (0,), n_image=n_image)


def reads_of(name: str, n_layers: int, n_image: int, kept: tuple[int, ...], paper: bool) -> tuple[int, tuple[int, ...]]:
    """(P, course) of a timed method: what it reads at layers from P on. paper: VTW at the paper's layer, else at half depth."""
    half = n_image // 2
    known = {
        "original": (1, (n_image,)), "fastv-3": (3, (half,)), "fastv-2": (2, (half,)),
        "vtw": (PAPER_VTW if paper else n_layers // 2, (0,)), "dyrate": (LAYER, kept),
    }  # fmt: skip
    return known[name]


def timed_method(name: str, layer: int, kept: tuple[int, ...]) -> Method:
    """The method itself, from what `reads_of` says."""
    if name == "original":
        return NoReduction()
    if name.startswith("fastv"):
        return FastV(layer, 0.5)
    return VTW(layer) if name == "vtw" else Replay(layer, kept)
