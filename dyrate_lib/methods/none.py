"""No reduction: the unpruned model, as a method so that every table and trace has its row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Method, PrefillView


@dataclass
class NoReduction(Method):
    """Keep all image tokens at every layer and step. `trace.attention` is of layer 1, where FastV (P = 2) looks."""

    name: ClassVar[str] = "none"

    def resolve_layer(self, n_layers: int) -> int:
        return n_layers

    def prefill(self, view: PrefillView) -> Tensor:
        return view.n_image
