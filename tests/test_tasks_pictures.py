"""The tasks whose pictures have a look: VizWiz's and TextVQA's roles on scenes."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib.scenes import HELD_OUT, make_scene
from dyrate_lib.scenes.lettering import WORDS, sign_size
from dyrate_lib.scenes.looks import check_look, render_looks
from dyrate_lib.scenes.render import pack_scenes
from dyrate_lib.scenes.tasks import textvqa, vizwiz
from dyrate_lib.scenes.tasks.base import PLAIN, SHORT_ANSWER, Look, Sign
from dyrate_lib.scenes.world import COLOR_NAMES, COLORS, SHAPES, SIZE, SceneObject
from tests.test_scenes_looks import read_sign

N = 300
VIZWIZ = [e for seed in range(N) for e in vizwiz.examples(make_scene(seed, "test"))]
TEXTVQA = [e for seed in range(N) for e in textvqa.examples(make_scene(seed, "test"))]
TASKS = {"vizwiz": (vizwiz, VIZWIZ), "textvqa": (textvqa, TEXTVQA)}


def inside(o: SceneObject, crop) -> float:
    """The share of a disc inside a crop, by counting points on a grid of 200 x 200 over the disc."""
    axis = (torch.arange(200, dtype=torch.float64) + 0.5) / 100 - 1
    dx, dy = o.radius * axis[None, :], o.radius * axis[:, None]
    disc = dx**2 + dy**2 <= o.radius**2
    if crop is None:
        return 1.0
    x, y, side = crop
    within = (o.x + dx >= x) & (o.x + dx <= x + side) & (o.y + dy >= y) & (o.y + dy <= y + side)
    return float((disc & within).sum() / disc.sum())


# Both


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_deterministic_and_vary_with_the_variant(name):
    task, drawn = TASKS[name]
    assert [e for seed in range(20) for e in task.examples(make_scene(seed, "test"))] == drawn[:20]
    other = [e for seed in range(20) for e in task.examples(make_scene(seed, "test"), variant=1)]
    assert all(a.look != b.look for a, b in zip(drawn, other, strict=False) if a.look != PLAIN)
    assert sum((a.prompt, a.look) != (b.prompt, b.look) for a, b in zip(drawn, other, strict=False)) >= 18
    assert drawn[0] != task.examples(make_scene(0, "val"))[0]


@pytest.mark.parametrize("name", TASKS)
def test_every_scene_gives_one_prompt_in_its_benchmarks_form(name):
    task, drawn = TASKS[name]
    assert [e.scene.seed for e in drawn] == list(range(N))
    for e in drawn:
        question, *middle, last = e.prompt.split("\n")
        assert question.endswith("?") and last == SHORT_ANSWER
        assert middle == ([vizwiz.INSUFFICIENT] if name == "vizwiz" else [])
        assert e.task == name and e.category in task.CATEGORIES and e.part == ""
        assert len(e.answers) == 10 and all(re.fullmatch("[a-z]+|[0-9]", a) for a in (e.answer, *e.answers))
        check_look(e.look)


@pytest.mark.parametrize("name", TASKS)
def test_every_category_occurs(name):
    task, drawn = TASKS[name]
    assert set(task.CATEGORIES) == {e.category for e in drawn}


def test_every_word_said_is_in_the_lines_or_in_the_scenes_own_corpus():
    from tokenizers import pre_tokenizers

    from dyrate_lib.prompts import chat_prompt
    from dyrate_lib.scenes.tokenizer import corpus

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def pieces(text: str) -> set[str]:
        return {piece for piece, _ in level.pre_tokenize_str(text)}

    known = set().union(*(pieces(line) for line in {*corpus(), *vizwiz.LINES, *textvqa.LINES}))
    said = [e for split in ("train", "novel") for seed in range(400) for task in (vizwiz, textvqa)
            for e in task.examples(make_scene(seed, split), 3)]  # fmt: skip
    said += [e for seed in range(400) for e in textvqa.examples(make_scene(seed, "val"), with_text=True)]
    missing = set().union(*(pieces(chat_prompt(e.prompt)) | pieces(f" {e.answer}") for e in said)) - known
    assert not missing


# VizWiz: the questions


def test_vizwiz_answers_come_in_about_the_real_shares():
    shares = {c: n / N for c, n in Counter(e.category for e in VIZWIZ).items()}
    assert 0.22 < shares["unanswerable"] < 0.33
    assert shares["other"] > 0.4 and 0.05 < shares["number"] < 0.2 and 0.05 < shares["yes/no"] < 0.2


def test_vizwiz_truths_are_those_of_the_cropped_picture():
    """Each question worked out anew from its text, the scene and the points of each disc inside the crop."""
    checked = Counter()
    for e in VIZWIZ:
        shown = {o: inside(o, e.look.crop) for o in e.scene.objects}
        seen = [o for o, share in shown.items() if share > 0.3]
        text, true = e.prompt.split("\n")[0], e.meta["true"]
        if found := re.fullmatch(r"What color is the (\w+)\?", text):
            able = [o for o in e.scene.objects if o.shape == found[1]]
            assert len(able) <= 1 and (true == able[0].color if true else not able or shown[able[0]] < 0.01)
        elif found := re.fullmatch(r"What shape is the (\w+) thing\?", text):
            if found[1] == "largest":
                assert true == max(e.scene.objects, key=lambda o: o.radius).shape
            else:
                able = [o for o in e.scene.objects if o.color == found[1]]
                assert len(able) <= 1 and (true == able[0].shape if true else not able or shown[able[0]] < 0.01)
        elif found := re.fullmatch(r"How many (\w+)(?: things)? are there\?", text):
            asked = [o for o in seen if found[1] in (f"{o.shape}s", f"{o.shape}es", o.color, "things")]
            assert true == str(len(asked)) and asked
        else:
            found = re.fullmatch(r"Is there an? (\w+) (\w+) in the picture\?", text)
            assert found and (true == "yes") == any(o.pair == (found[2], found[1]) for o in seen)
        checked[e.meta["kind"]] += 1
    assert set(checked) == set(vizwiz.KINDS)


def test_vizwiz_categories_are_the_types_of_the_answers():
    for e in VIZWIZ:
        kinds = {"number": e.answer.isdigit(), "yes/no": e.answer in ("yes", "no")}
        kinds["unanswerable"] = e.answer == "unanswerable"
        kinds["other"] = e.answer in SHAPES + COLOR_NAMES
        assert [k for k, true in kinds.items() if true] == [e.category]


def test_held_out_pairs_are_denied_in_novel_pictures_only():
    denied = {}
    for split in ("train", "novel"):
        denied[split] = set()
        for e in (e for seed in range(500) for e in vizwiz.examples(make_scene(seed, split), 1)):
            found = re.match(r"Is there an? (\w+) (\w+)", e.prompt)
            if found and e.meta["true"] == "no":
                denied[split].add((found[2], found[1]))
    assert len(denied["train"]) > 5 and not denied["train"] & HELD_OUT
    assert denied["novel"] & HELD_OUT


# VizWiz: the pictures and the annotators


@settings(max_examples=40, deadline=None)
@given(
    x=st.floats(0, 336), y=st.floats(0, 336), radius=st.floats(5, 60), left=st.floats(0, 200), side=st.floats(10, 136)
)
def test_a_discs_share_inside_a_crop_is_that_of_its_points(x, y, radius, left, side):
    o = SceneObject("circle", "red", "large", x, y, radius, 0.0, (1.0, 0.0, 0.0))
    crop = (left, 0.5 * left, side)
    assert vizwiz.disc_share(x, y, radius, crop) == pytest.approx(inside(o, crop), abs=0.015)


def test_shares_worked_out_by_hand():
    assert vizwiz.disc_share(50, 50, 10, None) == 1 and vizwiz.disc_share(50, 50, 10, (0, 0, 100)) == pytest.approx(1)
    assert vizwiz.disc_share(50, 50, 10, (50, 0, 200)) == pytest.approx(0.5)
    assert vizwiz.disc_share(50, 50, 10, (0, 50, 200)) == pytest.approx(0.5)
    assert vizwiz.disc_share(50, 50, 10, (50, 50, 200)) == pytest.approx(0.25)
    assert vizwiz.disc_share(50, 50, 10, (60, 0, 200)) == 0
    # A square of side 8 inside the disc: 64 of 100 pi.
    assert vizwiz.disc_share(50, 50, 10, (46, 46, 8)) == pytest.approx(64 / (100 * math.pi), rel=0.07)


def test_difficulty_is_one_where_a_limit_is_reached():
    assert vizwiz.difficulty(PLAIN, "shape", 30, 1.0) == 0
    assert vizwiz.difficulty(Look(blur=30 * vizwiz.BLUR_LIMIT["shape"]), "shape", 30, 1.0) == pytest.approx(1)
    assert vizwiz.difficulty(Look(noise=vizwiz.NOISE_LIMIT["colour"]), "colour", 30, 1.0) == pytest.approx(1)
    assert vizwiz.difficulty(PLAIN, "shape", 30, vizwiz.SHARE_LIMIT) == pytest.approx(1)
    # A crop of half the side doubles the radius, a blur of the same px is then half as bad.
    near = Look(crop=(0, 0, 168), blur=30 * vizwiz.BLUR_LIMIT["shape"])
    assert vizwiz.difficulty(near, "shape", 30, 1.0) == pytest.approx(0.25)
    assert vizwiz.difficulty(Look(blur=5), "colour", 20, 1.0) < vizwiz.difficulty(Look(blur=5), "shape", 20, 1.0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), easy=st.floats(0, 6), more=st.floats(0, 6))
def test_what_is_harder_never_makes_fewer_give_up(seed, easy, more):
    counts = [vizwiz.annotate(random.Random(seed), "red", "blue", d).count("unanswerable") for d in (easy, easy + more)]
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("fault", ["blur", "noise"])
def test_worse_pictures_of_the_same_scenes_are_answered_less(fault):
    given_up = []
    for strength in (0.0, 0.3, 1.0, 3.0):
        total = 0
        for e in VIZWIZ:
            look = dataclasses.replace(e.look, **{fault: strength * (10 if fault == "blur" else 1)})
            d = vizwiz.difficulty(look, "shape", 25.0, e.meta["share"])
            total += vizwiz.annotate(random.Random(e.scene.seed), "red", "blue", d).count("unanswerable")
        given_up.append(total / N / 10)
    assert given_up == sorted(given_up) and given_up[-1] > given_up[0] + 0.5


def test_annotators_answer_at_the_stated_rates():
    for d, p in ((0.0, 0.0), (1.0, 0.5), (2.0, 0.75)):
        said = [a for i in range(2000) for a in vizwiz.annotate(random.Random(f"{d}/{i}"), "red", "blue", d)]
        counts = {a: n / len(said) for a, n in Counter(said).items()}
        slip = (1 - p) * (vizwiz.SLIP + vizwiz.SLIP_HARD * p)
        assert counts.get("unanswerable", 0.0) == pytest.approx(p, abs=0.015)
        assert counts["blue"] == pytest.approx(slip, abs=0.015)
    # Without a true answer, whoever answers names another thing.
    assert set(vizwiz.annotate(random.Random(1), None, "blue", 1.0)) == {"unanswerable", "blue"}


def test_the_majority_is_the_most_frequent_then_the_true_then_unanswerable():
    assert vizwiz.majority(["a"] * 4 + ["b"] * 6, "a") == "b"
    assert vizwiz.majority(["b"] * 5 + ["a"] * 5, "a") == "a"
    assert vizwiz.majority(["b"] * 4 + ["unanswerable"] * 4 + ["a"] * 2, "a") == "unanswerable"
    assert vizwiz.majority(["b"] * 5 + ["unanswerable"] * 5, None) == "unanswerable"


def test_clear_pictures_are_answered_truly_and_hopeless_ones_not_at_all():
    clear = [e for e in VIZWIZ if e.meta["difficulty"] < 0.1]
    hopeless = [e for e in VIZWIZ if e.meta["difficulty"] > 3]
    assert len(clear) > 80 and len(hopeless) > 10
    assert all(e.answer == e.meta["true"] for e in clear)
    assert all(e.answer == "unanswerable" for e in hopeless)
    # A thing out of the picture is one that nobody can tell, however sharp the picture.
    away = [e for e in VIZWIZ if e.meta["share"] == 0]
    assert away and all(e.meta["true"] is None and e.answer == "unanswerable" for e in away)
    assert all(e.answer == vizwiz.majority(e.answers, e.meta["true"]) for e in VIZWIZ)


def test_photographs_reach_from_harmless_to_illegible_and_always_show_something():
    looks = [e.look for e in VIZWIZ]
    assert any(look.plain for look in looks)
    for values, low, high in (
        ([k.blur for k in looks if k.blur], 1.5, 15),
        ([k.noise for k in looks if k.noise], 0.06, 1),
        ([k.crop[2] for k in looks if k.crop], 140, 250),
    ):
        assert 0.2 < len(values) / N < 0.7 and min(values) < low and max(values) > high
    assert all(max(inside(o, e.look.crop) for o in e.scene.objects) > 0.58 for e in VIZWIZ)


# TextVQA


def box(sign: Sign) -> tuple[int, int, int, int]:
    width, height = sign_size(sign.text, sign.scale)
    return sign.x, sign.y, sign.x + width, sign.y + height


def test_signs_lie_within_the_picture_apart_from_each_other_and_mostly_off_the_objects():
    covering = 0
    for e in TEXTVQA:
        signs = e.look.signs
        assert 1 <= len(signs) <= 3 and len({s.text for s in signs}) == len(signs) == len({s.ink for s in signs})
        taken = torch.zeros(SIZE, SIZE)
        for s in signs:
            left, top, right, bottom = box(s)
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE and 3 <= s.scale <= 5
            taken[top:bottom, left:right] += 1
            lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (s.ink, s.board)]
            assert abs(lightness[0] - lightness[1]) >= 0.4
        assert taken.max() == 1
        for o in e.scene.objects:
            nearest = [(min(max(o.x, a), c), min(max(o.y, b), d)) for a, b, c, d in map(box, signs)]
            covering += any(math.dist((o.x, o.y), at) < o.radius - 1 for at in nearest)
    assert {len(e.look.signs) for e in TEXTVQA} == {1, 2, 3} and covering < 0.05 * N


def test_textvqa_asks_for_the_right_sign():
    """Each question worked out anew from its text, the scene and the signs."""
    for e in TEXTVQA:
        text, signs = e.prompt.split("\n")[0], {s.text: s for s in e.look.signs}
        assert e.meta["words"] == tuple(signs)
        if e.category == "one sign":
            assert text in textvqa.ONE_SIGN and list(signs) == [e.answer]
        elif e.category == "place":
            words = text.removeprefix("What word is at the ").removesuffix("?").split()
            at = {}
            for word, s in signs.items():
                x, y = (box(s)[0] + box(s)[2]) / 2, (box(s)[1] + box(s)[3]) / 2
                place = [("top", "", "bottom")[int(y // 112)], ("left", "", "right")[int(x // 112)]]
                at[word] = [p for p in place if p] or ["center"]
            assert [w for w in at if at[w] == words] == [e.answer]
        elif e.category == "neighbour":
            found = re.fullmatch(r"What does the sign near the (\w+) (\w+) say\?", text)
            (o,) = [o for o in e.scene.objects if o.pair == (found[2], found[1])]
            gaps = {}
            for word, (left, top, right, bottom) in ((w, box(s)) for w, s in signs.items()):
                gaps[word] = math.dist((o.x, o.y), (min(max(o.x, left), right), min(max(o.y, top), bottom)))
            nearest, second = sorted(gaps, key=lambda w: gaps[w])[:2]
            assert nearest == e.answer and gaps[second] > gaps[nearest] + 30
        else:
            ink = text.removeprefix("What word is written in ").removesuffix("?")
            assert [s.text for s in e.look.signs if s.ink == tuple(v / 255 for v in COLORS[ink])] == [e.answer]


def test_textvqa_words_can_be_read_in_the_picture():
    chosen = TEXTVQA[:24]
    pictures = render_looks(*pack_scenes([e.scene for e in chosen]), [e.look for e in chosen])
    for e, picture in zip(chosen, pictures, strict=True):
        assert tuple(read_sign(picture, s) for s in e.look.signs) == e.meta["words"]
        assert e.answer in e.meta["words"] and e.answer in WORDS


def test_ten_annotators_mostly_say_the_word():
    assert all(Counter(e.answers)[e.answer] >= 6 for e in TEXTVQA)
    said = [a for i in range(2000) for a in textvqa.annotate(random.Random(i), "exit")]
    assert said.count("unanswerable") / len(said) == pytest.approx(textvqa.GAVE_UP, abs=0.005)
    wrong = {a for a in said if a not in ("exit", "unanswerable")}
    assert wrong == {"xeit", "eixt", "exti"}
    assert sum(a in wrong for a in said) / len(said) == pytest.approx(textvqa.MISSPELT, abs=0.005)


def test_reference_text_changes_the_prompt_and_nothing_else():
    for e in TEXTVQA:
        (given,) = textvqa.examples(e.scene, with_text=True)
        question, last = e.prompt.split("\n")
        reference = f"Reference OCR token: {', '.join(given.meta['ocr'])}".rstrip()
        assert given.prompt == f"{question}\n{reference}\n{last}"
        assert dataclasses.replace(given, prompt=e.prompt, meta=e.meta) == e
        assert given.meta == {**e.meta, "with_text": True}


def test_the_ocr_reads_in_reading_order_with_its_stated_faults():
    signs = [Sign(w, 10, 100 - 20 * i, 3, (1.0,) * 3, (0.0,) * 3) for i, w in enumerate(("open", "exit", "stop"))]
    read = [textvqa.read(random.Random(i), signs) for i in range(4000)]
    order = ("stop", "exit", "open")
    right = {textvqa.MISREAD[w]: w for w in order} | {w: w for w in order}
    for words in read:
        assert [order.index(right[w]) for w in words] == sorted(order.index(right[w]) for w in words)
    said = [w for words in read for w in words]
    assert 1 - len(said) / 12000 == pytest.approx(textvqa.OCR_DROPS, abs=0.01)
    assert sum(w not in order for w in said) / len(said) == pytest.approx(textvqa.OCR_MISREADS, abs=0.01)


def test_a_misread_word_has_one_wrong_letter_and_is_no_other_word():
    assert set(textvqa.MISREAD) == set(WORDS) and len(set(textvqa.MISREAD.values())) == len(WORDS)
    assert not set(textvqa.MISREAD.values()) & set(WORDS)
    for word, wrong in textvqa.MISREAD.items():
        assert len(wrong) == len(word) and sum(a != b for a, b in zip(word, wrong, strict=True)) == 1
