"""Object hallucination by polling, in the role of POPE (Li et al. 2023): one object that is there, three that are not.

A class of objects is a shape ("a star") or a coloured shape ("a red star"). The three absent ones are POPE's settings:

- random: any absent class, the two kinds with equal chances;
- popular: the most frequent absent class. By the world's construction shapes are drawn alike and each is in far more pictures
  than any of its coloured shapes, so it is an absent shape; equals are decided by chance;
- adversarial: the absent coloured shape that goes most with what is there, that is, shares its shape or its colour with the
  most objects of the picture; equals are decided by chance.

The one that is there serves all three settings, as in POPE; it is of either kind as often as the absent ones are.
"""

from __future__ import annotations

import random

from ..world import SHAPES, Scene
from .base import SHORT_ANSWER, Example
from .wording import a, absent_pairs, coin, pick, stream

PARTS = ("yes", "random", "popular", "adversarial")

LINES: tuple[str, ...] = (
    "Is there a star in the image? Is there an orange star in the image?",
    *(f"Is there {a(shape)} in the image?" for shape in SHAPES),
)


def _adversarial(scene: Scene, rng: random.Random) -> str:
    def company(pair: tuple[str, str]) -> int:
        return sum((o.shape == pair[0]) + (o.color == pair[1]) for o in scene.objects)

    absent = absent_pairs(scene, near=True)
    most = max(map(company, absent))
    shape, color = pick(rng, [pair for pair in absent if company(pair) == most])
    return f"{color} {shape}"


def examples(scene: Scene, variant: int = 0) -> list[Example]:
    """Four questions about the scene, in the order of `PARTS`: the first is to be answered yes, the others no.

    Returns:
        Four `Example`s; `part` and `category` are the setting, `meta["object"]` what is asked for.
    """
    rng = stream("pope", scene, variant)
    present, pairs = {o.shape for o in scene.objects}, sorted({o.pair for o in scene.objects})
    shapes = [s for s in SHAPES if s not in present]
    popular = pick(rng, shapes)
    adversarial = _adversarial(scene, rng)
    rest = [s for s in shapes if s != popular]
    if not (coin(rng) and rest):
        rest = [f"{c} {s}" for s, c in absent_pairs(scene) if f"{c} {s}" != adversarial]
    asked_random = pick(rng, rest)
    yes = pick(rng, sorted(present)) if coin(rng) else " ".join(reversed(pick(rng, pairs)))
    made = zip(PARTS, (yes, asked_random, popular, adversarial), strict=True)
    return [
        Example(
            "pope", scene, f"Is there {a(words)} in the image?\n{SHORT_ANSWER}", answer, (answer,), part, part,
            meta={"object": words},
        )
        for part, words in made
        for answer in ("yes" if part == "yes" else "no",)
    ]  # fmt: skip
