"""Intervals: known values, coverage by simulation, and what happens at the ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib.errors import InputError
from dyrate_lib.stats import (
    bootstrap_interval,
    bootstrap_means,
    bootstrap_statistic,
    mean_over_seeds,
    paired_difference,
    paired_statistic,
    proportion_interval,
    ratio,
)

scores = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40)


def test_bootstrap_equals_the_normal_interval_for_many_pictures():
    values = np.random.default_rng(0).normal(100, 20, 400)
    lo, hi = bootstrap_interval(values, n=4000)
    half = 1.96 * values.std() / 20
    assert lo == pytest.approx(values.mean() - half, abs=0.25)
    assert hi == pytest.approx(values.mean() + half, abs=0.25)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        lo, hi = bootstrap_interval(random.exponential(1.0, 80), n=300, seed=trial, level=0.9)
        hits += lo <= 1.0 <= hi
    assert 165 <= hits <= 195  # 180 expected; the percentile interval is known to be a little short on skewed data


def test_seed_decides_and_chunks_do_not_matter(monkeypatch):
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    whole = bootstrap_means(values, 100, 5)
    monkeypatch.setattr("dyrate_lib.stats._CHUNK", 170)  # three resamples at a time, the last chunk shorter
    assert bootstrap_means(values, 100, 5).tolist() == whole.tolist()
    assert whole.shape == (100,)


@given(scores)
def test_interval_lies_within_the_values(values):
    lo, hi = bootstrap_interval(values, n=50)
    assert min(values) - 1e-9 <= lo <= hi <= max(values) + 1e-9


@given(scores, st.floats(-100, 100))
def test_shifting_a_method_shifts_its_paired_difference(values, shift):
    mean, lo, hi = paired_difference(np.add(values, shift), values, n=50)
    assert mean == pytest.approx(shift, abs=1e-6) and lo == pytest.approx(shift, abs=1e-6)
    assert hi == pytest.approx(shift, abs=1e-6)


def test_pairing_narrows_the_interval():
    random = np.random.default_rng(3)
    easy_to_hard = random.normal(100, 40, 300)
    better = easy_to_hard + random.normal(2, 3, 300)
    mean, lo, hi = paired_difference(better, easy_to_hard)
    assert 1 < lo < mean < hi < 3
    apart = bootstrap_interval(better)
    assert apart[1] - apart[0] > 5 * (hi - lo)
    back = paired_difference(easy_to_hard, better)
    assert back[0] == pytest.approx(-mean)


def test_one_picture_tells_nothing_about_spread():
    assert bootstrap_interval([7.0]) == (7.0, 7.0)


counts = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30)


def test_a_mean_is_a_statistic_of_sums_in_the_same_resamples():
    values = np.random.default_rng(5).normal(size=40)
    sums = np.column_stack([values, np.ones(40)])
    mean, lo, hi = bootstrap_statistic(sums, ratio, n=300, seed=2)
    assert mean == pytest.approx(values.mean())
    assert (lo, hi) == pytest.approx(bootstrap_interval(values, n=300, seed=2))


def test_a_ratio_weighs_pictures_by_their_denominators():
    sums = [[0, 1], [0, 1], [9, 18]]  # the mean of the three ratios is 1/6
    assert bootstrap_statistic(sums)[0] == pytest.approx(9 / 20)
    assert bootstrap_statistic(sums, lambda s: s[..., 1] - s[..., 0])[0] == 11
    assert ratio(np.array([[1, 2], [0, 0], [3, 0]])).tolist()[0] == 0.5
    assert np.isnan(ratio(np.array([[1, 2], [0, 0], [3, 0]]))[1:]).all()


@given(counts)
def test_a_ratio_lies_in_its_interval_and_against_itself_is_no_difference(rows):
    value, lo, hi = bootstrap_statistic(rows, n=60)
    each = [a / b for a, b in rows]
    assert min(each) - 1e-9 <= lo <= hi <= max(each) + 1e-9 and min(each) - 1e-9 <= value <= max(each) + 1e-9
    assert paired_statistic(rows, rows, n=60) == (0.0, 0.0, 0.0)


def test_paired_ratios_share_their_resamples():
    random = np.random.default_rng(6)
    named = random.integers(1, 6, 200)
    wrong = random.binomial(named, 0.3)
    fewer = np.maximum(wrong - random.binomial(1, 0.2, 200), 0)
    a, b = np.column_stack([fewer, named]), np.column_stack([wrong, named])
    gap, lo, hi = paired_statistic(a, b)
    assert gap == pytest.approx((fewer.sum() - wrong.sum()) / named.sum()) and lo < gap < hi < 0
    apart = bootstrap_statistic(b)
    assert hi - lo < (apart[2] - apart[1]) / 2  # pairing narrows it
    assert paired_statistic(b, a)[0] == pytest.approx(-gap)


def test_resamples_of_a_rate_of_nothing_are_left_out():
    sums = [[1, 2], *[[0, 0]] * 5]
    assert bootstrap_statistic(sums, n=200) == (0.5, 0.5, 0.5)
    with pytest.raises(InputError, match="a rate of nothing"):
        bootstrap_statistic([[0, 0], [0, 0]])


def test_chunks_of_sums_do_not_matter(monkeypatch):
    sums = np.random.default_rng(7).random((30, 2))
    whole = bootstrap_statistic(sums, n=90, seed=4)
    monkeypatch.setattr("dyrate_lib.stats._CHUNK", 170)
    assert bootstrap_statistic(sums, n=90, seed=4) == whole


def test_the_interval_of_a_ratio_covers_the_truth_about_as_often_as_it_says():
    random, hits = np.random.default_rng(8), 0
    for trial in range(200):
        named = random.integers(1, 8, 100)
        _, lo, hi = bootstrap_statistic(
            np.column_stack([random.binomial(named, 0.4), named]), n=300, seed=trial, level=0.9
        )
        hits += lo <= 0.4 <= hi
    assert 168 <= hits <= 192


def test_seeds_are_averaged_picture_by_picture():
    assert mean_over_seeds([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]]).tolist() == [3.0, 3.0]


def test_wilson_interval():
    lo, hi = proportion_interval(8, 10)
    assert (lo, hi) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert proportion_interval(0, 20)[0] == 0.0 and 0.1 < proportion_interval(0, 20)[1] < 0.2
    assert proportion_interval(20, 20)[1] == 1.0


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_proportion_lies_in_its_interval(counts):
    successes, n = counts
    lo, hi = proportion_interval(successes, n)
    assert 0 <= lo <= successes / n <= hi <= 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bootstrap_interval([]), "at least one number"),
        (lambda: bootstrap_interval([[1.0, 2.0]]), "at least one number"),
        (lambda: bootstrap_interval([1.0, float("nan")]), "not a finite number"),
        (lambda: bootstrap_interval([1.0], level=1.0), "between 0 and 1"),
        (lambda: bootstrap_interval([1.0], n=0), "at least one resample"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "same pictures: 2 against 1"),
        (lambda: bootstrap_statistic([1.0, 2.0]), "numbers that add up"),
        (lambda: bootstrap_statistic([]), "numbers that add up"),
        (lambda: bootstrap_statistic([[1.0, float("inf")]]), "not a finite number"),
        (lambda: bootstrap_statistic([[1.0, 2.0]], level=0.0), "between 0 and 1"),
        (lambda: bootstrap_statistic([[1.0, 2.0]], n=0), "at least one resample"),
        (lambda: paired_statistic([[1.0, 2.0]], [[1.0, 2.0]] * 2), "same pictures"),
        (lambda: mean_over_seeds([[1.0, 2.0], [1.0]]), "scores a seed: 2, 1"),
        (lambda: mean_over_seeds([]), "scores a seed: none"),
        (lambda: proportion_interval(3, 2), "3 of 2"),
        (lambda: proportion_interval(0, 0), "0 of 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
