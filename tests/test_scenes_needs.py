"""Needs of replies: those of references exactly, and of replies that err, by the places of their wording."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib.errors import InputError
from dyrate_lib.scenes import FAMILIES, SPLITS, annotated_reference, make_scene, references
from dyrate_lib.scenes.captions import N_REFERENCES, spell, split_words
from dyrate_lib.scenes.needs import image_need, reply_needs
from dyrate_lib.scenes.world import COLOR_NAMES, SHAPES

WORDINGS = st.tuples(st.integers(0, 10_000), st.sampled_from(SPLITS), st.sampled_from(FAMILIES), st.integers(0, 4))


def marked(reply, family, **options):
    """'word:i' with the need's first letter, '?' for None."""
    needs = reply_needs(reply, family, **options)
    words = split_words(reply)
    return " ".join(f"{w}:{(n or '?')[0]}" for w, n in zip(words, needs))


@given(WORDINGS)
def test_a_reference_has_its_own_needs(drawn):
    seed, split, family, i = drawn
    words = annotated_reference(make_scene(seed, split), family, i)
    assert reply_needs(spell(words), family) == [need for _, need in words] + ["none"]
    assert reply_needs([f" {w}" for w, _ in words], family, ended=False) == [need for _, need in words]


@given(WORDINGS, st.integers(0, 9))
def test_wrong_attributes_change_no_need(drawn, shift):
    seed, split, family, i = drawn
    words = annotated_reference(make_scene(seed, split), family, i)
    names = (COLOR_NAMES, SHAPES)
    wrong = [w for w, _ in words]
    for kind in names:
        wrong = [kind[(kind.index(w) + shift) % len(kind)] if w in kind else w for w in wrong]
    assert reply_needs(wrong, family, ended=False) == [need for _, need in words]


@given(WORDINGS, st.integers(0, 60))
def test_a_reply_that_breaks_off_has_the_needs_so_far(drawn, length):
    seed, split, family, i = drawn
    words = annotated_reference(make_scene(seed, split), family, i)[:length]
    assert reply_needs([w for w, _ in words], family, ended=False) == [need for _, need in words]


@given(WORDINGS, st.integers(0, 60), st.sampled_from(["zebra", "Listed", "7", ";"]))
def test_a_stray_word_needs_nobody_knows_what_and_moves_no_other(drawn, at, stray):
    seed, split, family, i = drawn
    words = annotated_reference(make_scene(seed, split), family, i)
    at = min(at, len(words))
    needs = [need for _, need in words]
    if i == 3 and family == "narrative":  # 'Listed' belongs to this wording
        stray = "zebra"
    found = reply_needs([w for w, _ in words[:at]] + [stray] + [w for w, _ in words[at:]], family, ended=False)
    assert found == [*needs[:at], None, *needs[at:]]


@given(WORDINGS, st.data())
def test_leaving_a_word_out_moves_no_other(drawn, data):
    seed, split, family, i = drawn
    words = annotated_reference(make_scene(seed, split), family, i)
    k = data.draw(st.integers(0, len(words) - 1))
    rest = words[:k] + words[k + 1 :]
    found = reply_needs([w for w, _ in rest], family, ended=False)
    # a mark or 'a' left out may leave two readings of equal cost; what needs the image is the same in all of them
    assert [n == "image" for n in found] == [need == "image" for _, need in rest]


def test_lists_may_be_longer_or_shorter_than_any_reference():
    one = "I can see a small red ring at the top. So that makes"
    assert marked(one, "narrative").startswith("I:n can:n see:n a:n small:i red:i ring:i at:n the:n top:i .:n So:n")
    many = "I can see " + ", ".join(["a small red ring at the top left"] * 7) + "."
    assert reply_needs(many, "narrative").count("image") == 7 * 5


def test_needs_by_hand():
    said = marked("A picture of a star red circle and blue ring on a plain red background.", "short")
    assert said == (
        "A:n picture:n of:n a:n star:i red:i circle:i and:n blue:i ring:i on:n a:n plain:i red:i background:n .:n"
    )
    sums = "Here we have a small red ring at the top. Adding up, we get two shapes, one large and red small, in blue and star, "
    sums += "the first a green and the last a ring."
    assert marked(sums, "narrative").endswith(
        "get:n two:r shapes:n ,:n one:r large:r and:n red:r small:r ,:n in:n blue:r and:n star:r ,:n the:n first:n a:n green:r "
        "and:n the:n last:n a:n ring:r .:n"
    )


def test_a_reply_may_change_its_wording_half_way():
    scene = make_scene(3, "test")
    first, second = references(scene, "narrative")[0], references(scene, "narrative")[4]
    mixed = first.split(". ")[0] + ". " + second.split(". ")[1]
    needs, words = reply_needs(mixed, "narrative", ended=False), split_words(mixed)
    own = [need for w, need in annotated_reference(scene, "narrative", 0) if need != "none"]
    assert [n for n in needs if n in ("image", "response")] == own
    assert needs[:3] == [None] * 3  # 'I can see' is cheaper to leave out than 'Adding up, we get'
    assert {n for w, n in zip(words, needs) if w in ("Adding", "up", "we", "get")} == {"none"}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_gets_one_need_a_word(family):
    assert reply_needs("", family) == ["none"] and reply_needs("", family, ended=False) == []
    assert reply_needs("yes", family) == [None, "none"]
    junk = "zzz " * 63
    assert reply_needs(junk, family) == [None] * 63 + ["none"]


@given(
    st.lists(
        st.sampled_from(["a", "red", "ring", "top", "in", ",", ".", "two", "zzz", "shapes", "background"]), max_size=30
    )
)
def test_length_is_that_of_the_words(words):
    for family in FAMILIES:
        assert len(reply_needs(words, family)) == len(words) + 1


def test_the_tokens_of_a_caption_are_its_words():
    from dyrate_lib.scenes.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    for family in FAMILIES:
        for text in references(make_scene(11, "novel"), family):
            ids = tokenizer(" " + text, add_special_tokens=False).input_ids
            pieces = [tokenizer.decode([i]) for i in ids]
            assert [p.strip() for p in pieces] == split_words(text)
            assert reply_needs(pieces, family) == reply_needs(text, family)


def test_image_need_as_numbers():
    np.testing.assert_array_equal(image_need(["image", "none", None, "response"]), [1.0, 0.0, np.nan, 0.0])


def test_an_unknown_family_is_refused():
    with pytest.raises(InputError, match="unknown caption family 'long'"):
        reply_needs("a", "long")


def test_every_wording_is_aligned_at_no_cost():
    from dyrate_lib.scenes.needs import _wording

    for family in FAMILIES:
        for i in range(N_REFERENCES):
            words = [w.lower() for w, _ in annotated_reference(make_scene(5, "test"), family, i)]
            costs = [_wording(family, k).align(words)[0] for k in range(N_REFERENCES)]
            assert costs[i] == 0 and all(cost > 0 for k, cost in enumerate(costs) if k != i)
