"""PyramidDrop: fewer image tokens after every quarter of the depth, by the next layer's own view of the last prompt token.

Source: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"
(arXiv 2410.17247), and the facts of its repository (Cooperx521/PyramidDrop at 6444f30).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from ..errors import InputError
from .staged import Staged, as_list, check_layers, scale_cuts

RELEASED_LAYERS = (8, 16, 24)


@dataclass
class PyramidDrop(Staged):
    """Before layers `layers` keep int(ratio n) of the ORIGINAL n image tokens of a sample, in raster order.

    Scores: the layer after the cut makes a query of the last prompt token and keys of all rows as they are, with its own
    input norm and rotary positions; softmax over the whole row, mean over heads.

    layers: None takes 8, 16, 24 of 32 at the same relative depth. ratios: one a layer, from 0 to 1, not rising (released:
        0.5, 0.25, 0.125). renumber: positions are counted anew after every cut, as released; False keeps them.
    """

    layers: Sequence[int] | None = None
    ratios: Sequence[float] = (0.5, 0.25, 0.125)
    renumber: bool = True
    looks: ClassVar[str] = "next"
    name: ClassVar[str] = "pyramiddrop"

    def __post_init__(self) -> None:
        self.layers, self.ratios = as_list(self.layers), as_list(self.ratios)
        check_layers(self, self.layers)
        numbers = isinstance(self.ratios, Sequence) and all(
            isinstance(r, Real) and not isinstance(r, bool) and 0 <= r <= 1 for r in self.ratios
        )
        if not numbers or any(b > a for a, b in zip(self.ratios, list(self.ratios)[1:])):
            raise InputError(f"PyramidDrop: ratios={self.ratios!r} must be shares from 0 to 1 that do not rise.")
        expected = len(RELEASED_LAYERS if self.layers is None else self.layers)
        if len(self.ratios) != expected:
            raise InputError(f"PyramidDrop: {len(self.ratios)} ratios for {expected} layers; give one a layer.")

    def cuts(self, n_layers: int) -> tuple[int, ...]:
        return scale_cuts(RELEASED_LAYERS, n_layers) if self.layers is None else tuple(self.layers)

    def keeps(self, stage: int, current: int, n_image: int) -> int:
        return min(int(n_image * self.ratios[stage]), current)
