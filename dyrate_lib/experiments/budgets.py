"""The rates that meet a FLOPs budget: one fixed rate (FP), or rates that grow with depth (DP), as Table IVb compares them.

`DP` is a reading of the paper's C_retain, whose R' is not defined: from the fourth layer on a share P_4th leaves, and R'
grows linearly with depth until at the last layer no image token is left; P_4th is then set by the FLOPs asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..accounting import paper_layer_flops
from ..budgets import nearest
from ..methods import DepthPrune, RatePath
from ..models import ModelInfo
from .cells import Record

PAPER_LAYER = 3  # of FP and DP in Table IVb
FIXED_RATIO, DEPTH_RATIO = 0.288, 0.581  # what FP and DP cost in Table IVb


def reply_shapes(record: Record) -> list[tuple[int, int, int]]:
    """(prompt tokens, image tokens, steps) of each reply: what a FLOPs ratio depends on besides the kept counts."""
    return [(entry["prompt_length"], entry["n_image"], entry["steps"]) for entry in record["payload"]]


def constant_ratio(info: ModelInfo, shapes: Sequence[tuple[int, int, int]], kept: Callable[[int], np.ndarray]) -> float:
    """Mean FLOPs ratio, paper's convention, when layer l keeps kept(n_image)[l] image tokens at every step."""
    total, known = 0.0, {}
    for shape in shapes:
        if shape not in known:
            length, n_image, steps = shape
            full = np.asarray(length + np.arange(steps), dtype=np.float64)
            rows = full[:, None] - n_image + kept(n_image)[None, :]
            whole = info.n_layers * float(paper_layer_flops(full, info.hidden, info.mlp).sum())
            known[shape] = float(paper_layer_flops(rows, info.hidden, info.mlp).sum()) / whole
        total += known[shape]
    return total / len(shapes)


def kept_for(info: ModelInfo, shapes: Sequence[tuple[int, int, int]], ratio: float, layer: int) -> int:
    """The image tokens kept from `layer` on, at every step, whose cost comes nearest to `ratio`."""

    def cost(count: int) -> float:
        return constant_ratio(info, shapes, lambda n: np.where(np.arange(info.n_layers) < layer, n, min(count, n)))

    return nearest(cost, max(n for _, n, _ in shapes), ratio)


def fixed_for(info: ModelInfo, shapes: Sequence[tuple[int, int, int]], ratio: float, layer: int = PAPER_LAYER) -> RatePath:
    """The fixed rate whose cost comes nearest to `ratio`; keeps at least no token and at most all."""
    n_image = max(n for _, n, _ in shapes)
    return RatePath(layer, ((n_image - kept_for(info, shapes, ratio, layer)) / n_image,))


def depth_for(info: ModelInfo, shapes: Sequence[tuple[int, int, int]], ratio: float, layer: int = PAPER_LAYER) -> DepthPrune:
    """The depth-based rates (see the module's head) whose cost comes nearest to `ratio`; P_4th in thousandths."""

    def cost(thousandths: int) -> float:
        rates = depth_rates(info.n_layers, 1 - thousandths / 1000, layer)
        shares = np.array([1 - rates.get(index, 0.0) for index in range(info.n_layers)])
        return constant_ratio(info, shapes, lambda n: np.round(n * shares))

    return DepthPrune(depth_rates(info.n_layers, 1 - nearest(cost, 1000, ratio) / 1000, layer))


def depth_rates(n_layers: int, first: float, layer: int = PAPER_LAYER) -> dict[int, float]:
    """Share removed at each layer from `layer` on: `first` there, all at the last layer, linear between."""
    span = max(n_layers - 1 - layer, 1)
    return {index: round(first + (1 - first) * (index - layer) / span, 6) for index in range(layer, n_layers)}


def depth_on_llava() -> str:
    """What the reading of DP costs at LLaVA-1.5-7B's dimensions if P_4th is zero, beside what Table IVb prints."""
    n_layers, hidden, mlp, n_image = 32, 4096, 11008, 576
    shares = 1 - np.array([depth_rates(n_layers, 0.0).get(index, 0.0) for index in range(n_layers)])
    found = []
    for text in (32, 64, 128):
        whole = n_layers * float(paper_layer_flops(float(text + n_image), hidden, mlp))
        found.append(100 * float(paper_layer_flops(text + n_image * shares, hidden, mlp).sum()) / whole)
    return (
        "DP at LLaVA-1.5-7B's dimensions with P_4th = 0: "
        + ", ".join(f"{value:.1f} % with {text} text tokens" for value, text in zip(found, (32, 64, 128), strict=True))
        + f"; Table IVb prints {100 * DEPTH_RATIO:.1f} %"
    )
