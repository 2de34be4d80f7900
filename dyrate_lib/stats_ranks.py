"""Rank correlations with ties, of one course or of many, with a control variable. Pure NumPy, deterministic by seed.

Spearman's rho is Pearson's correlation of the ranks, equal values sharing the mean of theirs (Spearman 1904; Kendall and Gibbons
1990, Ch. 3); the partial one is the first-order partial correlation of the same ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import InputError
from .stats import bootstrap_interval

Numbers = Sequence[float] | np.ndarray


def ranks(values: Numbers) -> np.ndarray:
    """[n] float64 ranks from 0, equal values sharing the mean of theirs."""
    _, group, count = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count + 1) / 2)[group]


def spearman(x: Numbers, y: Numbers) -> float:
    """Spearman's rho of two lists; NaN where it is not defined (fewer than two values, or one list all equal).

    InputError unless both are lists of as many finite numbers.
    """
    first, second = _lists(x, y)
    return _pearson(ranks(first), ranks(second))


def partial_spearman(x: Numbers, y: Numbers, control: Numbers) -> float:
    """Spearman's rho of x and y with a third list held fixed: (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)).

    With the step as control: whether a rate follows the need beyond what both owe to the clock. A constant control changes
    nothing.

    Returns:
        The coefficient, or NaN where it is not defined: as in :func:`spearman`, or where control alone fixes the order of x or y.
    """
    first, second, third = (ranks(values) for values in _lists(x, y, control))
    xy, xz, yz = _pearson(first, second), _pearson(first, third), _pearson(second, third)
    if third.size and not np.ptp(third):
        return xy
    left = (1 - xz**2) * (1 - yz**2)
    return float((xy - xz * yz) / np.sqrt(left)) if left > 1e-12 else float("nan")


def _lists(*lists: Numbers) -> list[np.ndarray]:
    arrays = [np.asarray(values, dtype=np.float64) for values in lists]
    if any(a.ndim != 1 or a.size != arrays[0].size for a in arrays):
        raise InputError(
            f"a rank correlation needs lists of one length, not of shapes {', '.join(str(a.shape) for a in arrays)}"
        )
    if not all(np.isfinite(a).all() for a in arrays):
        raise InputError("a rank correlation needs finite numbers")
    return arrays


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if x.size < 2 or not np.ptp(x) or not np.ptp(y):
        return float("nan")
    a, b = x - x.mean(), y - y.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def course_correlations(courses: Sequence[Numbers], needs: Sequence[Numbers], by_step: bool = False) -> np.ndarray:
    """[pictures] rank correlation of each picture's course over steps with what its steps need.

    Args:
        courses: a list a picture, one number a step (the rate in force, the share removed).
        needs: a list a picture of as many steps; steps whose need is not known (NaN) are left out.
        by_step: hold the step number fixed (:func:`partial_spearman`).

    Returns:
        float64: 0 for a course that never changes, or changes with the step alone where that is held fixed: it follows nothing.
        NaN where the needs cannot be followed: all alike, or fixed by the step, or fewer than two steps.

    Raises:
        InputError: courses and needs that do not fit together, or values that are not finite (but for needs not known).
    """
    if len(courses) != len(needs):
        raise InputError(f"{len(courses)} courses for the needs of {len(needs)} pictures: give one of each a picture")
    return np.array([_course(course, need, by_step) for course, need in zip(courses, needs, strict=True)])


def _course(course: Numbers, need: Numbers, by_step: bool) -> float:
    values, wanted = np.asarray(course, dtype=np.float64), np.asarray(need, dtype=np.float64)
    if values.shape != wanted.shape or values.ndim != 1:
        raise InputError(
            f"a course and its needs have one number a step each, not shapes {values.shape} and {wanted.shape}"
        )
    known = ~np.isnan(wanted)
    step = np.arange(values.size)[known]
    values, wanted = values[known], wanted[known]
    apart = abs(spearman(wanted, step)) if wanted.size else float("nan")
    if np.isnan(apart) or (by_step and apart > 1 - 1e-9):
        return float("nan")
    rho = partial_spearman(values, wanted, step) if by_step else spearman(values, wanted)
    return 0.0 if np.isnan(rho) else rho


def mean_correlation(per_picture: Numbers, n: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """{mean, lo, hi, n} of pictures' own correlations, the interval bootstrapped over pictures; NaN ones are left out, n says how
    many remain. InputError when none does."""
    values = np.asarray(per_picture, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if not defined.size:
        raise InputError("no picture has a rank correlation: its course or its needs are undefined in all of them")
    lo, hi = bootstrap_interval(defined, n, seed, level)
    return {"mean": float(defined.mean()), "lo": lo, "hi": hi, "n": int(defined.size)}


def correlation_over_pictures(
    x: Numbers, y: Numbers, control: Numbers | None = None, n: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, float]:
    """{mean, lo, hi, n} of one rank correlation over pictures (a number of each against another of each), pictures resampled.

    `mean` is the coefficient of all pictures; control: held fixed where given. Resamples without a defined coefficient are left
    out. InputError where that of all pictures is not defined, or the lists do not fit together.
    """
    lists = _lists(x, y) if control is None else _lists(x, y, control)

    def coefficient(rows: np.ndarray) -> float:
        picked = [values[rows] for values in lists]
        return spearman(*picked) if control is None else partial_spearman(*picked)

    if not 0 < level < 1 or n < 1:
        raise InputError(f"level must lie between 0 and 1 and n be at least 1, not {level} and {n}")
    size = lists[0].size
    whole = coefficient(np.arange(size))
    if np.isnan(whole):
        raise InputError(
            "the rank correlation is not defined: fewer than two pictures, or all alike in one of the lists"
        )
    random = np.random.default_rng(seed)
    drawn = np.array([coefficient(random.integers(0, size, size)) for _ in range(n)])
    drawn = drawn[~np.isnan(drawn)]
    lo, hi = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]) if drawn.size else (whole, whole)
    return {"mean": whole, "lo": float(lo), "hi": float(hi), "n": int(size)}
