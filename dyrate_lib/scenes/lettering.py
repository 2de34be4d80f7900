"""Words in pictures: a bitmap font of our own, so that letters have the same pixels on every device and with every version.

A letter is 5 x 7 font pixels, capitals in shape as signs have them, and a sign is a word on a board with a margin of one font
pixel: 6 n + 1 font pixels wide for n letters and 9 high, each font pixel a square of `Sign.scale` px. Nothing is anti-aliased.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..errors import InputError

if TYPE_CHECKING:  # the tasks import this module, not the other way round
    from .tasks.base import Sign

LETTER_WIDTH, LETTER_HEIGHT = 5, 7
SIGN_HEIGHT = LETTER_HEIGHT + 2

# Words that signs say. None is a word of the scenes' captions and questions, so a model that says one has read it.
WORDS = (
    "open", "exit", "stop", "sale", "taxi", "hotel", "cafe", "bank", "menu", "shop",
    "push", "pull", "bread", "tea", "coffee", "pizza", "salt", "lunch", "radio", "movie",
    "ticket", "tram", "metro", "gate", "lift", "desk", "wet", "danger", "slow", "museum",
    "free", "enter", "wait", "garden", "beach", "farm", "bakery", "motel", "club", "juice",
    "honey", "soup", "rice", "fish", "zoo", "pool", "toys", "shoes", "hats", "keys",
    "police", "clinic", "dairy", "ferry", "harbor", "tunnel", "bridge", "kiosk", "quiet", "vote",
)  # fmt: skip

_DRAWN = (
    (
        "abcdefghi",
        ".###. ####. .#### ####. ##### ##### .#### #...# #####",
        "#...# #...# #.... #...# #.... #.... #.... #...# ..#..",
        "#...# #...# #.... #...# #.... #.... #.... #...# ..#..",
        "##### ####. #.... #...# ####. ####. #.### ##### ..#..",
        "#...# #...# #.... #...# #.... #.... #...# #...# ..#..",
        "#...# #...# #.... #...# #.... #.... #...# #...# ..#..",
        "#...# ####. .#### ####. ##### #.... .###. #...# #####",
    ),
    (
        "jklmnopqr",
        "..### #...# #.... #...# #...# .###. ####. .###. ####.",
        "...#. #..#. #.... ##.## ##..# #...# #...# #...# #...#",
        "...#. #.#.. #.... #.#.# ##..# #...# #...# #...# #...#",
        "...#. ##... #.... #.#.# #.#.# #...# ####. #...# ####.",
        "...#. #.#.. #.... #...# #..## #...# #.... #.#.# #.#..",
        "#..#. #..#. #.... #...# #..## #...# #.... #..#. #..#.",
        ".##.. #...# ##### #...# #...# .###. #.... .##.# #...#",
    ),
    (
        "stuvwxyz0",
        ".#### ##### #...# #...# #...# #...# #...# ##### .###.",
        "#.... ..#.. #...# #...# #...# #...# #...# ....# #..##",
        "#.... ..#.. #...# #...# #...# .#.#. .#.#. ...#. #..##",
        ".###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#.. #.#.#",
        "....# ..#.. #...# .#.#. #.#.# .#.#. ..#.. .#... ##..#",
        "....# ..#.. #...# .#.#. ##.## #...# ..#.. #.... ##..#",
        "####. ..#.. .###. ..#.. #...# #...# ..#.. ##### .###.",
    ),
    (
        "123456789",
        "..#.. .###. ####. ...#. ##### ..##. ##### .###. .###.",
        ".##.. #...# ....# ..##. #.... .#... ....# #...# #...#",
        "#.#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#",
        "..#.. ...#. .###. #..#. ....# ####. ..#.. .###. .####",
        "..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#",
        "..#.. .#... ....# ...#. #...# #...# .#... #...# ...#.",
        "##### ##### ####. ...#. .###. .###. .#... .###. .##..",
    ),
)


def _read(drawn: tuple[str, ...]) -> dict[str, torch.Tensor]:
    rows = [line.split() for line in drawn[1:]]
    return {c: torch.tensor([[p == "#" for p in row[i]] for row in rows]) for i, c in enumerate(drawn[0])}


FONT: dict[str, torch.Tensor] = {c: glyph for drawn in _DRAWN for c, glyph in _read(drawn).items()}
"""Every character that can be drawn (a-z, 0-9) -> its ink, bool [7, 5]."""


@lru_cache(maxsize=1024)
def bitmap(text: str) -> torch.Tensor:
    """A sign's ink in font pixels, margin included: bool [9, 6 n + 1] for n characters (shared: do not write to it).

    Raises:
        InputError: for an empty text or a character that the font has not.
    """
    missing = sorted(set(text) - set(FONT))
    if missing or not text:
        raise InputError(f"a sign cannot say {text!r}: it takes one or more of a-z and 0-9")
    ink = torch.zeros(SIGN_HEIGHT, sign_size(text, 1)[0], dtype=torch.bool)
    for i, c in enumerate(text):
        left = 1 + i * (LETTER_WIDTH + 1)
        ink[1 : 1 + LETTER_HEIGHT, left : left + LETTER_WIDTH] = FONT[c]
    return ink


def sign_size(text: str, scale: int) -> tuple[int, int]:
    """Width and height in px of a sign's board."""
    return ((LETTER_WIDTH + 1) * len(text) + 1) * scale, SIGN_HEIGHT * scale


def draw_signs(pictures: torch.Tensor, signs: Sequence[Sequence[Sign]]) -> torch.Tensor:
    """Draw each picture's signs, later ones over earlier ones; what reaches over the border is cut off.

    Args:
        pictures: float32 [B, 3, H, W], not changed.
        signs: B sequences of signs.

    Returns:
        float32 [B, 3, H, W]; pixels off the boards, and pictures without signs, are equal to what they were.

    Raises:
        InputError: for a text that the font cannot draw, a scale below 1, or another number of sequences than pictures.
    """
    if len(signs) != len(pictures):
        raise InputError(f"{len(signs)} sequences of signs for {len(pictures)} pictures: give one for each")
    if any(s.scale < 1 for own in signs for s in own):
        raise InputError("a sign's scale is the px of a font pixel: at least 1")
    out, device = pictures.clone(), pictures.device
    x = torch.arange(pictures.shape[3], device=device)[None, None, :]
    y = torch.arange(pictures.shape[2], device=device)[None, :, None]
    for z in range(max((len(own) for own in signs), default=0)):
        chosen = [(b, own[z]) for b, own in enumerate(signs) if len(own) > z]
        inks = [bitmap(s.text) for _, s in chosen]
        width = max(ink.shape[1] for ink in inks)
        padded = torch.stack([F.pad(ink, (0, width - ink.shape[1])) for ink in inks])
        numbers = torch.tensor([[b, s.x, s.y, s.scale, ink.shape[1]] for (b, s), ink in zip(chosen, inks, strict=True)])
        colors = torch.tensor([[s.ink, s.board] for _, s in chosen], dtype=pictures.dtype)
        # Not waiting for the copies, as in render.py.
        padded, numbers, colors = (t.to(device, non_blocking=True) for t in (padded, numbers, colors))
        left, top, scale, columns = (numbers[:, i, None, None] for i in range(1, 5))
        column = torch.div(x - left, scale, rounding_mode="floor")
        row = torch.div(y - top, scale, rounding_mode="floor")
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < SIGN_HEIGHT)
        flat = row.clamp(0, SIGN_HEIGHT - 1) * width + column.clamp(0, width - 1)
        ink = padded.flatten(1).gather(1, flat.flatten(1)).view_as(inside)[:, None]
        drawn = torch.where(ink, colors[:, 0, :, None, None], colors[:, 1, :, None, None])
        rows = numbers[:, 0]
        out[rows] = torch.where(inside[:, None], drawn, out[rows])
    return out
