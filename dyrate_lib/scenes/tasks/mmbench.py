"""Four options in their four rotations, in the role of MMBench (Liu et al. 2023) and its CircularEval.

`category` names the ability, after MMBench's: attribute recognition (colours and shapes), object localization, spatial
relationship, counting (which MMBench has within localization) and image style (the background). A picture's question is
asked four times, the options one place further each time: whoever prefers a letter is right in one of the four.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..questions import MIN_OFFSET
from ..world import COLOR_NAMES, GROUNDS, SHAPES, TONE_NAMES, Scene
from .base import OPTION_LETTER, Example
from .wording import coin, likely, named, option_block, other_colors, other_shapes, pick, plural, shuffled, stream

POSITIONS = tuple(
    "center" if (row, column) == ("", "") else f"{row} {column}".strip()
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
DIRECTIONS = ("left", "right", "above", "below")
PLAINLY = 2.0  # a direction is the one named where its offset is at least this many times the other one

# question, the right option, three wrong ones
Made = tuple[str, str, Sequence[str]] | None

LINES: tuple[str, ...] = (
    "What color is the star?\nA. red\nB. blue\nC. green\nD. pink\nWhat shape is the large red object?",
    "Where in the image is the small star?\nA. top left\nB. center\nC. bottom right\nD. bottom",
    "Seen from the star, in which direction is the large red ring?\nA. left\nB. right\nC. above\nD. below",
    "How many stars are there in the image? How many red shapes are there in the image? How many shapes are there?",
    "Which pattern does the background have?\nA. striped\nB. dotted\nWhat color is the background?\nA. gray\nB. navy",
    f"\n{OPTION_LETTER}",
    *(f" {word} {word}.\n" for word in ("A", "B", "C", "D", *GROUNDS, *TONE_NAMES, *COLOR_NAMES, *SHAPES, *map(str, range(13)))),
    *map(plural, SHAPES),
    " star".join(f" {word}" for word in (*POSITIONS, *map(plural, SHAPES))),
)  # fmt: skip


def _color(scene: Scene, rng: random.Random) -> Made:
    things = named(scene, without="color")
    if not things:
        return None
    o, words = pick(rng, things)
    wrong = likely(rng, other_colors(scene, o), (p.color for p in scene.objects), 3)
    return f"What color is the {pick(rng, words)}?", o.color, wrong


def _shape(scene: Scene, rng: random.Random) -> Made:
    things = named(scene, without="shape")
    if not things:
        return None
    o, words = pick(rng, things)
    wrong = likely(rng, other_shapes(scene, o), (p.shape for p in scene.objects), 3)
    return f"What shape is the {pick(rng, words)}?", o.shape, wrong


def _position(scene: Scene, rng: random.Random) -> Made:
    things = named(scene)
    if not things:
        return None
    o, words = pick(rng, things)
    wrong = likely(rng, [p for p in POSITIONS if p != o.position], (p.position for p in scene.objects), 3)
    return f"Where in the image is the {pick(rng, words)}?", o.position, wrong


def _direction(scene: Scene, rng: random.Random) -> Made:
    things, found = named(scene), []
    for p, there in things:
        for q, here in things:
            dx, dy = p.x - q.x, p.y - q.y
            major, minor = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
            if p is not q and major >= max(MIN_OFFSET, PLAINLY * minor):
                across = abs(dx) > abs(dy)
                found.append((here, there, DIRECTIONS[(dx > 0) if across else 2 + (dy > 0)]))
    if not found:
        return None
    here, there, answer = pick(rng, found)
    question = f"Seen from the {pick(rng, here)}, in which direction is the {pick(rng, there)}?"
    return question, answer, [d for d in DIRECTIONS if d != answer]


def _count(scene: Scene, rng: random.Random) -> Made:
    asked = [(f"{c} shapes", sum(o.color == c for o in scene.objects)) for c in COLOR_NAMES]
    asked += [(plural(s), sum(o.shape == s for o in scene.objects)) for s in SHAPES]
    asked.append(("shapes", len(scene.objects)))
    # The options are four numbers in a row and the truth takes each place of the row alike: the least is no better a guess.
    place = int(rng.random() * 4)
    fitting = sorted({n for _, n in asked if n >= place})
    if max(n for _, n in asked) < 3:
        return None
    n = pick(rng, fitting)
    words = pick(rng, [words for words, m in asked if m == n])
    row = [str(k) for k in range(n - place, n - place + 4) if k != n]
    return f"How many {words} are there in the image?", str(n), row


def _style(scene: Scene, rng: random.Random) -> Made:
    if coin(rng):
        wrong = shuffled(rng, [g for g in GROUNDS if g != scene.ground.kind])[:3]
        return "Which pattern does the background have?", scene.ground.kind, wrong
    wrong = shuffled(rng, [t for t in TONE_NAMES if t != scene.ground.tone])[:3]
    return "What color is the background?", scene.ground.tone, wrong


ABILITIES: dict[str, tuple[Callable[[Scene, random.Random], Made], ...]] = {
    "attribute recognition": (_color, _shape),
    "object localization": (_position,),
    "spatial relationship": (_direction,),
    "counting": (_count,),
    "image style": (_style,),
}


def examples(scene: Scene, variant: int = 0) -> list[Example]:
    """One question in its four rotations: the abilities with equal chances, another one where the scene does not give it.

    Returns:
        Four `Example`s, `part` '0' to '3'; rotation r has moved the options on by r places, so that each letter is right once.
    """
    rng = stream("mmbench", scene, variant)
    for category in shuffled(rng, ABILITIES):
        for ask in shuffled(rng, ABILITIES[category]):
            made = ask(scene, rng)
            if made:
                question, right, wrong = made
                order = shuffled(rng, [right, *wrong])
                return [_example(scene, category, question, right, tuple(order[-r:] + order[:-r]), r) for r in range(4)]
    return []


def _example(
    scene: Scene, category: str, question: str, right: str, options: tuple[str, ...], rotation: int
) -> Example:
    answer = "ABCD"[options.index(right)]
    prompt = f"{question}\n{option_block(options)}\n{OPTION_LETTER}"
    return Example(
        "mmbench", scene, prompt, answer, (answer,), category, str(rotation), meta={"options": options}
    )  # fmt: skip
