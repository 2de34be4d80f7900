"""One statement asked twice, once to be answered yes and once no, in the role of MME's perception subtasks (Fu et al. 2023).

`category` takes the place of MME's: existence, count, position, color, and `ground` in the role of its scene. What is asked
in vain is drawn like what is asked rightly, so that a question's words tell nothing about its answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ..world import COLOR_NAMES, GROUNDS, SHAPES, Scene
from .base import Example
from .wording import (
    OPPOSITE,
    RELATIONS,
    a,
    absent_pairs,
    coin,
    holds,
    likely,
    named,
    other_colors,
    pick,
    plural,
    shuffled,
    stream,
)

YES_NO = "Please answer yes or no."

Made = tuple[str, str] | None  # the question to be answered yes, that to be answered no

LINES: tuple[str, ...] = (
    f"Is there a star in the image? {YES_NO}",
    "Is there an orange star in the image? Is there only one star in the image? Is there only one red shape in the image?",
    "Are there 2 stars in the image? Are there 3 red shapes in the image?",
    "Is the large star to the left of the ring? Is the small red object to the right of it? Is it above it or below it?",
    f"Does the image have a striped background? Does the image have an object? {YES_NO}",
    *(f"Does it have a {word} background? Is it {word}?" for word in (*GROUNDS, *COLOR_NAMES, "large", "small")),
    *(f"Are there {number} {plural(shape)} in the {shape}?" for number in range(2, 10) for shape in SHAPES),
)


def _existence(scene: Scene, rng: random.Random) -> Made:
    present = {o.shape for o in scene.objects}
    if coin(rng):
        yes, no = pick(rng, sorted(present)), pick(rng, [s for s in SHAPES if s not in present])
    else:
        pairs = pick(rng, sorted({o.pair for o in scene.objects})), pick(rng, absent_pairs(scene, near=True))
        yes, no = (f"{color} {shape}" for shape, color in pairs)
    return f"Is there {a(yes)} in the image?", f"Is there {a(no)} in the image?"


def _count(scene: Scene, rng: random.Random) -> Made:
    if coin(rng):
        counts = {f"{c} shape": sum(o.color == c for o in scene.objects) for c in COLOR_NAMES}
    else:
        counts = {s: sum(o.shape == s for o in scene.objects) for s in SHAPES}
    # Two kinds that are there in different numbers, either of them asked for: one's number is the other's wrong one.
    pairs = [(words, n, m) for words, n in counts.items() for m in counts.values() if n and m and n != m]
    if not pairs:
        return None
    words, n, m = pick(rng, pairs)
    return _number(words, n), _number(words, m)


def _number(words: str, n: int) -> str:
    return f"Is there only one {words} in the image?" if n == 1 else f"Are there {n} {plural(words)} in the image?"


def _position(scene: Scene, rng: random.Random) -> Made:
    things = named(scene)
    pairs = [(one, two, r) for p, one in things for q, two in things if p is not q for r in RELATIONS if holds(p, q, r)]
    if not pairs:
        return None
    ones, twos, relation = pick(rng, pairs)
    one, two = pick(rng, ones), pick(rng, twos)
    return f"Is the {one} {relation} the {two}?", f"Is the {one} {OPPOSITE[relation]} the {two}?"


def _color(scene: Scene, rng: random.Random) -> Made:
    things = named(scene, without="color")
    if not things:
        return None
    o, names = pick(rng, things)
    words = pick(rng, names)
    (wrong,) = likely(rng, other_colors(scene, o), (p.color for p in scene.objects), 1)
    return f"Is the {words} {o.color}?", f"Is the {words} {wrong}?"


def _ground(scene: Scene, rng: random.Random) -> Made:
    wrong = pick(rng, [g for g in GROUNDS if g != scene.ground.kind])
    return f"Does the image have {a(scene.ground.kind)} background?", f"Does the image have {a(wrong)} background?"


CATEGORIES: dict[str, Callable[[Scene, random.Random], Made]] = {
    "existence": _existence, "count": _count, "position": _position, "color": _color, "ground": _ground,
}  # fmt: skip


def examples(scene: Scene, variant: int = 0) -> list[Example]:
    """Two questions about the scene: the categories with equal chances, another one where the scene does not give it.

    Returns:
        Two `Example`s of one category, `part` 'yes' and 'no', in this order.
    """
    rng = stream("mme", scene, variant)
    for category in shuffled(rng, CATEGORIES):
        made = CATEGORIES[category](scene, rng)
        if made:
            return [
                Example("mme", scene, f"{question} {YES_NO}", answer, (answer,), category, answer)
                for question, answer in zip(made, ("yes", "no"), strict=True)
            ]
    return []
