"""What a caption says, as facts, and which of them are true of the picture: what CIDEr hides.

CIDEr rewards words in common with the references, so an object that is not there costs little if its words are frequent ones.
Here a caption is read as the objects it names, and these are held against the scene's. The terms are CHAIR's (Rohrbach et al.
2018, "Object Hallucination in Image Captioning"): an object is hallucinated if nothing of its kind is in the picture. Its
kind is a shape of a colour; sizes and positions are judged of objects that are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..errors import InputError
from ..stats import bootstrap_statistic, ratio
from .captions import FAMILIES, LISTED, annotated_reference
from .reading import Mention, Sums, read_caption
from .world import MAX_OBJECTS, Scene, SceneObject


def match(mentions: Sequence[Mention], scene: Scene, asked: Iterable[SceneObject] = ()) -> list[SceneObject | None]:
    """Which object of the scene each mention is of, None where there is no such one left; an object is one mention's at most.

    Only objects of the mention's shape and colour come into question. Of all assignments that give as many mentions as possible
    an object, one with the most right sizes and positions is taken, and among these one with the most of `asked`.
    """
    out: list[SceneObject | None] = [None] * len(mentions)
    wanted = {id(o) for o in asked}
    for pair in dict.fromkeys((m.shape, m.color) for m in mentions):
        which = [i for i, m in enumerate(mentions) if (m.shape, m.color) == pair]
        objects = [o for o in scene.objects if o.pair == pair]
        weights = [[_ASKED * _beside(mentions[i], o) + (id(o) in wanted) for o in objects] for i in which]
        for i, k in zip(which, assign(weights), strict=True):
            out[i] = None if k is None else objects[k]
    return out


_ASKED = MAX_OBJECTS + 1  # so many right attributes outweigh: one is worth more than all that `asked` can add
_GIVEN = 4 * _ASKED * (MAX_OBJECTS + 1)  # an object found outweighs all right attributes


def _beside(mention: Mention, o: SceneObject) -> int:
    """How many of size and position are right."""
    return (mention.size == o.size) + (mention.position == o.position)


def assign(weights: Sequence[Sequence[int | None]]) -> list[int | None]:
    """For each row a column or None, no column twice: as many rows as possible, then the largest sum of weights. Exact.

    weights: a row a mention, a column an object (nine at most in a scene: all sets of columns are gone through); None rules a
    pair out. Of equal assignments the one that serves earlier rows by earlier columns.
    """
    best: dict[int, tuple[int, tuple[int | None, ...]]] = {0: (0, ())}
    for row in weights:
        found: dict[int, tuple[int, tuple[int | None, ...]]] = {}
        for used, (total, chosen) in best.items():
            options = [(used, 0, None)] if not row else [*_free(row, used), (used, 0, None)]
            for mask, gain, column in options:
                if mask not in found or total + gain > found[mask][0]:
                    found[mask] = (total + gain, (*chosen, column))
        best = found
    return list(max(best.values(), key=lambda entry: entry[0])[1])


def _free(row: Sequence[int | None], used: int) -> list[tuple[int, int, int | None]]:
    return [(used | 1 << k, _GIVEN + w, k) for k, w in enumerate(row) if w is not None and not used >> k & 1]


@dataclass(frozen=True)
class Facts:
    """What one caption says right and wrong, in counts that add up over captions.

    Objects: named = right + wrong + repeated. right: mentions that are of an object of their shape and colour; wrong: no such
    object is in the scene (hallucinated); repeated: all such objects had been named already. color_mistaken, shape_mistaken:
    those of the wrong ones that have the shape (the colour) of an object that the caption does not name; an object explains one
    of them. asked: objects that the family's references list; missed: those of them that no mention is of.

    Of right mentions: sizes and positions said, and how many of them are wrong. Of the ground: whether it is named, is wrong in
    kind or tone, is asked for by the references, and is missed. Of the sums: statements made, those that are not true of the
    objects asked for, and those that do not follow from the caption's own list. fragments: names in no whole phrase.
    """

    named: int
    right: int
    wrong: int
    repeated: int
    color_mistaken: int
    shape_mistaken: int
    asked: int
    missed: int
    sizes: int
    sizes_wrong: int
    positions: int
    positions_wrong: int
    grounds: int
    grounds_wrong: int
    grounds_asked: int
    grounds_missed: int
    sums: int
    sums_wrong: int
    sums_unlike_list: int
    fragments: int

    @property
    def captions(self) -> int:
        """1: what rates of captions divide by."""
        return 1

    @property
    def hallucinating(self) -> int:
        """1 if any object is hallucinated, else 0."""
        return int(self.wrong > 0)


def caption_facts(text: str, scene: Scene, family: str) -> Facts:
    """Read a caption and hold it against its scene.

    Args:
        text: what was generated, or any text.
        scene: the picture's truth.
        family: which family the prompt asked for; it decides on what is missed.

    Raises:
        InputError: for an unknown family.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown caption family {family!r}: choose one of {', '.join(FAMILIES)}")
    said, asked = read_caption(text), scene.salient(LISTED[family])
    owners = match(said.mentions, scene, asked)
    there = {o.pair for o in scene.objects}
    right = [(m, o) for m, o in zip(said.mentions, owners, strict=True) if o is not None]
    wrong = [m for m in said.mentions if (m.shape, m.color) not in there]
    given = {id(o) for _, o in right}
    color_mistaken, shape_mistaken = _mistaken(wrong, [o for o in scene.objects if id(o) not in given])
    ground_asked = "background" in (w for w, _ in annotated_reference(scene, family, 0))
    sums, of_scene = _stated(said.sums), _stated(_sums_of(asked))
    of_list = _stated(_sums_of(said.mentions))
    return Facts(
        named=len(said.mentions),
        right=len(right),
        wrong=len(wrong),
        repeated=len(said.mentions) - len(right) - len(wrong),
        color_mistaken=color_mistaken,
        shape_mistaken=shape_mistaken,
        asked=len(asked),
        missed=sum(id(o) not in given for o in asked),
        sizes=sum(m.size is not None for m, _ in right),
        sizes_wrong=sum(m.size not in (None, o.size) for m, o in right),
        positions=sum(m.position is not None for m, _ in right),
        positions_wrong=sum(m.position not in (None, o.position) for m, o in right),
        grounds=int(said.ground is not None),
        grounds_wrong=int(said.ground not in (None, (scene.ground.kind, scene.ground.tone))),
        grounds_asked=int(ground_asked),
        grounds_missed=int(ground_asked and said.ground is None),
        sums=len(sums),
        sums_wrong=sum(of_scene.get(name) != value for name, value in sums.items()),
        sums_unlike_list=sum(of_list.get(name) != value for name, value in sums.items()),
        fragments=said.fragments,
    )


def _mistaken(wrong: Sequence[Mention], unnamed: Sequence[SceneObject]) -> tuple[int, int]:
    """How many hallucinated mentions can be explained by a wrong colour, and by a wrong shape, of objects that nobody named."""
    weights = [
        [_beside(m, o) if (m.shape == o.shape) != (m.color == o.color) else None for o in unnamed] for m in wrong
    ]
    meant = [(m, unnamed[k]) for m, k in zip(wrong, assign(weights), strict=True) if k is not None]
    return sum(m.shape == o.shape for m, o in meant), sum(m.color == o.color for m, o in meant)


def _sums_of(listed: Sequence[Mention] | Sequence[SceneObject]) -> Sums:
    """What is true of a list."""
    return Sums(
        count=len(listed),
        large=sum(o.size == "large" for o in listed),
        small=sum(o.size == "small" for o in listed),
        colors=tuple(dict.fromkeys(o.color for o in listed)),
        first=listed[0].shape if listed else None,
        last=listed[-1].shape if listed else None,
    )


def _stated(sums: Sums) -> dict:
    return {f.name: value for f in fields(sums) if (value := getattr(sums, f.name)) not in (None, ())}


# rate -> (what is counted, out of what), names of Facts
RATES: dict[str, tuple[str, str]] = {
    "hallucination": ("wrong", "named"),  # CHAIR_i
    "hallucinating_captions": ("hallucinating", "captions"),  # CHAIR_s
    "omission": ("missed", "asked"),
    "repetition": ("repeated", "named"),
    "mistaken_color": ("color_mistaken", "named"),
    "mistaken_shape": ("shape_mistaken", "named"),
    "size_error": ("sizes_wrong", "sizes"),
    "position_error": ("positions_wrong", "positions"),
    "ground_error": ("grounds_wrong", "grounds"),
    "ground_omission": ("grounds_missed", "grounds_asked"),
    "sum_error": ("sums_wrong", "sums"),
    "sum_inconsistency": ("sums_unlike_list", "sums"),
}


def fact_sums(facts: Sequence[Facts], rate: str) -> np.ndarray:
    """[captions, 2] float64: what each caption adds to a rate's numerator and denominator (see :data:`RATES`).

    For :func:`~dyrate_lib.stats.bootstrap_statistic` and ``paired_statistic``; those of several seeds of a picture are added.
    InputError for an unknown rate or no captions.
    """
    if rate not in RATES:
        raise InputError(f"unknown rate {rate!r}: choose one of {', '.join(RATES)}")
    if not facts:
        raise InputError("a rate needs at least one caption")
    return np.array([[getattr(f, name) for name in RATES[rate]] for f in facts], dtype=np.float64)


def fact_rates(
    facts: Sequence[Facts], n: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[str, float]]:
    """Every rate of :data:`RATES` over captions: {mean, lo, hi, n}, the interval bootstrapped over pictures as a ratio of sums.

    One caption a picture. A rate of nothing (sums in captions that state none) is left out.
    """
    out = {}
    for rate in RATES:
        sums = fact_sums(facts, rate)
        if sums[:, 1].any():
            mean, lo, hi = bootstrap_statistic(sums, ratio, n, seed, level)
            out[rate] = {"mean": mean, "lo": lo, "hi": hi, "n": len(facts)}
    return out
