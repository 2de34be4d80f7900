"""Compositional questions with one-word answers, in the role of GQA (Hudson and Manning 2019).

`category` is GQA's structural type: query, choose, verify, compare or logical. `meta["kind"]` is what is asked about. A
question may go through several objects ("What color is the shape to the left of the red star?"); what it names is there once,
and relations are asked only where they are plain to see. A question of two possible answers is drawn only where the
picture could give either, and which one it gives is then a coin's choice, so that the words alone tell nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from ..questions import MIN_OFFSET
from ..world import COLOR_NAMES, GROUNDS, SHAPES, Scene, SceneObject
from .base import SHORT_ANSWER, Example
from .wording import (
    OPPOSITE,
    RELATIONS,
    a,
    absent_pairs,
    ahead,
    coin,
    holds,
    named,
    other_colors,
    other_shapes,
    pick,
    shuffled,
    stream,
    unique_shapes,
)

Made = tuple[str, str] | None  # question, answer; None where the scene does not give it

LINES: tuple[str, ...] = (
    "What color is the large object to the left of the star? What shape is the small object to the right of it? What is it?",
    "What color is the object above or below it? Which pattern does the background have?",
    "Does the image have a background?",
    "Is the star red or blue? Is the star large or small? Is the red object a star or a hexagon or an orange one?",
    "Is the star to the left or to the right of the ring? Is the star above or below the ring?",
    "Are there both a red star and a blue ring in the image? Is there either a red star or a blue ring in the image?",
    "Which is larger, the red star or the blue ring? Which is smaller,",
    "Which is further left, right, up, down? Are the star and the ring the same color? the same shape? the same size?",
    *(f"{word} {word}, {word}? {word}." for word in (*SHAPES, *COLOR_NAMES, *GROUNDS, "large", "small", "object", "background")),
)  # fmt: skip


def _others(scene: Scene, words: str, o: SceneObject) -> list[SceneObject]:
    """Objects that a noun ('object' or a shape) fits, without `o`."""
    return [p for p in scene.objects if p is not o and words in ("object", p.shape)]


def related(scene: Scene) -> list[tuple[SceneObject, str]]:
    """(object, 'star above the red ring'): objects that a relation to another one singles out.

    All that the noun fits lie plainly on one side of the other object, the one meant alone on the side named. Nouns that
    would single it out without the relation are left out.
    """
    found = []
    for o, descriptions in named(scene):
        for noun in ("object", *SHAPES):
            fitting = _others(scene, noun, o)
            if len(fitting) < 2:
                continue
            for relation in RELATIONS:
                sides = [holds(p, o, relation) for p in fitting]
                if None not in sides and sides.count(True) == 1:
                    found += [(fitting[sides.index(True)], f"{noun} {relation} the {words}") for words in descriptions]
    return found


def _seen_first(rng: random.Random, wrong: list[str], seen: set[str]) -> str:
    """A wrong value, half of the time one that something else in the picture has."""
    hard = [w for w in wrong if w in seen]
    return pick(rng, hard if hard and coin(rng) else wrong)


def _wrong(rng: random.Random, scene: Scene, o: SceneObject, what: str) -> str:
    wrong = other_colors(scene, o) if what == "color" else other_shapes(scene, o)
    return _seen_first(rng, wrong, {getattr(p, what) for p in scene.objects})


def _any(rng: random.Random, scene: Scene, without: str = "") -> tuple[SceneObject, str] | None:
    """An object that can be told from the others, with one of its names."""
    things = named(scene, without)
    if not things:
        return None
    o, words = pick(rng, things)
    return o, pick(rng, words)


def _plain_pair(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    """The names of two objects, and a relation that plainly holds from the first to the second."""
    things = named(scene)
    pairs = [(one, two, r) for p, one in things for q, two in things if p is not q for r in RELATIONS if holds(p, q, r)]
    if not pairs:
        return None
    one, two, relation = pick(rng, pairs)
    return pick(rng, one), pick(rng, two), relation


def _answer(yes: bool) -> str:
    return "yes" if yes else "no"


# -------------------------------------------------------------------------------------------------------------- query


def _query_attribute(scene: Scene, rng: random.Random, what: str) -> Made:
    found = _any(rng, scene, without=what)
    return found and (f"What {what} is the {found[1]}?", getattr(found[0], what))


def _query_related(scene: Scene, rng: random.Random, what: str) -> Made:
    far = [(o, words) for o, words in related(scene) if what == "color" or words.startswith("object")]
    if not far:
        return None
    # each sort of noun half of the time where both are there: 'object' fits far more often than a shape
    plain = [f for f in far if f[1].startswith("object")]
    exact = [f for f in far if not f[1].startswith("object")]
    o, words = pick(rng, plain if plain and (coin(rng) or not exact) else exact)
    return f"What {what} is the {words}?", getattr(o, what)


def _query_ground(scene: Scene, rng: random.Random) -> Made:
    return "Which pattern does the background have?", scene.ground.kind


# ------------------------------------------------------------------------------------------------------------- choose


def _choose_attribute(scene: Scene, rng: random.Random, what: str) -> Made:
    found = _any(rng, scene, without=what)
    if not found:
        return None
    truth = getattr(found[0], what)
    order = shuffled(rng, (truth, _wrong(rng, scene, found[0], what)))
    one, two = order if what == "color" else [a(word) for word in order]
    return f"Is the {found[1]} {one} or {two}?", truth


def _choose_size(scene: Scene, rng: random.Random) -> Made:
    sized = {size: [words for o, words in named(scene, "size") if o.size == size] for size in ("large", "small")}
    if not all(sized.values()):
        return None
    size = pick(rng, ("large", "small"))
    one, two = shuffled(rng, ("large", "small"))
    return f"Is the {pick(rng, pick(rng, sized[size]))} {one} or {two}?", size


def _choose_relation(scene: Scene, rng: random.Random) -> Made:
    found = _plain_pair(scene, rng)
    if not found:
        return None
    one, two, relation = found
    across = relation not in ("above", "below")
    first, second = shuffled(rng, ("left", "right") if across else ("above", "below"))
    asked = f"to the {first} or to the {second} of" if across else f"{first} or {second}"
    return f"Is the {one} {asked} the {two}?", first if first in relation.split() else second


# ------------------------------------------------------------------------------------------------------------- verify


def _verify_existence(scene: Scene, rng: random.Random) -> Made:
    yes = coin(rng)
    shape, color = pick(rng, sorted({o.pair for o in scene.objects}) if yes else absent_pairs(scene, near=True))
    return f"Is there {a(f'{color} {shape}')} in the image?", _answer(yes)


def _verify_color(scene: Scene, rng: random.Random) -> Made:
    found, yes = _any(rng, scene, without="color"), coin(rng)
    if not found:
        return None
    return f"Is the {found[1]} {found[0].color if yes else _wrong(rng, scene, found[0], 'color')}?", _answer(yes)


def _verify_relation(scene: Scene, rng: random.Random) -> Made:
    found, yes = _plain_pair(scene, rng), coin(rng)
    if not found:
        return None
    one, two, relation = found
    return f"Is the {one} {relation if yes else OPPOSITE[relation]} the {two}?", _answer(yes)


def _verify_ground(scene: Scene, rng: random.Random) -> Made:
    yes = coin(rng)
    word = scene.ground.kind if yes else pick(rng, [g for g in GROUNDS if g != scene.ground.kind])
    return f"Does the image have {a(word)} background?", _answer(yes)


# ------------------------------------------------------------------------------------------------------------ compare

# The answer of the first two names a shape, so both objects have shapes of their own.
_FURTHER = {"left": "to the left of", "right": "to the right of", "up": "above", "down": "below"}


def _compare_size(scene: Scene, rng: random.Random) -> Made:
    things = unique_shapes(scene)
    pairs = [(p, q) for p in things for q in things if p.size == "large" and q.size == "small"]
    if not pairs:
        return None
    large, small = pick(rng, pairs)
    one, two = shuffled(rng, (large, small))
    asked, meant = pick(rng, (("larger", large), ("smaller", small)))
    return f"Which is {asked}, the {one.shape} or the {two.shape}?", meant.shape


def _compare_place(scene: Scene, rng: random.Random) -> Made:
    things, asked = unique_shapes(scene), pick(rng, tuple(_FURTHER))
    pairs = [(p, q) for p in things for q in things if ahead(p, q, _FURTHER[asked]) >= MIN_OFFSET]
    if not pairs:
        return None
    meant, other = pick(rng, pairs)
    one, two = shuffled(rng, (meant, other))
    return f"Which is further {asked}, the {one.shape} or the {two.shape}?", meant.shape


def _compare_same(scene: Scene, rng: random.Random, what: str) -> Made:
    things, yes = named(scene, without=what), coin(rng)
    pairs = [(p, q) for p in things for q in things if p[0] is not q[0]]
    same = [(one, two) for (p, one), (q, two) in pairs if getattr(p, what) == getattr(q, what)]
    unlike = [(one, two) for (p, one), (q, two) in pairs if getattr(p, what) != getattr(q, what)]
    if not same or not unlike:
        return None
    one, two = pick(rng, same if yes else unlike)
    return f"Are the {pick(rng, one)} and the {pick(rng, two)} the same {what}?", _answer(yes)


# ------------------------------------------------------------------------------------------------------------ logical


def _logical_and(scene: Scene, rng: random.Random) -> Made:
    present, yes = sorted({o.pair for o in scene.objects}), coin(rng)
    if len(present) < 2:
        return None
    pairs = shuffled(rng, present)[:2] if yes else [pick(rng, present), pick(rng, absent_pairs(scene, near=True))]
    return f"Are there both {_two(rng, pairs)} in the image?".replace(" or ", " and "), _answer(yes)


def _logical_or(scene: Scene, rng: random.Random) -> Made:
    absent, yes = absent_pairs(scene, near=True), coin(rng)
    present = sorted({o.pair for o in scene.objects})
    pairs = [pick(rng, present), pick(rng, absent)] if yes else shuffled(rng, absent)[:2]
    return f"Is there either {_two(rng, pairs)} in the image?", _answer(yes)


def _two(rng: random.Random, pairs: list[tuple[str, str]]) -> str:
    return " or ".join(a(f"{color} {shape}") for shape, color in shuffled(rng, pairs))


TYPES: dict[str, dict[str, Callable[[Scene, random.Random], Made]]] = {
    "query": {
        "color": partial(_query_attribute, what="color"),
        "shape": partial(_query_attribute, what="shape"),
        "color by relation": partial(_query_related, what="color"),
        "shape by relation": partial(_query_related, what="shape"),
        "background": _query_ground,
    },
    "choose": {
        "color": partial(_choose_attribute, what="color"),
        "shape": partial(_choose_attribute, what="shape"),
        "size": _choose_size,
        "relation": _choose_relation,
    },
    "verify": {
        "existence": _verify_existence,
        "color": _verify_color,
        "relation": _verify_relation,
        "background": _verify_ground,
    },
    "compare": {
        "size": _compare_size,
        "place": _compare_place,
        "same color": partial(_compare_same, what="color"),
        "same shape": partial(_compare_same, what="shape"),
    },
    "logical": {"and": _logical_and, "or": _logical_or},
}


def examples(scene: Scene, variant: int = 0) -> list[Example]:
    """One question about the scene: the structural types with equal chances, another one where the scene does not give it.

    Returns:
        One `Example`; `answer` is yes, no, left, right, above, below, a size, a colour, a shape or a background's pattern.
    """
    rng = stream("gqa", scene, variant)
    for category in shuffled(rng, TYPES):
        for kind in shuffled(rng, TYPES[category]):
            made = TYPES[category][kind](scene, rng)
            if made:
                prompt = f"{made[0]}\n{SHORT_ANSWER}"
                return [Example("gqa", scene, prompt, made[1], (made[1],), category, meta={"kind": kind})]
    return []
