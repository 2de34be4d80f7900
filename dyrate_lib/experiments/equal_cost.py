"""Courses of rates that cost what is asked, and scores carried to an equal cost along a curve of constant rates.

Costs are FLOPs ratios in the paper's convention, for courses whose dropping is final.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..accounting import paper_layer_flops
from ..models import ModelInfo

Shape = tuple[int, int, int]
_HALVINGS, _DIGITS = 40, 6


def course_cost(info: ModelInfo, shapes: Sequence[Shape], rates: Sequence[Sequence[float]], layer: int) -> float:
    """Mean FLOPs ratio of replies whose rates over steps are given, as `RatePath` takes them.

    shapes: (prompt tokens, image tokens, steps) of each reply. rates: one course a reply, or one for all; its last rate holds on.
    """
    return _cost(info, shapes, layer)(_padded(rates, max(steps for _, _, steps in shapes)))


def _padded(rates: Sequence[Sequence[float]], steps: int) -> np.ndarray:
    """[replies, steps] or [1, steps] rates, the last of each held on."""
    rows = [np.asarray(course[:steps], dtype=np.float64) for course in rates]
    return np.stack([np.concatenate([row, np.repeat(row[-1:], steps - row.size)]) for row in rows])


def _cost(info: ModelInfo, shapes: Sequence[Shape], layer: int) -> Callable[[np.ndarray], float]:
    """The mean FLOPs ratio as a function of rates [replies or 1, steps]."""
    length, n_image, steps = (column[:, None] for column in np.array(shapes).T)
    now = np.arange(steps.max())
    full, valid = (length + now).astype(np.float64), now < steps
    flops = paper_layer_flops(full, info.hidden, info.mlp) * valid
    whole = flops.sum(1)

    def cost(rates: np.ndarray) -> float:
        kept = np.minimum.accumulate(n_image - np.floor(rates * n_image + 1e-9), axis=1)
        part = (paper_layer_flops(full - n_image + kept, info.hidden, info.mlp) * valid).sum(1)
        return float(((layer * whole + (info.n_layers - layer) * part) / (info.n_layers * whole)).mean())

    return cost


def scaled(rates: Sequence[float], factor: float) -> list[float]:
    """A course with every kept share times `factor`, until all is kept."""
    return [round(1 - min(1.0, (1 - rate) * factor), _DIGITS) for rate in rates]


def matched(
    info: ModelInfo, shapes: Sequence[Shape], rates: Sequence[Sequence[float]], layer: int, wanted: float
) -> list[list[float]]:
    """The courses with every kept share times one factor, the same for all replies, so that their mean cost is `wanted`.

    Where no factor reaches it, the nearest: nothing kept, or all of what the courses ever keep.
    """
    least = min((1 - rate for course in rates for rate in course if rate < 1), default=1.0)

    cost, kept = _cost(info, shapes, layer), 1 - _padded(rates, max(steps for _, _, steps in shapes))
    factor = crossing(lambda x: cost(np.round(1 - np.minimum(1.0, kept * x), _DIGITS)), wanted, 1.0 / least)
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
