"""Questions about a scene with one-word answers, computed from its truth."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .world import COLOR_NAMES, HELD_OUT, SHAPES, Scene, SceneObject

QUESTION_KINDS = ("existence", "colour", "count", "relation")
SUFFIX = "Answer the question using a single word or phrase."
MIN_OFFSET = 30.0  # px: a relation is asked only where it is plain to see


@dataclass(frozen=True)
class Question:
    """A question in its full wording (``prompt``, without the chat template) and its one-word ``answer``."""

    kind: str
    prompt: str
    answer: str


def _ask(kind: str, text: str, answer: str) -> Question:
    return Question(kind, f"{text}\n{SUFFIX}", answer)


def _pick(rng: random.Random, items):
    return items[int(rng.random() * len(items))]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _existence(scene: Scene, rng: random.Random, answer: bool) -> Question | None:
    present = {o.pair for o in scene.objects}
    if answer:
        pool = sorted(present)
        if scene.split == "novel" and rng.random() < 0.5:
            pool = [p for p in pool if p in HELD_OUT]
    else:
        # Hard ones: an absent pair that shares its shape or its colour with something in the picture.
        o = _pick(rng, scene.objects)
        near = [(o.shape, c) for c in COLOR_NAMES] if rng.random() < 0.5 else [(s, o.color) for s in SHAPES]
        # Held-out pairs are asked about in `novel` alone, or training would teach that they are never there.
        pool = [p for p in near if p not in present and (scene.split == "novel" or p not in HELD_OUT)]
    if not pool:
        return None
    shape, color = _pick(rng, pool)
    article = "an" if color[0] in "aeiou" else "a"
    return _ask("existence", f"Is there {article} {color} {shape} in the image?", "yes" if answer else "no")


def _unique_shapes(scene: Scene) -> list[SceneObject]:
    names = [o.shape for o in scene.objects]
    return [o for o in scene.objects if names.count(o.shape) == 1]


def _color(scene: Scene, rng: random.Random) -> Question | None:
    unique = _unique_shapes(scene)
    if not unique:
        return None
    o = _pick(rng, unique)
    return _ask("colour", f"What color is the {o.shape}?", o.color)


def _count(scene: Scene, rng: random.Random) -> Question:
    draw = rng.random()
    if draw < 0.4:
        color = _pick(rng, COLOR_NAMES) if rng.random() < 0.15 else _pick(rng, scene.objects).color
        n = sum(o.color == color for o in scene.objects)
        return _ask("count", f"How many {color} shapes are there?", str(n))
    if draw < 0.8:
        shape = _pick(rng, SHAPES) if rng.random() < 0.15 else _pick(rng, scene.objects).shape
        n = sum(o.shape == shape for o in scene.objects)
        return _ask("count", f"How many {_plural(shape)} are there?", str(n))
    return _ask("count", "How many shapes are there?", str(len(scene.objects)))


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    unique = _unique_shapes(scene)
    if len(unique) < 2:
        return None
    a = _pick(rng, unique)
    b = _pick(rng, [o for o in unique if o is not a])
    dx, dy = b.x - a.x, b.y - a.y
    across = abs(dx) >= MIN_OFFSET and (abs(dy) < MIN_OFFSET or rng.random() < 0.5)
    if not across and abs(dy) < MIN_OFFSET:
        return None
    names = ("left of", "right of") if across else ("above", "below")
    true = names[0] if (dx if across else dy) > 0 else names[1]
    if rng.random() < 0.5:
        options = f"{names[0]} or {names[1]}".replace("left of or right of", "left or right of")
        return _ask("relation", f"Is the {a.shape} {options} the {b.shape}?", true.split()[0])
    asked = _pick(rng, names)
    return _ask("relation", f"Is the {a.shape} {asked} the {b.shape}?", "yes" if asked == true else "no")


def questions(scene: Scene, variant: int = 0) -> list[Question]:
    """A scene's questions, deterministic in the scene and ``variant`` (another variant draws others).

    Returns:
        At most two of existence (one to be answered yes, one no), one of colour, one of count, one of relation, in this
        order; a kind is left out where the scene gives no such question (no unique shape, say).
    """
    rng = random.Random(f"dyrate-questions-1/{scene.split}/{scene.seed}/{variant}")
    found = [_existence(scene, rng, True), _existence(scene, rng, False), _color(scene, rng), _count(scene, rng)]
    found.append(_relation(scene, rng))
    return [q for q in found if q is not None]
