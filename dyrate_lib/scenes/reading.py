"""What a caption says, read from its text: the objects it names, the ground, the sums. Whether it is true, :mod:`.facts` knows.

Any text is read, broken ones too: whatever makes a whole noun phrase counts, the rest is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .captions import NUMBERS, split_words
from .world import COLOR_NAMES, GROUNDS, SHAPES, TONE_NAMES

SIZES = ("small", "large")
POSITIONS = tuple(f"{v} {h}".strip() for v in ("top", "", "bottom") for h in ("left", "", "right") if v or h) + (
    "center",
)


@dataclass(frozen=True)
class Mention:
    """An object as a text names it. size and position are None where the text leaves them out."""

    color: str
    shape: str
    size: str | None = None
    position: str | None = None


@dataclass(frozen=True)
class Sums:
    """What a text says of its own list. None, or no colours, where it does not say."""

    count: int | None = None
    large: int | None = None
    small: int | None = None
    colors: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None


@dataclass(frozen=True)
class Said:
    """A text, read. ground: (kind, tone) of the first background it names. fragments: names of shapes and colours outside of any
    whole noun phrase or sum ("a red", "a ring at the top")."""

    mentions: tuple[Mention, ...]
    ground: tuple[str, str] | None
    sums: Sums
    fragments: int


def read_caption(text: str) -> Said:
    """What a text says of objects, ground and sums, in any of the three families' wordings or none.

    An object is "(small | large)? COLOUR SHAPE (at the POSITION)?", the ground "KIND TONE background", sums are "NUMBER
    shape(s)", "NUMBER large", "NUMBER small", "in COLOUR (, | and COLOUR)*", "first a SHAPE", "last a SHAPE". Capitals do not
    matter; of several statements of one sum, or of several grounds, the first counts.
    """
    words = [w.lower() for w in split_words(text)]
    mentions: list[Mention] = []
    sums: dict = {}
    ground: tuple[str, str] | None = None
    fragments = i = 0
    while i < len(words):
        found = _mention(words, i)
        if found is not None:
            mention, i = found
            mentions.append(mention)
        elif _is(words, i, GROUNDS, TONE_NAMES, ("background",)):
            ground = ground or (words[i], words[i + 1])
            i += 3
        else:
            said, i, lost = _sum(words, i)
            fragments += lost
            for name, value in said.items():
                sums.setdefault(name, value)
    return Said(tuple(mentions), ground, Sums(**sums), fragments)


def _is(words: Sequence[str], i: int, *allowed: Sequence[str]) -> bool:
    """Whether the words from i on are one out of each of these."""
    return i + len(allowed) <= len(words) and all(words[i + k] in a for k, a in enumerate(allowed))


def _mention(words: Sequence[str], i: int) -> tuple[Mention, int] | None:
    """The object named from word i on and where it ends."""
    size = words[i] if words[i] in SIZES else None
    start = i + (size is not None)
    if not _is(words, start, COLOR_NAMES, SHAPES):
        return None
    color, shape, end = words[start], words[start + 1], start + 2
    if _is(words, end, ("at",), ("the",)):
        for length in (2, 1):  # 'top left' before 'top'
            position = " ".join(words[end + 2 : end + 2 + length])
            if position in POSITIONS:
                return Mention(color, shape, size, position), end + 2 + len(position.split())
    return Mention(color, shape, size), end


def _sum(words: Sequence[str], i: int) -> tuple[dict, int, int]:
    """The sum stated from word i on, where it ends, and whether word i is a stray name of a shape or colour (0 or 1)."""
    if _is(words, i, NUMBERS, ("shape", "shapes")):
        return {"count": NUMBERS.index(words[i])}, i + 2, 0
    if _is(words, i, NUMBERS, SIZES):
        return {words[i + 1]: NUMBERS.index(words[i])}, i + 2, 0
    if _is(words, i, ("first", "last"), ("a",), SHAPES):
        return {words[i]: words[i + 2]}, i + 3, 0
    if _is(words, i, ("in",), COLOR_NAMES):
        colors, end = [words[i + 1]], i + 2
        while _is(words, end, (",", "and"), COLOR_NAMES):
            colors.append(words[end + 1])
            end += 2
        return {"colors": tuple(colors)}, end, 0
    return {}, i + 1, int(words[i] in SHAPES or words[i] in COLOR_NAMES)
