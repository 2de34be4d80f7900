"""Numbers about courses over iterations (one list of values a picture), each with its interval over pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..compare import claims
from ..errors import InputError
from ..stats import bootstrap_interval, paired_difference
from ..stats_ranks import ranks

Quantity = dict[str, float]


def mean_with_interval(values: Sequence[float] | np.ndarray, n: int = 1000, seed: int = 0) -> Quantity:
    """{mean, lo, hi, n} of one value a picture; the 95 % interval is bootstrapped over pictures."""
    array = np.asarray(values, dtype=np.float64)
    lo, hi = bootstrap_interval(array, n, seed)
    return {"mean": float(array.mean()), "lo": lo, "hi": hi, "n": int(array.size)}


def difference_with_interval(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, n: int = 1000, seed: int = 0
) -> Quantity:
    """{mean, lo, hi, n} of a - b over the same pictures."""
    mean, lo, hi = paired_difference(a, b, n, seed)
    return {"mean": mean, "lo": lo, "hi": hi, "n": len(a)}


def spread_with_interval(values: Sequence[float] | np.ndarray, n: int = 1000, seed: int = 0) -> Quantity:
    """{mean, lo, hi, n} of the standard deviation over pictures (n - 1 in the denominator), bootstrapped over pictures."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return {"mean": 0.0, "lo": 0.0, "hi": 0.0, "n": int(array.size)}
    random = np.random.default_rng(seed)
    drawn = array[random.integers(0, array.size, size=(n, array.size))].std(axis=1, ddof=1)
    lo, hi = np.quantile(drawn, [0.025, 0.975])
    return {"mean": float(array.std(ddof=1)), "lo": float(lo), "hi": float(hi), "n": int(array.size)}


def step_rank_correlation(course: Sequence[float] | np.ndarray) -> float:
    """Spearman's correlation of a course with the step number; 0 for a constant course or fewer than two steps."""
    values = np.asarray(course, dtype=np.float64)
    if values.size < 2 or np.ptp(values) == 0:
        return 0.0
    return float(np.corrcoef(ranks(values), np.arange(values.size))[0, 1])


def change_between_thirds(course: Sequence[float] | np.ndarray) -> float:
    """Mean of the last third of a course minus mean of its first third (at least one step each)."""
    values = np.asarray(course, dtype=np.float64)
    if values.size < 1:
        raise InputError("a course needs at least one step")
    third = max(1, values.size // 3)
    return float(values[-third:].mean() - values[:third].mean())


def mean_course(courses: Sequence[Any], least: float = 0.5) -> dict[str, np.ndarray]:
    """Mean over pictures at each step, as long as at least a share `least` of them still generates.

    Returns arrays [steps]: step, mean, lo, hi (normal 95 % interval of the mean), p10, p90 (over pictures), n.
    """
    longest = max(len(course) for course in courses)
    table = np.full((len(courses), longest), np.nan)
    for row, course in zip(table, courses, strict=True):
        row[: len(course)] = course
    n = (~np.isnan(table)).sum(0)
    last = int((n >= max(1, np.ceil(least * len(courses)))).sum())
    table, n = table[:, :last], n[:last]
    mean = np.nanmean(table, axis=0)
    deviation = np.sqrt(np.nansum((table - mean) ** 2, axis=0) / np.maximum(n - 1, 1))
    half = 1.96 * deviation / np.sqrt(n)
    p10, p90 = np.nanquantile(table, [0.1, 0.9], axis=0)
    return {"step": np.arange(last), "mean": mean, "lo": mean - half, "hi": mean + half, "p10": p10, "p90": p90, "n": n}


def largest(values: Iterable[float]) -> float:
    """The largest; NaN if one is, which max() may pass over: then a check on the worst case would hold for want of a number."""
    return float(np.max(list(values)))


def percent(quantity: Mapping[str, float]) -> Quantity:
    """A ratio's {mean, lo, hi, n} in per cent."""
    return {**quantity, **{name: 100 * quantity[name] for name in ("mean", "lo", "hi")}}


def show_interval(quantity: Mapping[str, float], digits: int = 3) -> str:
    """'0.123 [0.120, 0.126]' for a table cell."""
    return f"{quantity['mean']:.{digits}f} [{quantity['lo']:.{digits}f}, {quantity['hi']:.{digits}f}]"


def asked_for(claim: str, quantities: Mapping[str, Any], beyond: bool = False) -> dict[str, Any]:
    """Those of the quantities that the claim's checks read; beyond: as claims_beyond.yaml has the claim."""
    wanted = claims(beyond=beyond)[claim].quantities
    return {name: quantities[name] for name in wanted if name in quantities}


def verdict_line(claim: str, quantities: Mapping[str, Any], beyond: bool = False) -> str:
    """One line: the claim, the verdict on it, and why; beyond: as claims_beyond.yaml has the claim."""
    from ..compare import judge

    asked = claims(beyond=beyond)[claim]
    verdict = judge(asked, quantities)
    return f"{claim} ({asked.title}): {verdict.verdict}; {verdict.evidence}"
