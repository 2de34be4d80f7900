"""VTW: all image tokens leave at one layer. With the search for that layer by the change in the next-token distribution.

Source: Lin et al., "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal" (arXiv 2405.05803), and the
facts of its repository (lzhxmu/VTW at a3d8cfc).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from .base import Method, PrefillView


@dataclass
class VTW(Method):
    """Drop every image token at the input of layer `layer`; None takes half the depth (released: 16 of 32, 20 of 40)."""

    layer: int | None = None
    name: ClassVar[str] = "vtw"

    def resolve_layer(self, n_layers: int) -> int:
        if self.layer is None:
            return n_layers // 2
        return super().resolve_layer(n_layers)

    def prefill(self, view: PrefillView) -> Tensor:
        return torch.zeros_like(view.n_image)


@torch.no_grad()
def vtw_divergence(model: Any, batches: Iterable[Any], first_layer: int = 5) -> dict[int, float]:
    """KL(withdrawn at k || full) of the next-token distribution, averaged over samples, for k = first_layer..L-1.

    batches: prepared inputs, as for `generate`; the authors use 20 samples.
    """
    from ..decoder import PrunedDecoder
    from ..models import Adapter

    adapter = Adapter(model)
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise InputError("batches must be a list of prepared inputs: pass [inputs], not the inputs themselves.")
    layers = range(first_layer, adapter.n_layers)
    if not layers:
        raise InputError(f"first_layer={first_layer} leaves no layer to try in a model of {adapter.n_layers}.")
    sums, count = dict.fromkeys(layers, 0.0), 0
    for inputs in batches:
        prompt = adapter.embed(inputs)
        full = torch.log_softmax(PrunedDecoder(adapter, prompt, None, 1).prefill().float(), dim=-1)
        for k in layers:
            cut = torch.log_softmax(PrunedDecoder(adapter, prompt, VTW(k), 1).prefill().float(), dim=-1)
            sums[k] += float((cut.exp() * (cut - full)).sum())
        count += full.shape[0]
    if not count:
        raise InputError("The VTW search needs at least one sample.")
    return {k: total / count for k, total in sums.items()}


def vtw_search(model: Any, batches: Iterable[Any], eta: float = 0.003, first_layer: int = 5) -> int:
    """The first layer whose withdrawal changes the next-token distribution by at most `eta` (7B: 0.003, 13B: 0.0005).

    Raises:
        InputError: no layer meets it; the message tells the smallest divergence found.
    """
    divergence = vtw_divergence(model, batches, first_layer)
    for k, value in divergence.items():
        if value <= eta:
            return k
    best = min(divergence, key=divergence.__getitem__)
    raise InputError(
        f"No layer meets eta={eta}: the smallest divergence is {divergence[best]:.4g} at layer {best}. Allow a larger eta."
    )
