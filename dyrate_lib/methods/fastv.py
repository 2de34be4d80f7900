"""FastV: drop the image tokens that the last prompt token attends to least, once, after layer P - 1.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764), and the facts of its transformers
port with a KV cache (repository pkunlp-icler/FastV at d165972).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Method, PrefillView, check_rate, round_kept


@dataclass
class FastV(Method):
    """Keep round(N (1 - rate)) image tokens from layer `layer` on, by head-mean attention of the last prompt token.

    layer: P, the paper's K (released settings: 2 or 3). rate: share removed, R (released: 0.5).
    refresh: False prunes once at prefill and keeps the cache; True runs without a cache and prunes anew from the newest
        token at every step, as the original did, whose published numbers come from there.
    """

    layer: int = 2
    rate: float = 0.5
    refresh: bool = False
    name: ClassVar[str] = "fastv"

    def __post_init__(self) -> None:
        check_rate(self, self.rate)

    def prefill(self, view: PrefillView) -> Tensor:
        return round_kept(view.n_image, self.rate)
