"""p-values of paired differences, their correction for many comparisons, and equivalence within a margin. Pure NumPy.

An interval that covers 0 does not show that two methods are alike; :func:`equivalence` says when the data do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import InputError
from .stats import _check, _paired, _values, bootstrap_interval, ratio

_CHUNK = 4_000_000  # signs held at once: 32 MB
_EXACT = 16  # pairs up to which all 2^n signs are gone through


def sign_flip_p_value(differences: Sequence[float] | np.ndarray, n: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference over pictures, by flipping the signs of the pictures' differences.

    The permutation test for pairs (Fisher 1935, Sec. 21): if the two methods were alike, a picture's difference could as well
    have the other sign. No distribution is assumed beyond that. p is the share of sign patterns whose mean is as far from 0 as
    the one seen: of all patterns where at most 16 differences are not 0 (then it is exact), else of `n` random ones and the one
    seen, (b + 1) / (n + 1), which never is 0 (Phipson and Smyth 2010).

    Args:
        differences: [pictures] a - b.
        n, seed: number of random patterns and their seed.

    Raises:
        InputError: no differences, not finite ones, n below 1.
    """
    values = _values(differences, "differences")
    _check(0.5, n)
    moving = values[values != 0]  # signs of zeros change nothing
    seen = abs(moving.sum())
    return _share(lambda signs: np.abs(signs @ moving), seen, moving.size, n, seed)


def paired_p_value(
    a: Sequence[Sequence[float]] | np.ndarray,
    b: Sequence[Sequence[float]] | np.ndarray,
    of: Callable[[np.ndarray], np.ndarray] = ratio,
    n: int = 9999,
    seed: int = 0,
) -> float:
    """Two-sided p-value of of(sums of a) - of(sums of b), by exchanging the two methods' rows picture by picture.

    As :func:`sign_flip_p_value`, for statistics of sums (``stats.paired_statistic``); for means both are the same test. Patterns
    under which the statistic is not finite count as at least as far from 0 as the one seen.

    Raises:
        InputError: sums not of the same pictures, or a statistic of all pictures that is not finite.
    """
    first, second = _paired(a, b)
    _check(0.5, n)
    seen = abs(float(of(first.sum(0)) - of(second.sum(0))))
    if not np.isfinite(seen):
        raise InputError("the statistic of all pictures is not a finite number: it is a rate of nothing")
    half, both = (first - second) / 2, (first + second).sum(0) / 2
    half = half[half.any(axis=1)]

    def distance(signs: np.ndarray) -> np.ndarray:
        moved = signs @ half
        far = np.abs(of(both + moved) - of(both - moved))
        return np.where(np.isfinite(far), far, np.inf)

    return _share(distance, seen, len(half), n, seed)


def _share(distance: Callable[[np.ndarray], np.ndarray], seen: float, pairs: int, n: int, seed: int) -> float:
    least = seen * (1 - 1e-9)  # the pattern seen itself must count, however its sum is rounded
    if pairs <= _EXACT:
        bits = np.arange(2**pairs)[:, None] >> np.arange(pairs) & 1
        return float((distance(2.0 * bits - 1) >= least).mean())
    far = sum(int((distance(signs) >= least).sum()) for signs in _signs(pairs, n, seed))
    return (far + 1) / (n + 1)


def _signs(pairs: int, n: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK // pairs)
    for start in range(0, n, rows):
        yield 2.0 * random.integers(0, 2, size=(min(rows, n - start), pairs)) - 1


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """[m] p-values adjusted for being m of one family, in the order given (Holm 1979, step-down Bonferroni).

    The i-th smallest is multiplied by m - i (i from 0), never falls below a smaller one's, and is 1 at most. Those below alpha
    are significant with a family-wise error of alpha at most, however the tests depend on each other.

    Raises:
        InputError: no p-values, or one out of 0..1.
    """
    values = _values(p_values, "p-values")
    if (values < 0).any() or (values > 1).any():
        raise InputError("p-values lie between 0 and 1")
    order = np.argsort(values, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1)))
    out = np.empty_like(adjusted)
    out[order] = adjusted
    return out


@dataclass(frozen=True)
class Equivalence:
    """A paired difference against a margin. lo, hi: its 90 % interval (at alpha = 0.05).

    equivalent: the interval lies within -margin..margin; not_worse: it lies above -margin; worse: it lies below -margin. None of
    them: the data do not settle it.
    """

    mean: float
    lo: float
    hi: float
    margin: float

    @property
    def equivalent(self) -> bool:
        return -self.margin < self.lo and self.hi < self.margin

    @property
    def not_worse(self) -> bool:
        return -self.margin < self.lo

    @property
    def worse(self) -> bool:
        return self.hi < -self.margin

    def __str__(self) -> str:
        """'+0.20 [-0.41, +0.83] (90 %): equivalent within 2'."""
        m = f"{self.margin:g}"
        words = (
            f"equivalent within {m}" if self.equivalent
            else f"better by more than {m}" if self.lo > self.margin
            else f"not worse by {m}" if self.not_worse
            else f"worse by more than {m}" if self.worse
            else f"not settled: a loss over {m} is left open"
        )  # fmt: skip
        return f"{self.mean:+.2f} [{self.lo:+.2f}, {self.hi:+.2f}] (90 %): {words}"


def equivalence(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, margin: float, n: int = 1000, seed: int = 0
) -> Equivalence:
    """Whether the mean of a - b over the same pictures lies within -margin..margin: two one-sided tests at 5 % each.

    Both tests reject exactly where the 90 % interval lies within the margin (Schuirmann 1987); here it is the bootstrap's. The
    margin is what a reader would call no loss, in the scores' unit; it must be fixed before the results are seen.

    Raises:
        InputError: scores not of the same pictures, or a margin not above 0.
    """
    if not margin > 0:
        raise InputError(f"a margin of equivalence is a positive number, not {margin}")
    first, second = _values(a, "a"), _values(b, "b")
    if first.shape != second.shape:
        raise InputError(f"paired scores must come from the same pictures: {first.size} against {second.size}")
    difference = first - second
    lo, hi = bootstrap_interval(difference, n, seed, level=0.90)
    return Equivalence(float(difference.mean()), lo, hi, float(margin))
