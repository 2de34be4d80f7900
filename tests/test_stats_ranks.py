"""Rank correlations: published values, ties and controls by hand, and what counts as following nothing."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib.errors import InputError
from dyrate_lib.stats_ranks import (
    correlation_over_pictures,
    course_correlations,
    mean_correlation,
    partial_spearman,
    ranks,
    spearman,
)

IQ = [106, 86, 100, 101, 99, 103, 97, 113, 112, 110]
HOURS = [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]
lists = st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=2, max_size=20)


def test_ranks_share_ties():
    assert ranks([3, 1, 3, 2]).tolist() == [2.5, 0, 2.5, 1]
    assert ranks([]).tolist() == []


def test_spearman_of_known_lists():
    assert spearman(IQ, HOURS) == pytest.approx(-29 / 165)  # a common textbook example without ties
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman([1, 2, 3], [10, 100, 1000]) == 1.0 and spearman([1, 2, 3], [3, 2, 1]) == -1.0


@given(lists)
def test_spearman_is_pandas_and_knows_no_scale(rows):
    x, y, _ = (np.array(column, dtype=float) for column in zip(*rows))
    wanted = pd.Series(ranks(x)).corr(pd.Series(ranks(y))) if np.ptp(x) and np.ptp(y) else np.nan
    assert spearman(x, y) == pytest.approx(wanted, nan_ok=True, abs=1e-12)
    assert spearman(np.exp(x), -y) == pytest.approx(-wanted, nan_ok=True, abs=1e-12)


@given(lists)
def test_partial_spearman_is_the_correlation_of_what_the_control_leaves(rows):
    x, y, z = (ranks(column) for column in zip(*rows))
    found = partial_spearman(*zip(*rows))
    design = np.column_stack([np.ones(len(z)), z])

    def rest(values):
        return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]

    a, b = rest(x), rest(y)
    if np.isnan(found):
        assert a @ a < 1e-9 or b @ b < 1e-9
    else:
        assert found == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), abs=1e-6)


def test_a_control_that_explains_both_leaves_nothing():
    random = np.random.default_rng(0)
    step = np.arange(400)
    x, y = step + random.normal(0, 60, 400), step + random.normal(0, 60, 400)
    assert spearman(x, y) > 0.5 and abs(partial_spearman(x, y, step)) < 0.15
    assert np.isnan(partial_spearman(step, y, step)) and partial_spearman(x, y, np.ones(400)) == spearman(x, y)


def test_courses_follow_their_needs_picture_by_picture():
    need = [1, 1, 0, 0]
    courses = [[0.1, 0.1, 0.5, 0.5], [0.5, 0.4, 0.2, 0.1], [0.3] * 4, [0.1, 0.2, 0.3, 0.4]]
    found = course_correlations(courses, [need] * 4)
    assert found[0] == pytest.approx(-1.0) and found[1] > 0.8 and found[2] == 0.0 and found[3] < -0.8
    by_step = course_correlations(courses, [need] * 4, by_step=True)
    assert by_step[0] == pytest.approx(-1.0) and by_step[2] == 0.0
    assert by_step[3] == 0.0  # the clock alone


def test_unknown_needs_are_left_out_and_undefined_pictures_said():
    course = [0.1, 9.0, 0.5, 0.5, 0.2]
    assert (
        course_correlations([course], [[1, np.nan, 0, 0, 1]])[0]
        == course_correlations([[0.1, 0.5, 0.5, 0.2]], [[1, 0, 0, 1]])[0]
    )
    nothing = course_correlations([course] * 3, [[1] * 5, [np.nan] * 5, [1, np.nan, np.nan, np.nan, np.nan]])
    assert np.isnan(nothing).all()
    assert np.isnan(course_correlations([[1.0, 2.0]], [[0, 1]], by_step=True)[0])  # need and step are one
    summary = mean_correlation([0.5, np.nan, 0.1, 0.3], n=200)
    assert summary["mean"] == pytest.approx(0.3) and summary["n"] == 3 and summary["lo"] <= 0.3 <= summary["hi"]


def test_correlation_over_pictures_covers_the_truth():
    random = np.random.default_rng(1)
    x = random.normal(size=300)
    y = 0.6 * x + 0.8 * random.normal(size=300)
    found = correlation_over_pictures(x, y, n=300)
    assert (
        found["lo"] < 6 / np.pi * np.arcsin(0.3) < found["hi"] and found["n"] == 300
    )  # Spearman's rho of a normal pair
    assert found["hi"] - found["lo"] < 0.25
    given_x = correlation_over_pictures(y, y + random.normal(0, 9, 300), control=x, n=100)
    assert given_x["lo"] < given_x["mean"] < given_x["hi"]
    assert correlation_over_pictures(x, y, n=50, seed=3) == correlation_over_pictures(x, y, n=50, seed=3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: spearman([1, 2], [1]), "lists of one length"),
        (lambda: spearman([1, float("nan")], [1, 2]), "finite numbers"),
        (lambda: course_correlations([[1, 2]], []), "1 courses for the needs of 0"),
        (lambda: course_correlations([[1, 2]], [[1]]), "one number a step"),
        (lambda: course_correlations([[1, float("inf")]], [[0, 1]]), "finite numbers"),
        (lambda: mean_correlation([float("nan")]), "no picture has"),
        (lambda: correlation_over_pictures([1, 1], [1, 2]), "not defined"),
        (lambda: correlation_over_pictures([1, 2], [1, 2], n=0), "at least 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
