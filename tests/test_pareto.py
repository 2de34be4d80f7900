"""Fronts by hand and by definition, their doubt, and curves read between their settings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib.errors import InputError
from dyrate_lib.pareto import OFF, ON, PERHAPS, Point, front, mean_scores, scores_at, standing
from dyrate_lib.stats import paired_difference

A, B, C, D = (
    Point("a", 0.2, 50, 48, 52),
    Point("b", 0.4, 80, 78, 82),
    Point("c", 0.5, 60, 58, 62),
    Point("d", 0.6, 81, 79, 83),
)
pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


def test_front_by_hand():
    assert [p.name for p in front([D, C, B, A])] == ["a", "b", "d"]
    assert standing([A, B, C, D]) == {"a": ON, "b": ON, "c": OFF, "d": PERHAPS}
    assert front([]) == [] and standing([]) == {}


@given(pairs)
def test_front_is_what_nothing_dominates(drawn):
    points = [Point(str(i), c, q, q - 0.5, q + 0.5) for i, (c, q) in enumerate(drawn)]
    names = {p.name for p in front(points)}
    for p in points:
        better = [
            q
            for q in points
            if q.cost <= p.cost and q.quality >= p.quality and (q.cost, q.quality) != (p.cost, p.quality)
        ]
        assert (p.name in names) == (not better)
    place = standing(points)
    assert all(p.name in names for p in points if place[p.name] == ON)
    assert not any(p.name in names for p in points if place[p.name] == OFF)


def test_pairing_settles_what_apart_is_open():
    random = np.random.default_rng(0)
    hard = random.normal(70, 30, 400)
    scores = {"cheap": hard, "dear": hard + random.normal(1.5, 4, 400)}
    points = [Point(n, c, s.mean(), s.mean() - 3, s.mean() + 3) for (n, s), c in zip(scores.items(), (0.3, 0.5))]
    assert standing(points)["dear"] == PERHAPS
    by_pair = standing(points, lambda a, b: paired_difference(scores[a.name], scores[b.name]))
    assert by_pair == {"cheap": ON, "dear": ON}


def test_costs_within_the_tolerance_are_equal():
    worse = Point("worse", 0.330, 40, 39, 41)
    better = Point("better", 0.335, 60, 59, 61)
    assert standing([worse, better])["worse"] == ON
    assert standing([worse, better], cost_tolerance=0.01) == {"worse": OFF, "better": ON}


def test_between_two_settings_by_hand():
    scores = [[10.0, 0.0], [20.0, 8.0], [40.0, 8.0]]
    assert scores_at([0.2, 0.4, 0.8], scores, 0.3).tolist() == pytest.approx([15.0, 4.0])
    assert scores_at([0.8, 0.2, 0.4], [scores[2], scores[0], scores[1]], 0.7) == pytest.approx([35.0, 8.0])
    assert scores_at([0.2, 0.4, 0.8], scores, 0.4) == pytest.approx([20.0, 8.0])
    # trapezoids: (0.2 * 15 + 0.4 * 30) / 0.6, (0.2 * 4 + 0.4 * 8) / 0.6
    assert mean_scores([0.2, 0.4, 0.8], scores, 0.2, 0.8) == pytest.approx([25.0, 20 / 3])
    assert mean_scores([0.2, 0.4, 0.8], scores, 0.25, 0.35) == pytest.approx(
        [15.0, 4.0]
    )  # a straight piece: its middle
    assert mean_scores([0.2, 0.4, 0.8], scores, 0.3, 0.6)[0] == pytest.approx((0.1 * 17.5 + 0.2 * 25) / 0.3)


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=6, unique=True), st.data())
def test_curves_agree_with_numpy_and_lie_between_their_settings(costs, data):
    scores = np.random.default_rng(len(costs)).normal(size=(len(costs), 3))
    low, high = sorted(data.draw(st.lists(st.floats(min(costs), max(costs)), min_size=2, max_size=2, unique=True)))
    order = np.argsort(costs)
    for picture in range(3):
        wanted = np.interp(low, np.array(costs)[order], scores[order, picture])
        assert scores_at(costs, scores, low)[picture] == pytest.approx(wanted, abs=1e-9)
    area = mean_scores(costs, scores, low, high)
    assert (area >= scores.min(0) - 1e-6).all() and (area <= scores.max(0) + 1e-6).all()
    line = 3 * np.array(costs)[:, None] + 1  # on a line the mean over budgets is the value in the middle
    assert mean_scores(costs, line, low, high)[0] == pytest.approx(3 * (low + high) / 2 + 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Point("x", 0.1, 1, 2, 1), "x: a point needs"),
        (lambda: Point("x", float("nan"), 1, 0, 2), "finite cost"),
        (lambda: standing([A, A]), "distinct names"),
        (lambda: standing([A], cost_tolerance=-1), "not negative"),
        (lambda: scores_at([0.2, 0.4], [[1.0], [2.0]], 0.5), "outside the settings' costs, 0.2 to 0.4"),
        (lambda: scores_at([0.2, 0.2], [[1.0], [2.0]], 0.2), "same cost"),
        (lambda: scores_at([0.2], [[1.0], [2.0]], 0.2), "scores \\[settings, pictures\\]"),
        (lambda: scores_at([0.2], [[float("inf")]], 0.2), "finite"),
        (lambda: mean_scores([0.2, 0.4], [[1.0], [2.0]], 0.3, 0.3), "from low to high"),
        (lambda: mean_scores([0.2, 0.4], [[1.0], [2.0]], 0.1, 0.3), "outside"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
