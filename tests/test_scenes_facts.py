"""Facts of captions: references are true in every point, and each kind of error is counted once, where it belongs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib.errors import InputError
from dyrate_lib.scenes import FAMILIES, SPLITS, make_scene, references
from dyrate_lib.scenes.captions import LISTED, annotated_reference, spell, split_words
from dyrate_lib.scenes.facts import RATES, Facts, assign, caption_facts, fact_rates, fact_sums, match
from dyrate_lib.scenes.reading import POSITIONS, Mention, Sums, read_caption
from dyrate_lib.scenes.world import COLOR_NAMES, SHAPES, Ground, Scene, SceneObject
from dyrate_lib.stats import paired_statistic

ERRORS = [f.name for f in dataclasses.fields(Facts) if f.name.endswith(("wrong", "missed", "mistaken"))]
ERRORS += ["repeated", "fragments", "sums_unlike_list"]


def thing(shape, color, size, x, y):
    return SceneObject(shape, color, size, x, y, 20.0, 0.0, (0.0, 0.0, 0.0))


# top left, center, right (small); salient order: circle, ring, star, square
CIRCLE = thing("circle", "red", "large", 60, 60)
RING = thing("ring", "blue", "large", 170, 170)
STAR = thing("star", "red", "small", 40, 300)
SQUARE = thing("square", "green", "small", 300, 170)
EXTRA = thing("moon", "pink", "small", 310, 40)
GROUND = Ground("striped", "gray", (0.5,) * 3, (0.4,) * 3, 20.0, 0.0, 0.0, 0)
SCENE = Scene(0, "test", GROUND, (SQUARE, EXTRA, STAR, RING, CIRCLE))
PAIR = Scene(1, "test", GROUND, (RING, CIRCLE))


def differ(facts, **wanted):
    """The error counts that are not zero, against those wanted."""
    assert {name: getattr(facts, name) for name in ERRORS if getattr(facts, name)} == wanted
    return facts


@given(st.integers(0, 10_000), st.sampled_from(SPLITS), st.sampled_from(FAMILIES))
def test_a_reference_has_no_error_in_any_wording(seed, split, family):
    scene = make_scene(seed, split)
    for i, text in enumerate(references(scene, family)):
        facts = differ(caption_facts(text, scene, family))
        assert facts.named == facts.right == facts.asked == facts.sizes == len(scene.salient(LISTED[family]))
        assert facts.positions == (0 if family == "short" else facts.named)
        assert facts.grounds == facts.grounds_asked == ("background" in text)
        assert facts.sums == (0 if family != "narrative" else 6 if 2 <= facts.named <= 3 else 4)
        assert split_words(text) == [w for w, _ in annotated_reference(scene, family, i)]


def test_what_a_sentence_says():
    said = read_caption(
        "I can see a large red circle at the top left, a small blue ring at the left and a green star on a dotted navy "
        "background. So that makes three shapes, one large and one small, in red, blue and green, the first a circle and "
        "the last a star."
    )
    assert said.mentions == (
        Mention("red", "circle", "large", "top left"), Mention("blue", "ring", "small", "left"), Mention("green", "star"),
    )  # fmt: skip
    assert said.ground == ("dotted", "navy") and said.fragments == 0
    assert said.sums == Sums(3, 1, 1, ("red", "blue", "green"), "circle", "star")


@pytest.mark.parametrize(
    "text, mentions, fragments",
    [
        ("", 0, 0),
        ("a a a the at the the", 0, 0),
        ("a small red", 0, 1),  # cut off
        ("a red a large ring at the top", 0, 2),
        ("A Large RED circle at the", 1, 0),
        ("small small red red circle circle", 1, 2),
        ("a red circle at the red ring", 2, 0),
        ("at the top left left of a red circle", 1, 0),
        ("?!.. red circle,red circle", 2, 0),
        ("plain things, redder circles, xcircle", 0, 0),
    ],
)
def test_broken_text_is_read_as_far_as_it_goes(text, mentions, fragments):
    said = read_caption(text)
    assert (len(said.mentions), said.fragments) == (mentions, fragments)
    assert said.sums == Sums() and said.ground is None
    assert caption_facts(text, SCENE, "late").missed >= 3


@given(
    st.lists(
        st.sampled_from([*COLOR_NAMES[:3], *SHAPES[:3], "a", "at", "the", "top", "left", "large", "in", "two", ","])
    )
)
def test_counts_of_any_text_add_up(words):
    facts = caption_facts(" ".join(words), SCENE, "late")
    assert facts.named == facts.right + facts.wrong + facts.repeated
    assert facts.color_mistaken + facts.shape_mistaken <= facts.wrong
    assert facts.right - facts.asked + facts.missed >= 0 and facts.right <= len(SCENE.objects)
    assert 2 * facts.named + facts.fragments <= len(words)


def test_positions_are_those_of_the_world():
    seen = {o.position for s in range(60) for o in make_scene(s, "test").objects}
    assert seen == set(POSITIONS) and len(POSITIONS) == 9


LATE = "In detail: a large red circle at the top left, a large blue ring at the center, a small red star at the bottom left "
LATE += "and a small green square at the right."


@pytest.mark.parametrize(
    "old, new, wanted",
    [
        ("red star", "pink star", {"wrong": 1, "color_mistaken": 1, "missed": 1}),
        ("red star", "red heart", {"wrong": 1, "shape_mistaken": 1, "missed": 1}),
        ("red star", "white heart", {"wrong": 1, "missed": 1}),
        ("small red star", "large red star", {"sizes_wrong": 1}),
        ("small red star", "red star", {}),
        ("at the bottom left", "at the bottom", {"positions_wrong": 1}),
        ("at the bottom left", "at the moon", {"fragments": 1}),
        ("at the bottom left", "", {}),
        ("red star at the bottom left", "red circle at the bottom left", {"repeated": 1, "missed": 1}),
        ("a small red star at the bottom left", "", {"missed": 1}),
        (
            "a small red star at the bottom left",
            "a small pink moon at the top right",
            {"missed": 1},
        ),  # there, not asked for
        ("star", "", {"fragments": 1, "missed": 1}),
        ("at the right.", "at the right on a plain gray background.", {"grounds_wrong": 1}),
        ("at the right.", "at the right on a striped navy background.", {"grounds_wrong": 1}),
        ("at the right.", "at the right on a striped gray background.", {}),
    ],
)
def test_each_error_is_counted_once(old, new, wanted):
    assert LATE.count(old) == 1
    differ(caption_facts(LATE.replace(old, new), SCENE, "late"), **wanted)


@pytest.mark.parametrize(
    "old, new, wanted",
    [
        ("two shapes", "three shapes", {"sums_wrong": 1, "sums_unlike_list": 1}),
        ("two large", "one large", {"sums_wrong": 1, "sums_unlike_list": 1}),
        ("no small", "one small", {"sums_wrong": 1, "sums_unlike_list": 1}),
        ("in red and blue", "in blue and red", {"sums_wrong": 1, "sums_unlike_list": 1}),
        ("in red and blue", "in red", {"sums_wrong": 1, "sums_unlike_list": 1, "fragments": 0}),
        ("the first a circle", "the first a ring", {"sums_wrong": 1, "sums_unlike_list": 1}),
        # a wrong object that the sums follow: true to the list, not to the picture (colours and last)
        ("blue", "white", {"wrong": 1, "color_mistaken": 1, "missed": 1, "sums_wrong": 1}),
        (" on a striped gray background", "", {"grounds_missed": 1}),
    ],
)
def test_each_wrong_sum_is_counted_once(old, new, wanted):
    text = references(PAIR, "narrative")[0]
    assert old in text and caption_facts(text, PAIR, "narrative").sums == 6
    differ(caption_facts(text.replace(old, new), PAIR, "narrative"), **{k: v for k, v in wanted.items() if v})


TWINS = Scene(
    2, "test", GROUND,
    tuple(thing("star", "red", size, x, y) for size, x, y in (("small", 60, 60), ("large", 170, 170), ("small", 300, 300))),
)  # fmt: skip


def test_of_equal_objects_the_one_that_fits_is_meant():
    # the first mention alone would take the object that the second one needs
    mentions = [Mention("red", "star", "small"), Mention("red", "star", "small", "top left")]
    assert [o.position for o in match(mentions, TWINS)] == ["bottom right", "top left"]
    # nothing decides: what was asked for
    assert match([Mention("red", "star")], TWINS, asked=[TWINS.objects[1]])[0] is TWINS.objects[1]
    # three are there, a fourth is one too many whatever it says
    said = "a small red star, a small red star, a large red star and a large red star on a striped gray background"
    differ(caption_facts(said, TWINS, "late"), repeated=1)


weights = st.integers(0, 4).flatmap(
    lambda k: st.lists(st.lists(st.none() | st.integers(0, 21), min_size=k, max_size=k), max_size=4)
)


@given(weights)
def test_assignment_equals_trying_everything(table):
    columns = len(table[0]) if table else 0
    found = assign(table)
    taken = [k for k in found if k is not None]
    assert len(found) == len(table) and len(set(taken)) == len(taken)

    def worth(choice):
        pairs = [(r, k) for r, k in enumerate(choice) if k is not None]
        if any(table[r][k] is None for r, k in pairs) or len({k for _, k in pairs}) < len(pairs):
            return (-1, 0)
        return (len(pairs), sum(table[r][k] for r, k in pairs))

    assert worth(found) == max(worth(c) for c in itertools.product([None, *range(columns)], repeat=len(table)))


def test_rates_are_ratios_of_sums_over_captions():
    texts = [LATE, LATE.replace("red star", "white heart"), "a white heart and a black ring", ""]
    facts = [caption_facts(t, SCENE, "late") for t in texts]
    rates = fact_rates(facts, n=400)
    assert rates["hallucination"]["mean"] == pytest.approx(3 / 10)  # of 4 + 4 + 2 + 0 objects named
    assert rates["hallucinating_captions"]["mean"] == pytest.approx(2 / 4)
    assert rates["omission"]["mean"] == pytest.approx((0 + 1 + 4 + 4) / 16)
    assert rates["mistaken_color"]["mean"] == pytest.approx(1 / 10)  # 'black ring': the ring is blue
    assert "sum_error" not in rates and "ground_error" not in rates and set(rates) < set(RATES)
    for rate in rates.values():
        assert rate["lo"] <= rate["mean"] <= rate["hi"] and rate["n"] == 4
    assert fact_sums(facts, "omission").tolist() == [[0, 4], [1, 4], [4, 4], [4, 4]]
    gap = paired_statistic(fact_sums(facts[1:3], "omission"), fact_sums(facts[:1] * 2, "omission"))
    assert gap[0] == pytest.approx(5 / 8) and gap[1] == pytest.approx(1 / 4) and gap[2] == pytest.approx(1.0)


def test_swapping_a_color_is_seen_in_every_family_and_wording():
    for seed, family in itertools.product(range(40), FAMILIES):
        scene = make_scene(seed, "test")
        first = scene.salient(1)[0]
        other = next(c for c in COLOR_NAMES if all((first.shape, c) != o.pair for o in scene.objects))
        for text in references(scene, family):
            facts = caption_facts(
                text.replace(f"{first.color} {first.shape}", f"{other} {first.shape}", 1), scene, family
            )
            assert (facts.wrong, facts.missed, facts.right) == (1, 1, facts.asked - 1)
            assert facts.color_mistaken == 1 and facts.hallucinating == 1
            if family != "narrative":
                assert facts.sums == facts.sums_unlike_list == 0
            else:  # the sums still begin with the true colour, the list with the other
                assert facts.sums_wrong == 0 and facts.sums_unlike_list == 1


def test_spelled_and_split_words_are_the_same_words():
    words = annotated_reference(SCENE, "narrative", 3)
    assert split_words(spell(words)) == [w for w, _ in words]
    assert split_words("It's 3 red\n rings..") == ["It", "'", "s", "3", "red", "rings", ".", "."]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: caption_facts("a", SCENE, "long"), "unknown caption family 'long'"),
        (lambda: fact_sums([caption_facts("a", SCENE, "late")], "lies"), "unknown rate 'lies'"),
        (lambda: fact_sums([], "omission"), "at least one caption"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
