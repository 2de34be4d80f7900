"""What the tasks share: named random streams, names that single an object out, and what may be denied of a scene."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TypeVar

from ..questions import MIN_OFFSET
from ..world import COLOR_NAMES, HELD_OUT, SHAPES, Scene, SceneObject

T = TypeVar("T")

OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
RELATIONS = tuple(OPPOSITE)


def stream(task: str, scene: Scene, variant: int) -> random.Random:
    """The task's own random numbers for a scene. Only `random()` of it is used, which Python keeps stable."""
    return random.Random(f"dyrate-{task}-1/{scene.split}/{scene.seed}/{variant}")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`, each with the same chance."""
    return items[int(rng.random() * len(items))]


def coin(rng: random.Random) -> bool:
    """True half of the time."""
    return rng.random() < 0.5


def shuffled(rng: random.Random, items: Iterable[T]) -> list[T]:
    """`items` in an order drawn anew, all orders alike."""
    out = list(items)
    for i in range(len(out) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        out[i], out[j] = out[j], out[i]
    return out


def a(words: str) -> str:
    """`words` with the indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(word: str) -> str:
    """The plural of a shape's name."""
    return f"{word}es" if word.endswith("s") else f"{word}s"


def listed(words: Sequence[str], last: str = "or") -> str:
    """'red', 'red or blue', 'red, blue or green'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def names(scene: Scene, o: SceneObject, without: str = "") -> list[str]:
    """Descriptions that fit this object alone, e.g. 'star', 'red star', 'large object' (what its shape is left open).

    without: an attribute that is not to be told: size, color or shape.
    """
    choices = [("", value) if key != without else ("",) for key, value in (("size", o.size), ("color", o.color))]
    found = []
    for size, color, shape in product(*choices, ("", o.shape) if without != "shape" else ("",)):
        fitting = [
            p for p in scene.objects
            if size in ("", p.size) and color in ("", p.color) and shape in ("", p.shape)
        ]  # fmt: skip
        if len(fitting) == 1 and (size or color or shape):
            found.append(" ".join(word for word in (size, color, shape or "object") if word))
    return found


def named(scene: Scene, without: str = "") -> list[tuple[SceneObject, list[str]]]:
    """The objects that have a name of their own, in drawing order, with their names."""
    found = [(o, names(scene, o, without)) for o in scene.objects]
    return [(o, words) for o, words in found if words]


def unique_shapes(scene: Scene) -> list[SceneObject]:
    """Objects whose shape no other object has, in drawing order."""
    shapes = [o.shape for o in scene.objects]
    return [o for o in scene.objects if shapes.count(o.shape) == 1]


def may_deny(scene: Scene, shape: str, color: str) -> bool:
    """Whether a text may say or imply that something is not this pair.

    Held-out pairs are denied in `novel` alone, or training would teach that they are never there.
    """
    return scene.split == "novel" or (shape, color) not in HELD_OUT


def absent_pairs(scene: Scene, near: bool = False) -> list[tuple[str, str]]:
    """(shape, colour) pairs that are not in the picture and may be denied; near: both parts of them are in it, or one."""
    present = {o.pair for o in scene.objects}
    found = [(s, c) for s in SHAPES for c in COLOR_NAMES if (s, c) not in present and may_deny(scene, s, c)]
    if near:
        shapes, colors = {o.shape for o in scene.objects}, {o.color for o in scene.objects}
        found = [(s, c) for s, c in found if s in shapes or c in colors]
    return found


def other_colors(scene: Scene, o: SceneObject) -> list[str]:
    """Colours that the object does not have and that may be denied of it."""
    return [c for c in COLOR_NAMES if c != o.color and may_deny(scene, o.shape, c)]


def other_shapes(scene: Scene, o: SceneObject) -> list[str]:
    """Shapes that the object does not have and that may be denied of it."""
    return [s for s in SHAPES if s != o.shape and may_deny(scene, s, o.color)]


def likely(rng: random.Random, wrong: Sequence[str], seen: Iterable[str], n: int) -> list[str]:
    """`n` of the wrong values, those seen in the picture first (hard ones), each kind in an order drawn anew."""
    seen = set(seen)
    hard = shuffled(rng, [w for w in wrong if w in seen])
    return (hard + shuffled(rng, [w for w in wrong if w not in seen]))[:n]


def ahead(p: SceneObject, o: SceneObject, relation: str) -> float:
    """How far (px) `p` lies in the relation's direction from `o`; negative: the other way."""
    return {
        "to the left of": o.x - p.x, "to the right of": p.x - o.x, "above": o.y - p.y, "below": p.y - o.y,
    }[relation]  # fmt: skip


def holds(p: SceneObject, o: SceneObject, relation: str) -> bool | None:
    """Whether `p` is in this relation to `o`; None where it is not plain to see (less than MIN_OFFSET either way)."""
    distance = ahead(p, o, relation)
    return None if abs(distance) < MIN_OFFSET else distance > 0


def option_block(options: Sequence[str]) -> str:
    """Options as lines 'A. red', 'B. blue', ..."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options))
