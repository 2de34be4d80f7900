"""In the role of TextVQA: words on signs in the picture, ten answers, and both protocols of its prompt.

TextVQA is scored with or without reference text: LLaVA's own evaluation puts what an OCR system read into the prompt, others
leave it out. Scores of the two do not compare: with the text, much of the task can be done without looking. Both are
here, with the same pictures and questions, told apart by `with_text`.

The OCR (deterministic in the example) reads the signs from top to bottom; each word is left out with probability `OCR_DROPS`,
else read with one wrong letter with probability `OCR_MISREADS`. The wrong letter is the word's easiest one to mistake in
our font, so that a word is misread in one way only (`MISREAD`).

Of the ten annotators each says 'unanswerable' with probability `GAVE_UP`, else swaps two neighbouring letters with
probability `MISSPELT`, else says the word. `answer` is the word. The metric is TextVQA's soft accuracy, which needs three of
them to agree.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ..lettering import FONT, WORDS, sign_size
from ..world import COLORS, SIZE, Scene, SceneObject, _between, _clear_of_grid, _pick, _weighted
from .base import SHORT_ANSWER, Example, Look, Sign
from .vizwiz import N_ANNOTATORS, UNANSWERABLE

CATEGORIES = ("one sign", "place", "neighbour", "ink")
REFERENCE = "Reference OCR token:"
OCR_DROPS, OCR_MISREADS = 0.1, 0.08
GAVE_UP, MISSPELT = 0.02, 0.03

N_SIGNS_WEIGHTS = (35, 40, 25)  # of one, two and three signs
GAP = 6  # px between two boards, and between a board and the border
TRIES = 40
NEAR = 40.0  # px from an object's edge to the board of its sign, at most
CLEARLY = 35.0  # px that every other sign is farther away
BOARDS = (
    (34, 34, 40), (92, 18, 24), (14, 66, 38), (20, 34, 92), (60, 40, 24),
    (238, 234, 224), (252, 240, 190), (208, 228, 246), (224, 240, 214),
)  # fmt: skip
MIN_CONTRAST = 0.4  # between the lightness of ink and board, in 0..1


def _misread(word: str) -> str:
    """The word with its most mistakable letter (fewest font pixels from another; ties: the last) read as the other."""
    letters = sorted(c for c in FONT if c.isalpha())
    nearest = {c: min((int((FONT[c] != FONT[o]).sum()), o) for o in letters if o != c) for c in set(word)}
    at = min(range(len(word)), key=lambda i: (nearest[word[i]][0], -i))
    return word[:at] + nearest[word[at]][1] + word[at + 1 :]


MISREAD: dict[str, str] = {word: _misread(word) for word in WORDS}


def _lightness(rgb: tuple[int, int, int]) -> float:
    return (0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]) / 255


def _unit(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    return rgb[0] / 255, rgb[1] / 255, rgb[2] / 255


def _box(sign: Sign) -> tuple[int, int, int, int]:
    width, height = sign_size(sign.text, sign.scale)
    return sign.x, sign.y, sign.x + width, sign.y + height


def _gap(sign: Sign, o: SceneObject) -> float:
    """Distance in px between a board and an object's disc, negative where the board covers some of it."""
    left, top, right, bottom = _box(sign)
    dx, dy = max(left - o.x, 0.0, o.x - right), max(top - o.y, 0.0, o.y - bottom)
    return math.hypot(dx, dy) - o.radius


def _apart(a: Sign, b: Sign) -> bool:
    (l1, t1, r1, b1), (l2, t2, r2, b2) = _box(a), _box(b)
    return r1 + GAP <= l2 or r2 + GAP <= l1 or b1 + GAP <= t2 or b2 + GAP <= t1


def draw_signs_of(scene: Scene, rng: random.Random) -> tuple[list[Sign], list[str]]:
    """One to three signs with different words and inks, apart from each other, clear of the objects where room allows.

    Returns:
        The signs and the names of their inks (colours of the scenes world).
    """
    signs: list[Sign] = []
    inks: list[str] = []
    count = 1 + _weighted(rng, N_SIGNS_WEIGHTS)
    for _ in range(count):
        text = _pick(rng, [w for w in WORDS if w not in [s.text for s in signs]])
        ink = _pick(rng, [c for c in COLORS if c not in inks])
        light = _lightness(COLORS[ink])
        board = _pick(rng, [b for b in BOARDS if abs(_lightness(b) - light) >= MIN_CONTRAST])
        scale = 3 + int(rng.random() * (3 if count == 1 else 2))
        width, height = sign_size(text, scale)
        found: list[tuple[float, Sign]] = []
        for _ in range(TRIES):
            x, y = (int(_between(rng, GAP, SIZE - GAP - side)) for side in (width, height))
            sign = Sign(text, x, y, scale, _unit(COLORS[ink]), _unit(board))
            if all(_apart(sign, s) for s in signs):
                found.append((sum(max(0.0, -_gap(sign, o)) for o in scene.objects), sign))
                if found[-1][0] == 0:
                    break
        if found:
            signs.append(min(found, key=lambda f: f[0])[1])
            inks.append(ink)
    return signs, inks


def _position(sign: Sign) -> str | None:
    """The word for the cell of the 3 x 3 grid that the middle of a sign lies in, None on the border of two."""
    left, top, right, bottom = _box(sign)
    x, y = (left + right) / 2, (top + bottom) / 2
    if not (_clear_of_grid(x) and _clear_of_grid(y)):
        return None
    return SceneObject("", "", "", x, y, 0.0, 0.0, (0.0, 0.0, 0.0)).position


Asked = tuple[str, str]  # question, word


def _ask_place(scene: Scene, signs: Sequence[Sign], inks: Sequence[str], rng: random.Random) -> Asked | None:
    places = [_position(s) for s in signs]
    if None in places:
        return None
    able = [(s, p) for s, p in zip(signs, places, strict=True) if places.count(p) == 1]
    if not able:
        return None
    sign, place = _pick(rng, able)
    return f"What word is at the {place}?", sign.text


def _ask_neighbour(scene: Scene, signs: Sequence[Sign], inks: Sequence[str], rng: random.Random) -> Asked | None:
    pairs = [o.pair for o in scene.objects]
    able: list[tuple[SceneObject, Sign]] = []
    for o in scene.objects:
        gaps = sorted((_gap(s, o), i) for i, s in enumerate(signs))
        if pairs.count(o.pair) == 1 and -0.3 * o.radius < gaps[0][0] < NEAR and gaps[1][0] > gaps[0][0] + CLEARLY:
            able.append((o, signs[gaps[0][1]]))
    if not able:
        return None
    o, sign = _pick(rng, able)
    return f"What does the sign near the {o.color} {o.shape} say?", sign.text


def _ask_ink(scene: Scene, signs: Sequence[Sign], inks: Sequence[str], rng: random.Random) -> Asked | None:
    i = int(rng.random() * len(signs))
    return f"What word is written in {inks[i]}?", signs[i].text


ONE_SIGN = ("What word is written in the image?", "What does the sign say?")
_ASK = {"place": _ask_place, "neighbour": _ask_neighbour, "ink": _ask_ink}
_WEIGHTS = {"place": 35, "neighbour": 45, "ink": 20}


def annotate(rng: random.Random, word: str) -> tuple[str, ...]:
    """What the ten annotators say of a sign that says `word`."""
    said = []
    for _ in range(N_ANNOTATORS):
        draw, at = rng.random(), int(rng.random() * (len(word) - 1))
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        said.append(UNANSWERABLE if draw < GAVE_UP else swapped if draw < GAVE_UP + MISSPELT else word)
    return tuple(said)


def read(rng: random.Random, signs: Sequence[Sign]) -> tuple[str, ...]:
    """What the imperfect OCR reads, from top to bottom; see the module's docstring for its faults."""
    out = []
    for sign in sorted(signs, key=lambda s: (s.y, s.x)):
        drop, wrong = rng.random() < OCR_DROPS, rng.random() < OCR_MISREADS
        if not drop:
            out.append(MISREAD[sign.text] if wrong else sign.text)
    return tuple(out)


def examples(scene: Scene, variant: int = 0, with_text: bool = False) -> list[Example]:
    """The task's prompt about one scene with signs, in a list; deterministic in (split, seed, variant).

    Args:
        scene: the picture's truth.
        variant: another one draws other signs and another question.
        with_text: put the words that the OCR read into the prompt, as LLaVA's evaluation does. Nothing else changes.

    Returns:
        One example. `meta` has the words drawn (`words`), what the OCR read (`ocr`) and `with_text`.
    """
    return several(scene, variant, 1, with_text)


def several(scene: Scene, variant: int, n: int, with_text: bool = False) -> list[Example]:
    """`n` prompts at most about the same signs, no two questions alike, the first that of :func:`examples`.

    Training rows have room for more than one.
    """
    rng = random.Random(f"dyrate-textvqa-1/{scene.split}/{scene.seed}/{variant}")
    signs, inks = draw_signs_of(scene, rng)
    found: dict[str, Example] = {}
    for _ in range(n):
        example = _about(scene, signs, inks, rng, with_text)
        found.setdefault(example.prompt.split("\n")[0], example)
    return list(found.values())


def cover(scene: Scene, look: Look) -> bool:
    """Whether a sign lies over some part of an object's disc, so that the picture may no longer show the object whole."""
    return any(_gap(sign, o) < 0 for sign in look.signs for o in scene.objects)


def _about(scene: Scene, signs: Sequence[Sign], inks: Sequence[str], rng: random.Random, with_text: bool) -> Example:
    """A question about the signs of a picture."""
    category, asked = "one sign", None
    if len(signs) == 1:
        asked = _pick(rng, ONE_SIGN), signs[0].text
    kinds = list(_ASK)
    while asked is None:
        category = kinds.pop(_weighted(rng, tuple(_WEIGHTS[k] for k in kinds)))
        asked = _ASK[category](scene, signs, inks, rng)
    text, word = asked
    said, ocr = annotate(rng, word), read(rng, signs)
    reference = f"{REFERENCE} {', '.join(ocr)}".rstrip() + "\n" if with_text else ""
    meta = dict(words=tuple(s.text for s in signs), ocr=ocr, with_text=with_text)
    prompt = f"{text}\n{reference}{SHORT_ANSWER}"
    return Example("textvqa", scene, prompt, word, said, category, look=Look(signs=tuple(signs)), meta=meta)


LINES: tuple[str, ...] = (
    *(f"{question}\n{REFERENCE} {', '.join(WORDS)}\n{SHORT_ANSWER}" for question in ONE_SIGN),
    f"{REFERENCE} {', '.join(MISREAD.values())}",
    "What word is at the center?",
    "What does the sign near the star say?",
    f" {UNANSWERABLE}",
)
