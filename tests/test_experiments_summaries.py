"""Numbers about courses over iterations, against values known by hand or from pandas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dyrate_lib import InputError
from dyrate_lib.compare import claims
from dyrate_lib.experiments.summaries import (
    asked_for,
    change_between_thirds,
    difference_with_interval,
    largest,
    mean_course,
    mean_with_interval,
    show_interval,
    spread_with_interval,
    step_rank_correlation,
    verdict_line,
)


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=20), rng.integers(0, 4, 30), np.repeat([1.0, 0.5, 2.0], 5)):
        wanted = pd.DataFrame({"x": values, "t": np.arange(len(values))}).corr(method="spearman").iloc[0, 1]
        assert step_rank_correlation(values) == pytest.approx(wanted)
    assert step_rank_correlation([1, 2, 3]) == pytest.approx(1.0)
    assert step_rank_correlation([3, 2, 1]) == pytest.approx(-1.0)
    assert step_rank_correlation([0.5] * 9) == 0.0 == step_rank_correlation([1.0])


def test_change_between_thirds():
    assert change_between_thirds([1, 1, 5, 5, 2, 4]) == pytest.approx(2.0)
    assert change_between_thirds([1, 9]) == pytest.approx(8.0)
    assert change_between_thirds([3]) == 0.0
    with pytest.raises(InputError):
        change_between_thirds([])


def test_mean_course_stops_when_half_have_ended():
    course = mean_course([[1, 1, 1, 1], [3, 3], [2, 2, 2]])
    assert course["step"].tolist() == [0, 1, 2]
    assert course["mean"].tolist() == [2.0, 2.0, 1.5]
    assert course["n"].tolist() == [3, 3, 2]
    assert np.all(course["lo"] <= course["mean"]) and np.all(course["mean"] <= course["hi"])
    assert mean_course([[0.0, 1.0]])["hi"].tolist() == [0.0, 1.0]  # one picture: no spread is known


def test_intervals_hold_the_estimate_and_shrink_with_n():
    rng = np.random.default_rng(1)
    few, many = rng.normal(2, 1, 20), rng.normal(2, 1, 2000)
    for function in (mean_with_interval, spread_with_interval):
        small, large = function(few), function(many)
        assert small["lo"] <= small["mean"] <= small["hi"]
        assert large["hi"] - large["lo"] < small["hi"] - small["lo"]
        assert large["n"] == 2000
    assert spread_with_interval(many)["mean"] == pytest.approx(1.0, abs=0.1)
    assert spread_with_interval([4.0]) == {"mean": 0.0, "lo": 0.0, "hi": 0.0, "n": 1}
    paired = difference_with_interval(few + 1, few)
    assert paired["lo"] == pytest.approx(1.0) and paired["hi"] == pytest.approx(1.0) and paired["n"] == 20


def test_show_interval():
    assert show_interval({"mean": 1, "lo": 0.5, "hi": 2.25}, 2) == "1.00 [0.50, 2.25]"


def test_the_worst_case_is_unknown_if_one_case_is():
    assert largest([0.5, 0.25]) == 0.5 and largest(x for x in (-1, -2)) == -1
    assert np.isnan(largest([0.01, np.nan, 0.0])) and max([0.01, np.nan, 0.0]) == 0.01


def test_verdicts_follow_the_written_criteria():
    rising = {name: {"mean": 0.2, "lo": 0.1, "hi": 0.3, "n": 500} for name in claims()["C9"].quantities}
    assert "borne out" in verdict_line("C9", rising) and "not borne out" not in verdict_line("C9", rising)
    flat = {name: {"mean": 0.0, "lo": -0.1, "hi": 0.0, "n": 500} for name in rising}
    assert "not borne out" in verdict_line("C9", flat)
    few = {name: {**value, "n": 3} for name, value in rising.items()}
    assert "cannot be judged here" in verdict_line("C9", few)
    assert set(asked_for("C9", {**rising, "c1.small.short.deep.img_change": 1})) == set(rising)


def test_a_claim_asked_anew_is_judged_anew_where_wanted():
    fine = {name: {"mean": 0.0, "lo": -1.0, "hi": 1.0, "n": 1000} for name in claims(beyond=True)["C10"].quantities}
    assert ": borne out" in verdict_line("C10", fine) and ": borne out" in verdict_line("C10", fine, beyond=True)
    assert set(asked_for("C10", fine)) == set(claims()["C10"].quantities) < set(asked_for("C10", fine, beyond=True))
    worse = {**fine, "c10.small.pope.dyrate_minus_original": {"mean": -3.0, "lo": -4.0, "hi": -2.0, "n": 1000}}
    assert ": borne out" in verdict_line("C10", worse) and ": partly" in verdict_line("C10", worse, beyond=True)
    with pytest.raises(KeyError):
        verdict_line("C11", {})
    assert "cannot be judged here" in verdict_line("C11", {}, beyond=True)
