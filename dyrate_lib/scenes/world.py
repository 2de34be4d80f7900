"""What a scene is and how one is drawn at random: the ground, one to nine objects, the four splits.

A scene is a plain record of numbers and names; the pixels come from :mod:`dyrate_lib.scenes.render`, the words from
:mod:`dyrate_lib.scenes.captions`. Everything is deterministic in ``(split, seed)``; only ``random.Random.random`` is
used, whose stream Python keeps stable across versions and platforms.

Pictures are kept free of needless ambiguity: no object centre lies on the border of two position words, no two
objects share an x coordinate, and small and large radii leave a gap between them. What a caption says can therefore
be read off the picture.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from ..errors import InputError

SIZE = 336
MAX_OBJECTS = 9
SPLITS = ("train", "val", "test", "novel")

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "hexagon", "heart", "moon")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 40),
    "orange": (247, 140, 22),
    "yellow": (247, 225, 45),
    "green": (40, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (45, 85, 215),
    "purple": (130, 50, 160),
    "pink": (245, 130, 180),
    "white": (250, 250, 250),
    "black": (18, 18, 20),
}
COLOR_NAMES = tuple(COLORS)
GROUNDS = ("plain", "shaded", "striped", "checked", "speckled", "cloudy", "dotted")
TONES: dict[str, tuple[int, int, int]] = {
    "gray": (148, 150, 152),
    "beige": (222, 204, 172),
    "brown": (126, 92, 66),
    "navy": (44, 58, 104),
    "olive": (118, 124, 62),
    "lavender": (186, 176, 214),
}
TONE_NAMES = tuple(TONES)

# How far (degrees) each shape may turn either way: enough to vary it, never enough to turn it into another shape.
TURN = {
    "circle": 180, "square": 18, "triangle": 180, "star": 180, "ring": 180,
    "cross": 22, "diamond": 22, "hexagon": 180, "heart": 30, "moon": 180,
}  # fmt: skip

RADIUS_SMALL = (17.0, 23.0)
RADIUS_LARGE = (32.0, 45.0)
COUNT_WEIGHTS = (1, 2, 3, 3, 3, 2, 2, 1, 1)
MIN_GAP_X = 6.0  # px between any two centres' x: 'from left to right' is then well defined
BORDER_BAND = 7.0  # px on either side of the 3x3 grid's lines that no centre enters
MAX_OVERLAP = 0.22  # centres are at least (1 - MAX_OVERLAP) * (r1 + r2) apart

# One held-out colour for every shape, each colour once: unseen pairs of seen parts (the `novel` split).
HELD_OUT = frozenset((shape, COLOR_NAMES[(3 * i + 1) % len(COLOR_NAMES)]) for i, shape in enumerate(SHAPES))
SEEN_PAIRS = tuple((s, c) for s in SHAPES for c in COLOR_NAMES if (s, c) not in HELD_OUT)
NOVEL_PAIRS = tuple((s, c) for s in SHAPES for c in COLOR_NAMES if (s, c) in HELD_OUT)


@dataclass(frozen=True)
class Ground:
    """The textured ground. Colours in 0..1; ``period`` in px, ``angle`` in radians; ``seed`` feeds its noise."""

    kind: str
    tone: str
    rgb: tuple[float, float, float]
    rgb2: tuple[float, float, float]
    period: float
    angle: float
    phase: float
    seed: int


@dataclass(frozen=True)
class SceneObject:
    """One object: names, colour in 0..1, centre and radius in px of the 336 px picture, angle in radians."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[float, float, float]

    @property
    def position(self) -> str:
        """The word for its cell in the 3 x 3 grid: 'top left', ..., 'center', ..., 'bottom right'."""
        column = min(2, int(self.x * 3 / SIZE))
        row = min(2, int(self.y * 3 / SIZE))
        if row == 1 and column == 1:
            return "center"
        return " ".join(w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w)

    @property
    def pair(self) -> tuple[str, str]:
        return (self.shape, self.color)


@dataclass(frozen=True)
class Scene:
    """A picture's whole truth. ``objects`` are in drawing order, the last one on top."""

    seed: int
    split: str
    ground: Ground
    objects: tuple[SceneObject, ...]

    @property
    def id(self) -> str:
        return f"{self.split}-{self.seed:08d}"

    def salient(self, n: int | None = None) -> tuple[SceneObject, ...]:
        """The first ``n`` objects in the order captions use: large before small, then from left to right."""
        ordered = sorted(self.objects, key=lambda o: (o.size != "large", o.x))
        return tuple(ordered[:n])


def _pick(rng: random.Random, items):
    return items[int(rng.random() * len(items))]


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _jitter(rng: random.Random, rgb: tuple[int, int, int], amount: float) -> tuple[float, float, float]:
    r, g, b = (min(1.0, max(0.0, v / 255 + _between(rng, -amount, amount))) for v in rgb)
    return r, g, b


def _make_ground(rng: random.Random, split: str) -> Ground:
    kind, tone = _pick(rng, GROUNDS), _pick(rng, TONE_NAMES)
    rgb = _jitter(rng, TONES[tone], 0.025)
    # A darker or lighter companion of the same tone carries the texture.
    shift = _between(rng, 0.09, 0.15) * (-1 if sum(rgb) > 1.2 or rng.random() < 0.3 else 1)
    r2, g2, b2 = (min(1.0, max(0.0, v + shift)) for v in rgb)
    # The split's number sits in the seed's last two bits, so scenes of different splits can never be equal.
    seed = (int(rng.random() * 2**26) << 2) | SPLITS.index(split)
    return Ground(
        kind=kind,
        tone=tone,
        rgb=rgb,
        rgb2=(r2, g2, b2),
        period=_between(rng, 18.0, 34.0),
        angle=_between(rng, 0.0, math.pi),
        phase=_between(rng, 0.0, 1.0),
        seed=seed,
    )


def _pair_pool(rng: random.Random) -> list[tuple[str, str]]:
    """Half of all scenes draw from a few shapes and colours only, so that repeated ones occur and can be counted."""
    if rng.random() < 0.5:
        return list(SEEN_PAIRS)
    n_shapes, n_colors = 2 + int(rng.random() * 3), 2 + int(rng.random() * 3)
    shapes = {_pick(rng, SHAPES) for _ in range(n_shapes)}
    colors = {_pick(rng, COLOR_NAMES) for _ in range(n_colors)}
    pool = [p for p in SEEN_PAIRS if p[0] in shapes and p[1] in colors]
    return pool or list(SEEN_PAIRS)


def _clear_of_grid(v: float) -> bool:
    return abs(v - SIZE / 3) >= BORDER_BAND and abs(v - 2 * SIZE / 3) >= BORDER_BAND


def _place(rng: random.Random, radius: float, placed: list[SceneObject]) -> tuple[float, float] | None:
    margin = radius + 3.0
    for _ in range(40):
        x, y = _between(rng, margin, SIZE - margin), _between(rng, margin, SIZE - margin)
        if not (_clear_of_grid(x) and _clear_of_grid(y)):
            continue
        if all(
            abs(x - o.x) >= MIN_GAP_X
            and (x - o.x) ** 2 + (y - o.y) ** 2 >= ((1 - MAX_OVERLAP) * (radius + o.radius)) ** 2
            for o in placed
        ):
            return x, y
    return None


def make_scene(seed: int, split: str) -> Scene:
    """Draw the scene number ``seed`` of a split.

    Args:
        seed: any non-negative integer; the same one always gives the same scene.
        split: ``train``, ``val`` and ``test`` never hold a held-out (shape, colour) pair; every ``novel`` scene holds
            at least one. No scene of one split can equal a scene of another.

    Raises:
        InputError: for an unknown split or a negative seed.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if seed < 0:
        raise InputError(f"a scene's seed must not be negative, got {seed}")
    rng = random.Random(f"dyrate-scenes-1/{split}/{seed}")
    ground = _make_ground(rng, split)
    count = 1 + _weighted(rng, COUNT_WEIGHTS)
    pool = _pair_pool(rng)
    pairs = [_pick(rng, pool) for _ in range(count)]
    if split == "novel":
        # The first of the pairs is the one sure to find room, so every novel scene holds a held-out pair.
        pairs[0] = _pick(rng, NOVEL_PAIRS)
        pairs[1:] = [_pick(rng, NOVEL_PAIRS) if rng.random() < 0.35 else p for p in pairs[1:]]
    p_large = 0.5 if count <= 6 else 0.35
    placed: list[SceneObject] = []
    for shape, color in pairs:
        size = "large" if rng.random() < p_large else "small"
        radius = _between(rng, *(RADIUS_LARGE if size == "large" else RADIUS_SMALL))
        spot = _place(rng, radius, placed)
        if spot is None and size == "large":
            size, radius = "small", _between(rng, *RADIUS_SMALL)
            spot = _place(rng, radius, placed)
        if spot is None:
            continue
        turn = math.radians(TURN[shape])
        placed.append(
            SceneObject(
                shape=shape,
                color=color,
                size=size,
                x=spot[0],
                y=spot[1],
                radius=radius,
                angle=_between(rng, -turn, turn),
                rgb=_jitter(rng, COLORS[color], 0.03),
            )
        )
    return Scene(seed=seed, split=split, ground=ground, objects=tuple(placed))


def _weighted(rng: random.Random, weights: tuple[int, ...]) -> int:
    target = rng.random() * sum(weights)
    for i, w in enumerate(weights):
        target -= w
        if target < 0:
            return i
    return len(weights) - 1
