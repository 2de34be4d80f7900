"""Intervals and differences, so that no score stands without its uncertainty. Pure NumPy, deterministic by seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .errors import InputError

_CHUNK = 4_000_000  # resampled numbers held at once: 32 MB


def _values(scores: Sequence[float] | np.ndarray, name: str = "scores") -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size < 1:
        raise InputError(f"{name} must be a list of at least one number, not of shape {values.shape}")
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds a value that is not a finite number")
    return values


def _check(level: float, n: int) -> None:
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, not {level}")
    if n < 1:
        raise InputError(f"at least one resample is needed, not {n}")


def bootstrap_means(per_image: Sequence[float] | np.ndarray, n: int = 1000, seed: int = 0) -> np.ndarray:
    """[n] float64 means of resamples, with replacement, of the per-image scores. The pictures are what is resampled."""
    values = _values(per_image)
    _check(0.5, n)
    random = np.random.default_rng(seed)
    rows = max(1, _CHUNK // values.size)
    means = [
        values[random.integers(0, values.size, size=(min(rows, n - start), values.size))].mean(axis=1)
        for start in range(0, n, rows)
    ]
    return np.concatenate(means)


def bootstrap_sums(per_picture: np.ndarray, n: int = 1000, seed: int = 0) -> np.ndarray:
    """[n, k] sums over resamples, with replacement, of pictures with k statistics each; `per_picture` [pictures, k] float64.

    For scores that are functions of sums (F1, say). The same size and seed resample the same pictures, here and in
    `bootstrap_means`. Raises InputError for no pictures, values that are not finite, n below 1.
    """
    values = np.asarray(per_picture, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InputError(f"statistics must be finite numbers [pictures, k] of at least one picture, not {values.shape}")
    _check(0.5, n)
    random, size = np.random.default_rng(seed), len(values)
    rows, sums = max(1, _CHUNK // size), []
    for start in range(0, n, rows):
        some = min(rows, n - start)
        drawn = random.integers(0, size, size=(some, size)) + np.arange(some)[:, None] * size
        # how often each picture was drawn, times its statistics
        sums.append(np.bincount(drawn.ravel(), minlength=some * size).reshape(some, size) @ values)
    return np.concatenate(sums)


def bootstrap_interval(
    per_image: Sequence[float] | np.ndarray, n: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean score over pictures.

    For CIDEr the corpus score is the mean of per-image scores, so resampling these resamples the corpus with one
    difference: the idf weights stay those of the whole set, they are not estimated anew in every resample. The interval
    therefore holds for "other pictures, the same weighting of words".

    Args:
        per_image: [pictures] scores in the unit of the mean (CIDEr x 100).
        n, seed: number of resamples and their seed; level: coverage.

    Returns:
        (lo, hi). With one picture both equal its score: nothing is known about the spread.

    Raises:
        InputError: no scores, scores that are not finite, a level outside (0, 1), n below 1.
    """
    _check(level, n)
    lo, hi = np.quantile(bootstrap_means(per_image, n, seed), [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of `a - b` over the same pictures, with its bootstrap interval: (mean, lo, hi).

    Pairing removes the spread between easy and hard pictures, which is far larger than that between methods.
    Raises InputError when the two do not have one score for each of the same number of pictures.
    """
    first, second = _values(a, "a"), _values(b, "b")
    if first.shape != second.shape:
        raise InputError(f"paired scores must come from the same pictures: {first.size} against {second.size}")
    difference = first - second
    lo, hi = bootstrap_interval(difference, n, seed, level)
    return float(difference.mean()), lo, hi


def mean_over_seeds(per_seed: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """[pictures] mean of each picture's score over the seeds a method was trained or drawn with; one list of scores a seed.

    An interval over pictures of these says "other pictures, these seeds". InputError unless all seeds have the same pictures.
    """
    seeds = [_values(scores, f"scores of seed {i}") for i, scores in enumerate(per_seed)]
    if not seeds or len({scores.size for scores in seeds}) > 1:
        sizes = ", ".join(str(scores.size) for scores in seeds) or "none"
        raise InputError(f"every seed needs one score for each of the same pictures; scores a seed: {sizes}")
    return np.mean(seeds, axis=0)


def ratio(sums: np.ndarray) -> np.ndarray:
    """[...] first over second of sums [..., 2]; NaN where the second is 0: a rate of nothing is no rate."""
    sums = np.asarray(sums, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] == 0, np.nan, sums[..., 0] / sums[..., 1])


def _sums(values: Sequence[Sequence[float]] | np.ndarray, name: str = "sums") -> np.ndarray:
    sums = np.asarray(values, dtype=np.float64)
    if sums.ndim != 2 or not sums.size:
        raise InputError(f"{name} must be a table [pictures, numbers that add up], not of shape {sums.shape}")
    if not np.isfinite(sums).all():
        raise InputError(f"{name} hold a value that is not a finite number")
    return sums


def bootstrap_statistic(
    sums: Sequence[Sequence[float]] | np.ndarray,
    of: Callable[[np.ndarray], np.ndarray] = ratio,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """A statistic of sums over pictures with its percentile bootstrap interval: (statistic, lo, hi).

    For rates whose denominators differ by picture (hallucinated of named objects, precision, F1): the mean of per-picture ratios
    is another number. Pictures are what is resampled; the resamples are those of :func:`bootstrap_interval` under the same seed.

    Args:
        sums: [pictures, k] what each picture adds to k sums. Several answers about one picture, or several seeds, are added up in
            its row before: they are not independent.
        of: the statistic of the sums, [..., k] -> [...]; :func:`ratio` by default.
        n, seed, level: as in :func:`bootstrap_interval`.

    Returns:
        (statistic, lo, hi). Resamples in which it is not finite (a rate of nothing) are left out: the interval is of the
        resamples that have one.

    Raises:
        InputError: no table of finite numbers, or the statistic of all pictures is not finite.
    """
    table = _sums(sums)
    _check(level, n)
    whole = float(of(table.sum(axis=0)))
    if not np.isfinite(whole):
        raise InputError("the statistic of all pictures is not a finite number: it is a rate of nothing")
    drawn = of(bootstrap_sums(table, n, seed))
    finite = drawn[np.isfinite(drawn)]
    if not finite.size:
        raise InputError(
            f"the statistic is not a finite number in any of {n} resamples: too few pictures have any of it"
        )
    lo, hi = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return whole, float(lo), float(hi)


def paired_statistic(
    a: Sequence[Sequence[float]] | np.ndarray,
    b: Sequence[Sequence[float]] | np.ndarray,
    of: Callable[[np.ndarray], np.ndarray] = ratio,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """of(sums of a) - of(sums of b) over the same pictures, both in the same resamples: (difference, lo, hi).

    a, b: [pictures, k]; the rest as in :func:`bootstrap_statistic`. InputError unless both are of the same pictures.
    """
    first, second = _paired(a, b)
    k = first.shape[1]
    return bootstrap_statistic(np.hstack([first, second]), lambda s: of(s[..., :k]) - of(s[..., k:]), n, seed, level)


def _paired(
    a: Sequence[Sequence[float]] | np.ndarray, b: Sequence[Sequence[float]] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    first, second = _sums(a, "sums a"), _sums(b, "sums b")
    if first.shape != second.shape:
        raise InputError(f"paired sums must come from the same pictures: {first.shape} against {second.shape}")
    return first, second


def proportion_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, (lo, hi) in 0..1; sound at 0 and at n successes as well.

    Raises InputError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"{successes} of {n} is not a proportion")
    _check(level, 1)
    z = _normal_quantile((1 + level) / 2)
    share = successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # at the ends one bound is the end itself; rounding must not move it
    lo = 0.0 if successes == 0 else max(0.0, centre - half)
    hi = 1.0 if successes == n else min(1.0, centre + half)
    return float(lo), float(hi)


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)
