"""Courses of rates that cost what is asked, and scores carried to an equal cost along a curve of constant rates.

Costs are FLOPs ratios in the paper's convention, for courses whose dropping is final.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..accounting import paper_layer_flops
from ..models import ModelInfo

Shape = tuple[int, int, int]
_HALVINGS = 40


def course_cost(info: ModelInfo, shapes: Sequence[Shape], rates: Sequence[Sequence[float]], layer: int) -> float:
    """Mean FLOPs ratio of replies whose rates over steps are given, as `RatePath` takes them.

    shapes: (prompt tokens, image tokens, steps) of each reply. rates: one course a reply, or one for all; its last rate holds on.
    """
    courses = list(rates) * (len(shapes) if len(rates) == 1 else 1)
    known: dict[tuple, float] = {}
    total = 0.0
    for (length, n_image, steps), course in zip(shapes, courses, strict=True):
        key = (length, n_image, steps, tuple(course[:steps]))
        if key not in known:
            now = np.asarray(course[:steps], dtype=np.float64)
            now = np.concatenate([now, np.repeat(now[-1:], steps - now.size)])
            kept = np.minimum.accumulate(n_image - np.floor(now * n_image + 1e-9))
            full = np.asarray(length + np.arange(steps), dtype=np.float64)
            whole = paper_layer_flops(full, info.hidden, info.mlp).sum()
            part = paper_layer_flops(full - n_image + kept, info.hidden, info.mlp).sum()
            known[key] = float((layer * whole + (info.n_layers - layer) * part) / (info.n_layers * whole))
        total += known[key]
    return total / len(shapes)


def scaled(rates: Sequence[float], factor: float) -> list[float]:
    """A course with every kept share times `factor`, until all is kept."""
    return [round(1 - min(1.0, (1 - rate) * factor), 6) for rate in rates]


def matched(
    info: ModelInfo, shapes: Sequence[Shape], rates: Sequence[Sequence[float]], layer: int, wanted: float
) -> list[list[float]]:
    """The courses with every kept share times one factor, the same for all replies, so that their mean cost is `wanted`.

    Where no factor reaches it, the nearest: nothing kept, or all of what the courses ever keep.
    """
    least = min((1 - rate for course in rates for rate in course if rate < 1), default=1.0)

    def cost(factor: float) -> float:
        return course_cost(info, shapes, [scaled(course, factor) for course in rates], layer)

    factor = crossing(cost, wanted, 1.0 / least)
    return [scaled(course, factor) for course in rates]


def crossing(cost: Callable[[float], float], wanted: float, top: float) -> float:
    """Where a cost that does not fall from 0 to `top` crosses `wanted`: by halving; an end where it does not."""
    low, high = 0.0, top
    if cost(high) <= wanted:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= wanted else (low, middle)
    return low


def at_cost(
    values: np.ndarray, cost: float, wanted: float, costs: Sequence[float], table: Sequence[np.ndarray] | np.ndarray
) -> np.ndarray:
    """[pictures] scores carried from the cost at which they were measured to the one wanted, along a curve.

    values: [pictures] at `cost`. costs [settings], table [settings, pictures]: settings of a reference method (constant rates).
    What is added is the change along that curve, picture by picture, so that intervals over pictures hold the doubt of the slope.
    Linear between settings that are neighbours, and beyond the ends by the slope at the end. With fewer than two costs nothing
    is known of a slope and nothing is added.
    """
    at, rows = np.unique(np.asarray(costs, dtype=np.float64), return_index=True)
    if at.size < 2 or cost == wanted:
        return np.asarray(values, dtype=np.float64)
    curve = np.asarray(table, dtype=np.float64)[rows]
    return values + _on(at, curve, wanted) - _on(at, curve, cost)


def slope(costs: Sequence[float], table: Sequence[np.ndarray] | np.ndarray, at: float) -> float:
    """What a point of FLOPs (0.01 of the ratio) adds to the mean score on the curve at a cost; NaN with fewer than two costs."""
    zero = np.zeros(np.shape(table)[1])
    moved = at_cost(zero, at - 0.005, at + 0.005, costs, table)
    return float(moved.mean()) if len(set(costs)) > 1 else float("nan")


def _on(costs: np.ndarray, curve: np.ndarray, cost: float) -> np.ndarray:
    k = int(np.clip(np.searchsorted(costs, cost) - 1, 0, costs.size - 2))
    share = (cost - costs[k]) / (costs[k + 1] - costs[k])
    return (1 - share) * curve[k] + share * curve[k + 1]
