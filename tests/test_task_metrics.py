"""The tasks' metrics against values worked out by hand from each benchmark's protocol."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib import InputError
from dyrate_lib.datasets import Item
from dyrate_lib.scenes.tasks import NAMES, PROMPTS_A_PICTURE, base_task
from dyrate_lib.stats import bootstrap_interval, bootstrap_means, bootstrap_sums
from dyrate_lib.task_metrics import (
    METRICS,
    normalise_vqa,
    option_letter,
    paired,
    same_but_case,
    score_task,
    soft_accuracy,
    yes_or_no,
)

POPE_PARTS = ("yes", "random", "popular", "adversarial")


def item(task, picture, answer, category="c", part="", **meta):
    answers = list(answer) if isinstance(answer, tuple) else [answer]
    about = {"family": task, "picture": picture, "category": category, "part": part, **meta}
    return Item(f"{picture}-{task}-{part}", "?", answers, about)


def scored(task, table):
    """Scores of [(item, reply), ...]."""
    return score_task(task, {i.id: reply for i, reply in table}, [i for i, _ in table])


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  two Cats.", "2 cats"), ("a red, an orange", "red orange"), ("1,000 dollars", "1000 dollars"), ("3.5", "3.5"),
        ("5.", "5"), ("U.S.A.", "usa"), ("red-blue", "red blue"), ("(left)", "left"), ("dont know", "don't know"), ("none", "0"),
        ("TEN", "10"), ("it's 10:30", "it's 10:30"), ("what?!", "what"), ("\tyes\n", "yes"), ("well its here", "well its here"),
        ("50%", "50%"), ("another", "another"), ("", ""), ("the", ""), ("seventeen", "seventeen"), ("is'nt", "is'nt"),
    ],
)  # fmt: skip
def test_vqa_normalisation(text, normal):
    assert normalise_vqa(text) == normal == normalise_vqa(normal)


@given(st.text(max_size=30))
def test_vqa_normalisation_is_single_spaced_and_lower(text):
    normal = normalise_vqa(text)
    assert normal == " ".join(normal.split()) and normal == normal.lower()


def test_gqa_match_ignores_case_and_punctuation_only():
    assert same_but_case(" Yes. ", "yes") and same_but_case("T-shirt", "tshirt")
    assert not same_but_case("the star", "star") and not same_but_case("two", "2")


@pytest.mark.parametrize("matches, value", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), *((m, 1) for m in range(4, 11))])
def test_soft_accuracy_of_matches(matches, value):
    answers = ["The Star."] * matches + ["other"] * (10 - matches)
    assert soft_accuracy("star", answers) == pytest.approx(value)
    subsets = itertools.combinations(answers, 9)
    assert soft_accuracy("star", answers) == pytest.approx(np.mean([min(1, s.count("The Star.") / 3) for s in subsets]))


def test_soft_accuracy_wants_ten():
    for answers in (["a"] * 9, ["a"] * 11, "aaaaaaaaaa"):
        with pytest.raises(InputError, match="10 answers"):
            soft_accuracy("a", answers)


OPTIONS = ("red", "dark blue", "3", "the star")


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("B", "B"), ("b", "B"), ("B.", "B"), (" (B) ", "B"), ("B) dark blue", "B"), ("B. red", "B"), ("B: red", "B"),
        ("(B) dark", "B"), ("The answer is C.", "C"), ("the answer is (C)", "C"), ("dark blue", "B"), ("Dark Blue.", "B"),
        ("three", "C"), ("3", "C"), ("star", "D"), ("E", None), ("E.", None), ("", None), ("A red star", None), ("blue", None),
        ("B or C", None), ("Because", None), ("the answer is Clear", None), ("A.M.", None),
    ],
)  # fmt: skip
def test_option_letters(reply, letter):
    assert option_letter(reply, OPTIONS) == letter


def test_letters_beyond_the_options_are_none():
    assert option_letter("C", ("x", "y")) is None and option_letter("x", ("x", "x.")) is None


@pytest.mark.parametrize(
    "reply, said",
    [("yes", "yes"), ("Yes, there is.", "yes"), ('"No."', "no"), ("NO", "no"), ("not sure", None), ("nothing", None),
     ("", None), ("There is no star", None), ("yesterday", None), ("no\n", "no")],
)  # fmt: skip
def test_yes_or_no(reply, said):
    assert yes_or_no(reply) == said


# -------------------------------------------------------------------------------------------------------------- tasks


def test_accuracy_by_category():
    table = [(item("gqa", "p1", "red", "query"), "Red."), (item("gqa", "p2", "yes", "verify"), "no"),
             (item("gqa", "p3", "no", "verify"), "no")]  # fmt: skip
    found = scored("gqa", table)
    assert found.headline == "accuracy" and found.score == pytest.approx(200 / 3)
    assert found.parts == {"accuracy": found.score, "query": 100, "verify": 50}
    assert found.ids == ("p1", "p2", "p3") and found.sums.tolist() == [[1, 1], [0, 1], [1, 1]]


def test_order_of_items_does_not_matter():
    table = [(item("gqa", f"p{k}", "red", "query"), ("red", "blue")[k % 2]) for k in range(5)]
    a, b = scored("gqa", table), scored("gqa", table[::-1])
    assert a.ids == b.ids and (a.sums == b.sums).all()


@pytest.mark.parametrize("task", ["vizwiz", "textvqa", "textvqa-ocr"])
def test_soft_tasks(task):
    half = ("unanswerable",) * 2 + ("blue",) * 8
    table = [(item(task, "p1", half, "other"), "unanswerable"), (item(task, "p2", half, "number"), "Blue")]
    found = scored(task, table)
    assert found.headline == "soft accuracy" and found.score == pytest.approx(80)
    assert found.parts["other"] == pytest.approx(60) and found.parts["number"] == 100


def test_scienceqa_takes_letters_and_texts():
    replies = ["B", "(b)", "blue", "A", "violet"]
    table = [(item("scienceqa", f"p{k}", "B", "nature", options=("red", "blue")), r) for k, r in enumerate(replies)]
    assert scored("scienceqa", table).score == pytest.approx(60)


def pope(picture, yes, random, popular, adversarial):
    """One picture's four prompts with their replies."""
    replies = (yes, random, popular, adversarial)
    return [
        (item("pope", picture, "yes" if part == "yes" else "no", part, part), reply)
        for part, reply in zip(POPE_PARTS, replies)
    ]


def test_pope_confusion():
    table = [*pope("p1", "yes", "no", "no", "yes"), *pope("p2", "Yes.", "no", "yes", "yes"), *pope("p3", "no", "no", "no", "no"),
             *pope("p4", "yes", "no", "no", "perhaps")]  # fmt: skip
    found = scored("pope", table)
    # TP 3, FN 1 in each; FP 0, 1, 2; what is neither yes nor no counts as no
    f1 = [2 * 3 / (2 * 3 + fp + 1) for fp in (0, 1, 2)]
    assert found.headline == "F1" and found.score == pytest.approx(100 * np.mean(f1)) == pytest.approx(
        found.parts["F1"]
    )
    for setting, fp in (("random", 0), ("popular", 1), ("adversarial", 2)):
        expected = {"accuracy": (3 + 4 - fp) / 8, "precision": 3 / (3 + fp), "recall": 3 / 4, "F1": 6 / (7 + fp),
                    "yes-rate": (3 + fp) / 8}  # fmt: skip
        for name, value in expected.items():
            assert found.parts[f"{setting} {name}"] == pytest.approx(100 * value), (setting, name)
    assert found.parts["accuracy"] == pytest.approx(100 * (7 + 6 + 5) / 24)
    assert len(found.parts) == 20


def test_pope_without_any_yes():
    found = scored("pope", pope("p1", "no", "no", "no", "no"))
    assert found.score == 0 and found.parts["precision"] == 0 and found.parts["accuracy"] == 50


def mmbench(picture, category, replies):
    texts = ("red", "blue", "pink", "gray")
    return [
        (item("mmbench", picture, "ABCD"[r], category, str(r), options=texts[-r:] + texts[:-r]), reply)
        for r, reply in enumerate(replies)
    ]


def test_circular_evaluation():
    replies = {
        "counting": [["A", "B.", "(C)", "red"], ["A"] * 4],
        "image style": [["B", "B", "C", "D"], ["A", "B", "C", "?"]],
    }
    table = [
        row
        for category in replies
        for k, four in enumerate(replies[category])
        for row in mmbench(f"{category}{k}", category, four)
    ]
    found = scored("mmbench", table)
    assert found.headline == "circular accuracy" and found.score == 25
    assert found.parts == {"circular accuracy": 25, "vanilla accuracy": 75, "accuracy of all rotations": 100 * 11 / 16,
                           "counting": 50, "image style": 0}  # fmt: skip


def mme(picture, category, yes, no):
    return [
        (item("mme", picture, answer, category, answer), reply) for answer, reply in (("yes", yes), ("no", no))
    ]  # fmt: skip


def test_mme_points():
    table = [*mme("p1", "color", "Yes", "No"), *mme("p2", "color", "yes", "yes"), *mme("p3", "count", "no", "yes"),
             *mme("p4", "count", "yes", "no"), *mme("p5", "count", "maybe", "no")]  # fmt: skip
    found = scored("mme", table)
    color, count = (75 + 50), (100 * 3 / 6 + 100 / 3)
    assert found.headline == "acc + acc+" and found.score == pytest.approx(color + count)
    assert found.parts["color"] == 125 and found.parts["color acc"] == 75 and found.parts["color acc+"] == 50
    assert found.parts["count acc"] == pytest.approx(50) and found.parts["count acc+"] == pytest.approx(100 / 3)
    assert found.parts["acc + acc+"] == found.score and found.sums.shape == (5, 6)
    # a resample without a picture of a category: it counts as the mean of the others
    assert found.of(found.sums[:2].sum(0)) == pytest.approx(2 * 125)
    perfect = scored("mme", [*mme("p1", "color", "yes", "no"), *mme("p2", "count", "yes", "no")])
    assert perfect.score == 400


# ---------------------------------------------------------------------------------------------------------- intervals


def pictures_of(task, n, right):
    """n pictures whose replies are right where `right(k, prompt)` is true."""
    table = []
    for k in range(n):
        if task == "pope":
            replies = [("yes", "no")[(part == "yes") != right(k, j)] for j, part in enumerate(POPE_PARTS)]
            table += pope(f"p{k:05d}", *replies)
        elif task == "mmbench":
            table += mmbench(f"p{k:05d}", "counting", ["ABCD"[j] if right(k, j) else "x" for j in range(4)])
        elif task == "mme":
            replies = (answer if right(k, j) else "x" for j, answer in enumerate(("yes", "no")))
            table += mme(f"p{k:05d}", ("color", "count")[k % 2], *replies)
        else:
            meta = {"options": ("blue", "red")}
            truth = ("red",) * 10 if "accuracy" != METRICS[task].headline else "B" if task == "scienceqa" else "red"
            table.append((item(task, f"p{k:05d}", truth, **meta), "red" if right(k, 0) else "x"))
    return scored(task, table)


@pytest.mark.parametrize("task", NAMES)
def test_constant_data_has_an_interval_of_no_width(task):
    full = 400 if task == "mme" else 100
    for right, value in ((lambda k, j: True, full), (lambda k, j: False, 0)):
        found = pictures_of(task, 30, right)
        assert found.score == pytest.approx(value) and found.interval(200) == pytest.approx((value, value))
        assert paired(found, found, 200) == (0, 0, 0)


@pytest.mark.parametrize("task", NAMES)
def test_intervals_hold_the_score_and_pairing_narrows(task):
    rng = np.random.default_rng(5)
    hits, slips = rng.random((300, 4)) < 0.7, rng.random((300, 4)) < 0.05
    a = pictures_of(task, 300, lambda k, j: bool(hits[k, j]))
    b = pictures_of(task, 300, lambda k, j: bool(hits[k, j] and not slips[k, j]))
    lo, hi = a.interval()
    assert lo < a.score < hi and a.interval() == (lo, hi) != a.interval(seed=1)
    difference, low, high = paired(a, b)
    assert difference == pytest.approx(a.score - b.score) and low <= difference <= high
    assert high - low < hi - lo and paired(b, a)[0] == -difference
    assert paired(b, a)[1:] == pytest.approx((-high, -low))
    narrow = a.interval(level=0.5)
    assert lo < narrow[0] < narrow[1] < hi
    assert a.of(a.sums.sum(0)) == a.score and a.of(np.stack([a.sums.sum(0)] * 2)).shape == (2,)


def test_accuracy_agrees_with_the_bootstrap_of_means():
    rng = np.random.default_rng(0)
    hits = rng.random(200) < 0.4
    found = pictures_of("gqa", 200, lambda k, j: bool(hits[k]))
    assert found.interval(500, seed=3) == pytest.approx(bootstrap_interval(100.0 * hits, 500, seed=3))


def test_bootstrap_sums_in_chunks(monkeypatch):
    from dyrate_lib import stats

    values = np.random.default_rng(0).random((50, 3))
    whole = bootstrap_sums(values, 40, seed=2)
    assert whole.shape == (40, 3)
    assert whole[:, 1] / 50 == pytest.approx(bootstrap_means(values[:, 1], 40, seed=2))
    monkeypatch.setattr(stats, "_CHUNK", 300)
    assert bootstrap_sums(values, 40, seed=2) == pytest.approx(whole)
    for wrong in (values[:, 0], values[:0], np.full((2, 2), np.nan)):
        with pytest.raises(InputError, match="finite numbers"):
            bootstrap_sums(wrong)


def test_thousand_pictures_are_quick():
    import time

    found = pictures_of("mme", 1000, lambda k, j: k % 3 > 0)
    start = time.perf_counter()
    found.interval()
    assert time.perf_counter() - start < 2


# --------------------------------------------------------------------------------------------------------- bad input


def test_every_name_has_a_metric():
    assert set(METRICS) == set(NAMES)


def test_what_cannot_be_scored_is_named():
    table = [*pope("p1", "yes", "no", "no", "no"), *pope("p2", "yes", "no", "no", "no")]
    items, replies = [i for i, _ in table], {i.id: r for i, r in table}
    with pytest.raises(InputError, match="unknown task 'vqa': choose one of gqa"):
        score_task("vqa", replies, items)
    with pytest.raises(InputError, match="nothing to score"):
        score_task("pope", {}, [])
    with pytest.raises(InputError, match="no item of mme: take those of open_dataset"):
        score_task("mme", replies, items)
    with pytest.raises(InputError, match="1 items without a reply .*p2-pope-adv.* 0 replies"):
        score_task("pope", {k: v for k, v in replies.items() if k != "p2-pope-adversarial"}, items)
    with pytest.raises(InputError, match="0 items without a reply .* 1 replies without an item .*'x'"):
        score_task("pope", {**replies, "x": "no"}, items)
    with pytest.raises(InputError, match="'p2' has 3 of its 4 prompts: .* multiple of 4"):
        score_task("pope", {i.id: "no" for i in items[:-1]}, items[:-1])
    with pytest.raises(InputError, match="8 ids: give each item once"):
        score_task("pope", replies, [*items, items[0]])
    with pytest.raises(InputError, match="must be a string, not NoneType"):
        score_task("pope", {**replies, items[0].id: None}, items)
    assert PROMPTS_A_PICTURE[base_task("pope")] == 4


def test_pairs_of_other_pictures_are_refused():
    a, b = (pictures_of("gqa", n, lambda k, j: True) for n in (5, 6))
    with pytest.raises(InputError, match="same pictures: 5 and 6, of which 5"):
        paired(a, b)
    with pytest.raises(InputError, match="no difference"):
        paired(a, pictures_of("mme", 5, lambda k, j: True))
    for bad in ({"n": 0}, {"level": 1.0}):
        with pytest.raises(InputError):
            a.interval(**bad)
