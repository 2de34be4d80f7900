"""DivPrune: the image tokens that are most unlike each other, whatever the question.

Source: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175), and
the facts of its repository (vbdi/divprune at 799e2d9).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from ..encoder import farthest_first
from ..errors import InputError
from .base import Method
from .before import BeforeLLM, EncoderView, Reduction


@dataclass
class DivPrune(BeforeLLM):
    """Keep round(ratio N) image tokens, spread by max-min distance, in raster order.

    ratio: share kept, R (released: 0.098). Distance: 1 - cosine of the tokens [N, D] as the language model would read
    them, after the projector. The first pick is the token whose nearest other is farthest, each next one the token
    whose nearest pick is farthest. At least one is kept; ratio = 1 keeps all and is then the unpruned model.
    """

    ratio: float = 0.098
    name: ClassVar[str] = "divprune"

    def __post_init__(self) -> None:
        check_ratio(self, self.ratio)

    def kept_count(self, n_image: int) -> int:
        return max(round(self.ratio * n_image), 1)

    def reduce(self, view: EncoderView) -> Reduction:
        return Reduction.picked(view, farthest_first(view.embeds, self.kept_count(view.embeds.shape[1])))


def check_ratio(owner: Method, ratio: float) -> None:
    """A share of tokens to keep, in (0, 1].

    Raises:
        InputError: not a number in that range.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio <= 1:
        raise InputError(
            f"{type(owner).__name__}: ratio={ratio!r} must be the share of image tokens to keep, above 0 and up to 1."
        )
