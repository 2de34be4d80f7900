"""p-values against published and counted ones, Holm's adjustment by hand, equivalence at its margins."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib.errors import InputError
from dyrate_lib.stats import paired_statistic
from dyrate_lib.stats_tests import Equivalence, equivalence, holm, paired_p_value, sign_flip_p_value

# Darwin's plants: crossed minus self-fertilised, eighths of an inch (Fisher 1935, Sec. 17)
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_fisher_counted_1726_of_32768_patterns():
    assert sign_flip_p_value(DARWIN) == pytest.approx(1726 / 32768)
    assert sign_flip_p_value([*DARWIN, 0, 0, 0]) == pytest.approx(1726 / 32768)


@pytest.mark.parametrize(
    "differences, p",
    [([1, 2, 3], 2 / 8), ([1, -1], 1.0), ([0, 0], 1.0), ([5], 1.0), ([1, 1, 1, 1, 1], 2 / 32), ([1, 1, -1], 1.0)],
)
def test_sign_flips_by_hand(differences, p):
    assert sign_flip_p_value(differences) == pytest.approx(p)


def test_random_patterns_come_near_the_exact_share(monkeypatch):
    monkeypatch.setattr("dyrate_lib.stats_tests._EXACT", 0)
    p = sign_flip_p_value(DARWIN, n=20_000)
    assert p == pytest.approx(1726 / 32768, abs=0.006)
    assert p == sign_flip_p_value(DARWIN, n=20_000) != sign_flip_p_value(DARWIN, n=20_000, seed=1)
    monkeypatch.setattr("dyrate_lib.stats_tests._CHUNK", 100)
    assert sign_flip_p_value(DARWIN, n=500, seed=3) == pytest.approx(1726 / 32768, abs=0.04)


def test_a_random_p_value_is_never_zero():
    assert sign_flip_p_value(np.ones(100), n=99) == pytest.approx(1 / 100)


def test_p_values_are_even_where_nothing_differs():
    random = np.random.default_rng(0)
    found = np.array([sign_flip_p_value(random.normal(size=30), n=199, seed=i) for i in range(1000)])
    assert 0.03 <= (found <= 0.05).mean() <= 0.07 and 0.45 <= (found <= 0.5).mean() <= 0.55


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_exchanging_rows_equals_flipping_signs_for_means(pairs):
    a, b = (np.column_stack([[p[i] for p in pairs], np.ones(len(pairs))]) for i in (0, 1))
    assert paired_p_value(a, b) == pytest.approx(sign_flip_p_value(a[:, 0] - b[:, 0]))


def test_a_ratios_p_value_equals_counting_exchanges():
    a = np.array([[1, 2], [0, 3], [2, 2], [1, 4], [3, 5]], dtype=float)
    b = np.array([[2, 2], [1, 3], [2, 3], [2, 4], [4, 4]], dtype=float)
    gaps = []
    for swap in itertools.product([False, True], repeat=5):
        s = np.array(swap)[:, None]
        x, y = np.where(s, b, a).sum(0), np.where(s, a, b).sum(0)
        gaps.append(abs(x[0] / x[1] - y[0] / y[1]))
    share = np.mean(np.array(gaps) >= gaps[0] - 1e-12)
    assert paired_p_value(a, b) == pytest.approx(share) and gaps[0] == pytest.approx(abs(paired_statistic(a, b)[0]))


def test_a_clear_difference_of_ratios_has_a_small_p_value():
    random = np.random.default_rng(1)
    named = random.integers(1, 6, 300)
    a = np.column_stack([random.binomial(named, 0.1), named])
    b = np.column_stack([random.binomial(named, 0.4), named])
    assert paired_p_value(a, b, n=999) == pytest.approx(1 / 1000) and paired_p_value(a, a, n=999) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0]) and holm([0.02]) == pytest.approx([0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p) - 1e-12).all() and (adjusted <= np.minimum(1, np.array(p) * len(p)) + 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all() and holm(p[::-1])[::-1] == pytest.approx(adjusted)


@pytest.mark.parametrize(
    "lo, hi, equivalent, not_worse, worse, words",
    [
        (-0.9, 0.9, True, True, False, "equivalent within 1"),
        (-0.5, 3.0, False, True, False, "not worse by 1"),
        (1.5, 3.0, False, True, False, "better by more than 1"),
        (-3.0, 0.5, False, False, False, "not settled: a loss over 1 is left open"),
        (-3.0, -1.5, False, False, True, "worse by more than 1"),
        (-1.0, 0.5, False, False, False, "not settled"),  # the margin itself is not within it
    ],
)
def test_a_difference_against_its_margin(lo, hi, equivalent, not_worse, worse, words):
    e = Equivalence((lo + hi) / 2, lo, hi, 1.0)
    assert (e.equivalent, e.not_worse, e.worse) == (equivalent, not_worse, worse) and words in str(e)


def test_equivalence_is_judged_by_the_90_percent_interval():
    random = np.random.default_rng(2)
    a = random.normal(0, 1, 400)
    e = equivalence(a + 0.1, random.normal(0, 1, 400), 0.3)
    assert e.hi - e.lo == pytest.approx(2 * 1.645 * np.sqrt(2) / 20, rel=0.15)
    assert equivalence(a, a, 0.1).equivalent and str(equivalence(a, a, 0.1)).startswith(
        "+0.00 [+0.00, +0.00] (90 %): equivalent"
    )


def test_a_difference_at_the_margin_passes_in_about_one_of_twenty():
    random, passed = np.random.default_rng(3), 0
    for trial in range(300):
        passed += equivalence(random.normal(1.0, 2.0, 60), np.zeros(60), 1.0, n=300, seed=trial).equivalent
    assert 4 <= passed <= 30


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sign_flip_p_value([]), "at least one number"),
        (lambda: sign_flip_p_value([1.0], n=0), "at least one resample"),
        (lambda: paired_p_value([[1, 2]], [[1, 2], [1, 2]]), "same pictures"),
        (lambda: paired_p_value([[0, 0]], [[1, 2]]), "a rate of nothing"),
        (lambda: holm([]), "at least one number"),
        (lambda: holm([0.5, 1.2]), "between 0 and 1"),
        (lambda: equivalence([1.0], [1.0, 2.0], 1.0), "same pictures"),
        (lambda: equivalence([1.0], [1.0], 0.0), "positive number"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
