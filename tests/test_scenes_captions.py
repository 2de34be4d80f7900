"""Captions with their needs, and questions with their answers, against the truth of the scene."""

from __future__ import annotations

import dataclasses

import pytest

from dyrate_lib.errors import InputError
from dyrate_lib.scenes import (
    FAMILIES,
    HELD_OUT,
    NEEDS,
    QUESTION_KINDS,
    annotated_reference,
    make_scene,
    questions,
    references,
)
from dyrate_lib.scenes.captions import LISTED, N_REFERENCES, NUMBERS, spell
from dyrate_lib.scenes.questions import SUFFIX
from dyrate_lib.scenes.tokenizer import MAX_RESPONSE
from dyrate_lib.scenes.world import COLOR_NAMES, GROUNDS, SHAPES, TONE_NAMES, TURN

SCENES = [make_scene(seed, split) for split in ("train", "test", "novel") for seed in range(150)]
POSITIONS = {"top", "bottom", "left", "right", "center"}
CONTENT = {*SHAPES, *COLOR_NAMES, *GROUNDS, *TONE_NAMES, *POSITIONS, "large", "small"}


def image_words(scene, family, i):
    return [w for w, need in annotated_reference(scene, family, i) if need == "image"]


@pytest.mark.parametrize("family", FAMILIES)
def test_five_references_that_differ_in_wording_from_the_start_and_not_in_what_they_say(family):
    for scene in SCENES:
        texts = references(scene, family)
        assert len(texts) == N_REFERENCES == len(set(texts))
        assert len({" ".join(t.split()[:2]) for t in texts}) == N_REFERENCES
        assert len({tuple(sorted(image_words(scene, family, i))) for i in range(N_REFERENCES)}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_fit_into_sixty_four_tokens(family):
    lengths = [len(annotated_reference(s, family, i)) + 1 for s in SCENES for i in range(N_REFERENCES)]
    assert max(lengths) <= MAX_RESPONSE
    assert min(lengths) >= (11 if family == "short" else 30)


def test_annotated_words_spell_the_reference():
    for scene in SCENES[:60]:
        for family in FAMILIES:
            for i, text in enumerate(references(scene, family)):
                words = annotated_reference(scene, family, i)
                assert spell(words) == text and {n for _, n in words} <= set(NEEDS)
                assert "".join(w for w, _ in words) == text.replace(" ", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_need_the_image_are_the_truth_about_the_listed_objects_and_the_ground(family):
    for scene in SCENES:
        expected = []
        for o in scene.salient(LISTED[family]):
            expected += [o.size, o.color, o.shape]
            expected += o.position.split() if family != "short" else []
        for i in range(N_REFERENCES):
            said = image_words(scene, family, i)
            ground = [scene.ground.kind, scene.ground.tone]
            if all(w in said for w in ground):
                expected_all = sorted(expected + ground)
            else:
                assert family != "short"
                expected_all = sorted(expected)
            assert sorted(said) == expected_all


def test_no_content_word_of_the_picture_passes_as_needing_nothing():
    for scene in SCENES:
        for family in FAMILIES:
            for i in range(N_REFERENCES):
                glue = [w for w, need in annotated_reference(scene, family, i) if need == "none"]
                # 'plain' and 'simple' belong to a fixed phrase of `late`, whatever the ground is.
                assert not (set(glue) - {"plain"}) & CONTENT


def test_another_picture_changes_exactly_the_words_that_depend_on_it():
    scene = next(s for s in SCENES if len(s.objects) == 3 and len({o.color for o in s.objects}) == 3)
    first = scene.salient(1)[0]
    other = next(c for c in COLOR_NAMES if c not in {o.color for o in scene.objects})
    objects = tuple(dataclasses.replace(o, color=other) if o is first else o for o in scene.objects)
    changed = dataclasses.replace(scene, objects=objects)
    for family in FAMILIES:
        before, after = annotated_reference(scene, family, 0), annotated_reference(changed, family, 0)
        differ = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        assert {need for (_, need), _ in differ} == ({"image", "response"} if family == "narrative" else {"image"})
        assert all(a[0] == first.color and b[0] == other for a, b in differ)


def test_sums_follow_from_the_list():
    for scene in SCENES:
        listed = scene.salient(LISTED["narrative"])
        large = sum(o.size == "large" for o in listed)
        for i in range(N_REFERENCES):
            said = [w for w, need in annotated_reference(scene, "narrative", i) if need == "response"]
            assert said[:5] == [NUMBERS[len(listed)], NUMBERS[large], "large", NUMBERS[len(listed) - large], "small"]
            colors = list(dict.fromkeys(o.color for o in listed))
            ends = [listed[0].shape, listed[-1].shape] if len(listed) in (2, 3) else []
            assert said[5:] == colors + ends


def test_need_lies_at_the_front_of_narrative_and_at_the_back_of_late():
    for scene in SCENES:
        for i in range(N_REFERENCES):
            places = {f: [] for f in ("narrative", "late")}
            for family, found in places.items():
                words = annotated_reference(scene, family, i)
                found += [k / len(words) for k, (_, need) in enumerate(words) if need == "image"]
            assert max(places["narrative"]) < 0.75 < max(places["late"])
            assert min(places["narrative"]) < 0.25 < min(places["late"])


@pytest.mark.parametrize("bad", [("story", 0), ("short", 5), ("short", -1)])
def test_unknown_families_and_wordings_are_refused(bad):
    with pytest.raises(InputError):
        annotated_reference(SCENES[0], *bad)


# ------------------------------------------------------------------------------------------------------ questions


def solve(scene, text: str) -> str:
    """The answer, found from the words of the question and the scene alone."""
    words = text.replace("?", "").split()
    if words[0] == "How":
        of = words[2]
        if of == "shapes":
            return str(len(scene.objects))
        if of in COLOR_NAMES:
            return str(sum(o.color == of for o in scene.objects))
        singular = {"crosses": "cross"}.get(of, of.removesuffix("s"))
        return str(sum(o.shape == singular for o in scene.objects))
    if words[0] == "What":
        (found,) = [o for o in scene.objects if o.shape == words[-1]]
        return found.color
    if words[1] == "there":
        return "yes" if any(o.pair == (words[4], words[3]) for o in scene.objects) else "no"
    (a,), (b,) = ([o for o in scene.objects if o.shape == name] for name in (words[2], words[-1]))
    holds = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
    options = [w for w in words if w in holds]
    if len(options) == 2:
        return next(o for o in options if holds[o])
    return "yes" if holds[options[0]] else "no"


def test_answers_are_right_and_one_word():
    seen = {k: 0 for k in QUESTION_KINDS}
    for scene in SCENES:
        for variant in range(4):
            asked = questions(scene, variant)
            assert asked == questions(scene, variant)
            for q in asked:
                text, suffix = q.prompt.split("\n")
                assert suffix == SUFFIX and len(q.answer.split()) == 1
                assert q.answer == solve(scene, text), (scene.id, text)
                seen[q.kind] += 1
    assert min(seen.values()) > 300


def test_existence_is_balanced_and_asks_about_held_out_pairs_in_novel_alone():
    asked = [(s, q) for s in SCENES for q in questions(s) if q.kind == "existence"]
    yes = sum(q.answer == "yes" for _, q in asked)
    assert abs(yes - len(asked) / 2) <= 0.02 * len(asked)
    pairs = {True: set(), False: set()}
    for s, q in asked:
        words = q.prompt.split("\n")[0].replace("?", "").split()
        pairs[s.split == "novel"].add((words[4], words[3]))
    assert not pairs[False] & HELD_OUT and pairs[True] & HELD_OUT


def test_no_shape_turns_into_another():
    assert TURN["square"] < 45 and TURN["diamond"] < 45 and TURN["cross"] < 45
