"""In the role of VizWiz: pictures taken badly, questions in free form, ten annotators who may say 'unanswerable'.

Pictures are cropped, blurred and noisy, each by chance and with strengths from harmless to illegible. Truth is what the
cropped picture shows. A thing of which between `HARDLY` and `MOSTLY` of its disc lies inside is neither there nor away, so
questions that would have to decide on it (existence, number) are not asked.

The model of the annotators (the pictures' stand-in for VizWiz's crowd; deterministic in the example):

- How hard a question is, *d*, adds up what hides the thing asked about. Each term is 1 where half of the annotators give up:
  ``(blur / (BLUR_LIMIT * r))^2 + (noise / (NOISE_LIMIT * sqrt(r / 30)))^2 + ((1 - share) / (1 - SHARE_LIMIT))^2``
  with r the thing's radius in px as enlarged by the crop, blur and noise as in `Look`, share the part of its disc inside
  the crop: 0 for a thing that is not in the picture at all. Limits are narrower where a shape must be told than where a
  colour will do. Contrast with the ground and hiding by other things are left out.
- An annotator says 'unanswerable' with probability ``p = 1 - 2^-d``, independently of the others.
- One who answers names a neighbouring thing with probability ``SLIP + SLIP_HARD * p``: the colour or shape of the nearest
  other thing in the picture (what looks alike where there is none), one more or less, no for yes. A thing that is not in the
  picture has no true answer: whoever answers nevertheless names another one.

`answer` is the most frequent of the ten (ties: the true one, else 'unanswerable'). `category` is VizWiz's answer type.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..questions import _plural
from ..world import COLOR_NAMES, HELD_OUT, SHAPES, SIZE, Scene, SceneObject, _between, _pick, _weighted
from .base import SHORT_ANSWER, Example, Look

UNANSWERABLE = "unanswerable"
CATEGORIES = ("number", "yes/no", "unanswerable", "other")
N_ANNOTATORS = 10
INSUFFICIENT = "When the provided information is insufficient, respond with 'Unanswerable'."

# A camera's faults: how often each occurs, and the range of its strength (drawn evenly on a logarithmic scale).
CROP, CROP_SIDE = 0.36, (110.0, 300.0)
BLUR, BLUR_SIGMA = 0.6, (0.9, 28.0)
NOISE, NOISE_SIGMA = 0.38, (0.03, 1.6)
# What hides a thing: standard deviation of the blur in radii, that of the noise for a radius of 30 px, share inside.
BLUR_LIMIT = {"shape": 0.34, "colour": 0.75}
NOISE_LIMIT = {"shape": 0.75, "colour": 1.1}
SHARE_LIMIT = 0.35
SLIP, SLIP_HARD = 0.03, 0.3
HARDLY, MOSTLY = 0.08, 0.6

KINDS = ("colour", "shape", "largest", "number", "existence")
KIND_WEIGHTS = (40, 30, 8, 11, 11)
ABSENT = 0.05  # how often a question of colour or shape is about a thing that the picture does not show
ALIKE = {
    "red": "orange", "orange": "red", "yellow": "orange", "green": "blue", "cyan": "blue", "blue": "purple",
    "purple": "blue", "pink": "purple", "white": "yellow", "black": "blue", "circle": "hexagon", "square": "diamond",
    "triangle": "heart", "star": "cross", "ring": "circle", "cross": "star", "diamond": "square", "hexagon": "circle",
    "heart": "triangle", "moon": "ring", "yes": "no", "no": "yes",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A question, its true answer (None: the picture has none), what must be told (shape, colour), and of what.

    radius: px in the scene of the smallest thing that matters; share: of its disc inside the crop. near: what someone says who
    slips.
    """

    text: str
    true: str | None
    tell: str
    radius: float
    share: float
    near: str


def disc_share(x: float, y: float, radius: float, crop: tuple[float, float, float] | None) -> float:
    """The share of a disc's area inside a square crop (x, y, side), 0..1: summed over 128 strips, to three digits."""
    if crop is None:
        return 1.0
    left, top, side = crop
    strips, inside, whole = 128, 0.0, 0.0
    for i in range(strips):
        offset = radius * (2 * (i + 0.5) / strips - 1)
        half = math.sqrt(radius * radius - offset * offset)
        whole += 2 * half
        if top <= y + offset <= top + side:
            inside += max(0.0, min(x + half, left + side) - max(x - half, left))
    return inside / whole


def difficulty(look: Look, tell: str, radius: float, share: float) -> float:
    """How hard it is to tell a thing in a picture: d of this module's model, at least 0.

    Args:
        look: the picture's.
        tell: 'shape' or 'colour', what must be told.
        radius: the thing's, px of the scene.
        share: of its disc inside the crop, 0 for a thing that is not there.
    """
    r = radius * (SIZE / look.crop[2] if look.crop else 1.0)
    blur = look.blur / (BLUR_LIMIT[tell] * r)
    noise = look.noise / (NOISE_LIMIT[tell] * math.sqrt(r / 30))
    hidden = (1 - share) / (1 - SHARE_LIMIT)
    return blur * blur + noise * noise + hidden * hidden


def annotate(rng: random.Random, true: str | None, near: str, d: float) -> tuple[str, ...]:
    """What the ten annotators say: true (None: there is no true answer), near (what is said by a slip) or 'unanswerable'.

    Each annotator's luck is drawn whatever d is, so with a greater d whoever gave up still does.
    """
    p = 1 - 2.0**-d
    said = []
    for _ in range(N_ANNOTATORS):
        patience, attention = rng.random(), rng.random()
        slips = attention < SLIP + SLIP_HARD * p
        said.append(UNANSWERABLE if patience < p else near if slips or true is None else true)
    return tuple(said)


def majority(said: Sequence[str], true: str | None) -> str:
    """The most frequent answer; of equally frequent ones the true one, else 'unanswerable', else the first said."""
    counts = Counter(said)
    most = max(counts.values())
    tied = [a for a in counts if counts[a] == most]
    if true is not None and true in tied:
        return true
    return UNANSWERABLE if UNANSWERABLE in tied else tied[0]


def _logarithmic(rng: random.Random, low: float, high: float) -> float:
    return math.exp(_between(rng, math.log(low), math.log(high)))


def draw_look(scene: Scene, rng: random.Random) -> Look:
    """A bad photograph of a scene. A crop keeps at least one thing in the picture; where none does, there is no crop."""
    crop = None
    if rng.random() < CROP:
        for _ in range(8):
            side = _logarithmic(rng, *CROP_SIDE)
            square = (_between(rng, 0, SIZE - side), _between(rng, 0, SIZE - side), side)
            if any(disc_share(o.x, o.y, o.radius, square) >= MOSTLY for o in scene.objects):
                crop = square
                break
    blur = _logarithmic(rng, *BLUR_SIGMA) if rng.random() < BLUR else 0.0
    noise = _logarithmic(rng, *NOISE_SIGMA) if rng.random() < NOISE else 0.0
    return Look(crop=crop, blur=blur, noise=noise, seed=int(rng.random() * 2**24))


class _View:
    """What a cropped picture shows of a scene."""

    def __init__(self, scene: Scene, look: Look):
        self.scene, self.objects = scene, scene.objects
        self.share = [disc_share(o.x, o.y, o.radius, look.crop) for o in scene.objects]
        self.visible = [o for o, s in zip(self.objects, self.share, strict=True) if s >= MOSTLY]

    def of(self, o: SceneObject) -> float:
        return self.share[self.objects.index(o)]

    def decided(self, which: Callable[[SceneObject], bool]) -> bool:
        """Whether each such thing is either in the picture or not."""
        return all(not which(o) or not HARDLY < self.of(o) < MOSTLY for o in self.objects)

    def salient(self, attribute: str) -> str:
        """The word of the most salient visible thing."""
        return getattr(next(o for o in self.scene.salient() if o in self.visible), attribute)

    def near(self, o: SceneObject, attribute: str) -> str:
        """The word of the visible thing nearest to `o` among those that have another one; if none, what looks alike."""
        word = getattr(o, attribute)
        others = [p for p in self.visible if getattr(p, attribute) != word]
        others.sort(key=lambda p: math.hypot(p.x - o.x, p.y - o.y))
        return getattr(others[0], attribute) if others else ALIKE[word]


def _ask_word(view: _View, rng: random.Random, told: str) -> Asked | None:
    """The colour of the only thing of its shape, or the shape of the only one of its colour."""
    known, names, text = {
        "color": ("shape", SHAPES, "What color is the {}?"),
        "shape": ("color", COLOR_NAMES, "What shape is the {} thing?"),
    }[told]
    words = [getattr(o, known) for o in view.objects]
    single = [o for o in view.objects if words.count(getattr(o, known)) == 1]
    absent = [n for n in names if n not in words]
    tell = "shape" if told == "shape" else "colour"
    if absent and rng.random() < ABSENT:
        radius = min(o.radius for o in view.visible)
        return Asked(text.format(_pick(rng, absent)), None, tell, radius, 0.0, view.salient(told))
    if not single:
        return None
    o = _pick(rng, single)
    if view.of(o) < HARDLY:  # people aim at what they ask about: outside the picture half as often
        o = _pick(rng, single)
    share = view.of(o)
    true = getattr(o, told) if share > 0 else None
    return Asked(text.format(getattr(o, known)), true, tell, o.radius, share, view.near(o, told))


def _ask_largest(view: _View, rng: random.Random) -> Asked | None:
    large = [o for o in view.objects if o.size == "large"]
    if len(large) != 1 or view.of(large[0]) < MOSTLY:
        return None
    o = large[0]
    return Asked("What shape is the largest thing?", o.shape, "shape", o.radius, view.of(o), view.near(o, "shape"))


def _ask_number(view: _View, rng: random.Random) -> Asked | None:
    draw, o = rng.random(), _pick(rng, view.visible)
    tell, what, asked = "colour", "things", list(view.objects)
    if draw < 0.4:
        what, asked = f"{o.color} things", [p for p in view.objects if p.color == o.color]
    elif draw < 0.8:
        tell, what, asked = "shape", _plural(o.shape), [p for p in view.objects if p.shape == o.shape]
    if not view.decided(lambda p: p in asked):
        return None
    counted = [p for p in asked if p in view.visible]
    number = len(counted)
    wrong = number + 1 if number == 1 or rng.random() < 0.5 else number - 1
    smallest = min(counted, key=lambda p: p.radius)
    return Asked(f"How many {what} are there?", str(number), tell, smallest.radius, 1.0, str(wrong))


def _ask_existence(view: _View, rng: random.Random) -> Asked | None:
    present = {o.pair for o in view.objects}
    o = _pick(rng, view.visible)
    shape, color, true = o.shape, o.color, "yes"
    if rng.random() < 0.5:
        # One that shares its shape or its colour with a thing in the picture; held-out pairs as in questions.py.
        pairs = [(o.shape, c) for c in COLOR_NAMES] if rng.random() < 0.5 else [(s, o.color) for s in SHAPES]
        pairs = [p for p in pairs if p not in present and (view.scene.split == "novel" or p not in HELD_OUT)]
        if not pairs:
            return None
        (shape, color), true = _pick(rng, pairs), "no"
    text = f"Is there {'an' if color[0] in 'aeiou' else 'a'} {color} {shape} in the picture?"
    return Asked(text, true, "shape", o.radius, view.of(o) if true == "yes" else 1.0, ALIKE[true])


_ASK: dict[str, Callable[[_View, random.Random], Asked | None]] = {
    "colour": lambda view, rng: _ask_word(view, rng, "color"),
    "shape": lambda view, rng: _ask_word(view, rng, "shape"),
    "largest": _ask_largest,
    "number": _ask_number,
    "existence": _ask_existence,
}


def _category(answer: str) -> str:
    if answer.isdigit():
        return "number"
    return "yes/no" if answer in ("yes", "no") else UNANSWERABLE if answer == UNANSWERABLE else "other"


def examples(scene: Scene, variant: int = 0) -> list[Example]:
    """The task's prompt about one bad photograph of a scene, in a list; deterministic in (split, seed, variant).

    Args:
        scene: the picture's truth.
        variant: another one draws another photograph and another question.

    Returns:
        One example. `meta` has the kind of question, the true answer (None: there is none), `difficulty`, and `share`, the
        part inside the picture of the disc of the thing asked about.
    """
    rng = random.Random(f"dyrate-vizwiz-1/{scene.split}/{scene.seed}/{variant}")
    look = draw_look(scene, rng)
    return _about(scene, look, rng)


def several(scene: Scene, variant: int, n: int) -> list[Example]:
    """`n` prompts at most about one bad photograph, no two alike: training rows have room for more than one.

    The first is the one of :func:`examples`; the others have their own annotators.
    """
    rng = random.Random(f"dyrate-vizwiz-1/{scene.split}/{scene.seed}/{variant}")
    look = draw_look(scene, rng)
    found: dict[str, Example] = {}
    for _ in range(n):
        for example in _about(scene, look, rng):
            found.setdefault(example.prompt, example)
    return list(found.values())


def _about(scene: Scene, look: Look, rng: random.Random) -> list[Example]:
    """A question about a bad photograph in a list, empty where the scene gives none."""
    view, asked = _View(scene, look), None
    kinds = list(KINDS)
    while asked is None and kinds:
        kind = kinds.pop(_weighted(rng, tuple(KIND_WEIGHTS[KINDS.index(k)] for k in kinds)))
        asked = _ASK[kind](view, rng)
    if asked is None:
        return []
    d = difficulty(look, asked.tell, asked.radius, asked.share)
    said = annotate(rng, asked.true, asked.near, d)
    answer = majority(said, asked.true)
    meta = dict(kind=kind, true=asked.true, difficulty=d, share=asked.share)
    prompt = f"{asked.text}\n{INSUFFICIENT}\n{SHORT_ANSWER}"
    return [Example("vizwiz", scene, prompt, answer, said, _category(answer), look=look, meta=meta)]


LINES: tuple[str, ...] = (
    f"Is there a thing in the picture?\n{INSUFFICIENT}\n{SHORT_ANSWER}",
    f"What shape is the largest thing?\n{INSUFFICIENT}\n{SHORT_ANSWER}",
    "How many things are there?",
    f" {UNANSWERABLE}",
)
