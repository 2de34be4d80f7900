"""Quality against cost: which settings nothing cheaper beats, how sure that is, and quality at one budget along a curve.

A point dominates another if it costs no more and is no worse, and is better in one of both. The front is what no point
dominates (Pareto 1906). Estimates have intervals, so a point's place is told with its doubt. Whatever is linear in scores is
returned picture by picture, ready for `stats.paired_difference`: curves of methods on the same pictures are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import InputError

ON, PERHAPS, OFF = "on the front", "not settled", "dominated"


@dataclass(frozen=True)
class Point:
    """A setting of a method: mean cost (a FLOPs ratio, a time), mean quality, and the quality's interval over pictures."""

    name: str
    cost: float
    quality: float
    lo: float
    hi: float

    def __post_init__(self) -> None:
        if not np.isfinite([self.cost, self.quality, self.lo, self.hi]).all() or not self.lo <= self.hi:
            raise InputError(
                f"{self.name}: a point needs a finite cost and quality and an interval from low to high, not {self}"
            )


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other dominates by the estimates, from the cheapest on. Of equal ones all stay."""
    kept = [p for p in points if not any(_dominates(q, p) for q in points)]
    return sorted(kept, key=lambda p: (p.cost, p.name))


def _dominates(a: Point, b: Point) -> bool:
    return a.cost <= b.cost and a.quality >= b.quality and (a.cost < b.cost or a.quality > b.quality)


def standing(
    points: Sequence[Point],
    difference: Callable[[Point, Point], tuple[float, float, float]] | None = None,
    cost_tolerance: float = 0.0,
) -> dict[str, str]:
    """How each point stands to the front, by name: 'on the front', 'dominated', or 'not settled'.

    On the front beyond doubt: better than every point that costs no more. Dominated beyond doubt: some point that costs no more
    is better. Better means that the whole interval of the difference lies above 0; `difference` gives it, (mean, lo, hi) of the
    first point's quality minus the second's on the same pictures. Without it two intervals must not overlap, which is stricter.
    These are several comparisons: intervals of 95 % are wrong once in twenty (`stats_tests.holm`).

    Args:
        points: distinct names.
        difference: paired difference of two points' quality.
        cost_tolerance: costs that differ by no more count as equal (FLOPs ratios met to 0.01, say).

    Raises:
        InputError: a name twice, or a negative tolerance.
    """
    if len({p.name for p in points}) < len(points):
        raise InputError("points need distinct names to be told apart")
    if cost_tolerance < 0:
        raise InputError(f"a tolerance of costs is not negative, got {cost_tolerance}")
    gap = difference or (lambda a, b: (a.quality - b.quality, a.lo - b.hi, a.hi - b.lo))
    out = {}
    for p in points:
        gaps = [gap(p, q) for q in points if q is not p and q.cost <= p.cost + cost_tolerance]
        beaten, best = any(hi < 0 for _, _, hi in gaps), all(lo > 0 for _, lo, _ in gaps)
        out[p.name] = OFF if beaten else ON if best else PERHAPS
    return out


def scores_at(costs: Sequence[float], scores: Sequence[Sequence[float]] | np.ndarray, budget: float) -> np.ndarray:
    """[pictures] scores of a method at a budget, interpolated between the two settings whose costs enclose it.

    Linear between neighbours, as if the cheaper and the dearer setting were drawn by lot in the shares that meet the budget.

    Args:
        costs: [settings] mean cost of each setting.
        scores: [settings, pictures] each setting's scores of the same pictures.
        budget: in the unit of the costs.

    Raises:
        InputError: tables that do not fit, a cost twice, or a budget outside the costs: nothing is extrapolated.
    """
    cost, table = _curve(costs, scores)
    _inside(cost, budget)
    return _weights(cost, budget) @ table


def mean_scores(
    costs: Sequence[float], scores: Sequence[Sequence[float]] | np.ndarray, low: float, high: float
) -> np.ndarray:
    """[pictures] scores averaged over all budgets from low to high: the area under a method's curve over the range's width.

    The integral of :func:`scores_at` (trapezoids between the settings, exact), divided by high - low. So the unit stays that of
    the scores, and two methods may have settings of different cost.

    Raises:
        InputError: as :func:`scores_at`, or a range that is empty.
    """
    cost, table = _curve(costs, scores)
    if not low < high:
        raise InputError(f"a range of budgets runs from low to high, not from {low} to {high}")
    _inside(cost, low)
    _inside(cost, high)
    knots = np.unique(np.concatenate([[low], cost[(cost > low) & (cost < high)], [high]]))
    at = np.stack([_weights(cost, x) for x in knots])
    width = np.diff(knots)[:, None]
    weights = (width * (at[:-1] + at[1:]) / 2).sum(axis=0) / (high - low)
    return weights @ table


def _curve(costs: Sequence[float], scores: Sequence[Sequence[float]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cost, table = np.asarray(costs, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if cost.ndim != 1 or not cost.size or table.ndim != 2 or len(table) != cost.size or not table.size:
        raise InputError(
            f"a curve needs costs [settings] and scores [settings, pictures], not {cost.shape} and {table.shape}"
        )
    if not (np.isfinite(cost).all() and np.isfinite(table).all()):
        raise InputError("a curve's costs and scores must be finite numbers")
    order = np.argsort(cost, kind="stable")
    if (np.diff(cost[order]) == 0).any():
        raise InputError("two settings of a curve have the same cost: leave one out")
    return cost[order], table[order]


def _inside(cost: np.ndarray, budget: float) -> None:
    if not cost[0] <= budget <= cost[-1]:
        raise InputError(
            f"a budget of {budget:g} lies outside the settings' costs, {cost[0]:g} to {cost[-1]:g}: run one beyond it"
        )


def _weights(cost: np.ndarray, budget: float) -> np.ndarray:
    """[settings] shares of the settings at a budget."""
    weights = np.zeros(cost.size)
    k = int(np.searchsorted(cost, budget))
    if cost[k] == budget:
        weights[k] = 1.0
    else:
        weights[k] = (budget - cost[k - 1]) / (cost[k] - cost[k - 1])
        weights[k - 1] = 1 - weights[k]
    return weights
