"""What each patch of a picture says: targets that teach a vision tower to tell letters and words apart.

An answer about a sign is one token behind the whole language model; the patches that a sign covers are about seventeen labels
right where the pixels are read.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from .lettering import LETTER_WIDTH, WORDS, sign_size
from .packing import N_IMAGE
from .tokenizer import PATCH_SIZE
from .world import SIZE

if TYPE_CHECKING:
    from .tasks.base import Look

NO_TEXT = -1
LETTERS = string.ascii_lowercase
N_TEXTS = (len(WORDS), len(LETTERS))


def patch_texts(look: Look) -> np.ndarray:
    """The word and the letter under the centre of each patch of the picture.

    Letters are those whose cell (5 font pixels and half of the gap on either side) the centre lies in; the margin belongs to
    the letter next to it. A later sign lies over an earlier one, as it is drawn.

    Returns:
        int8 [2, 576], raster order: index into `WORDS` and into `LETTERS`, `NO_TEXT` where no sign is, or where the picture is
        no longer where its signs were drawn (a crop).
    """
    out = np.full((2, N_IMAGE), NO_TEXT, dtype=np.int8)
    if look.crop is not None:
        return out
    centres = np.arange(SIZE // PATCH_SIZE) * PATCH_SIZE + PATCH_SIZE / 2
    grid = out.reshape(2, len(centres), len(centres))
    for sign in look.signs:
        width, height = sign_size(sign.text, sign.scale)
        columns = np.flatnonzero((centres >= sign.x) & (centres < sign.x + width))
        rows = np.flatnonzero((centres >= sign.y) & (centres < sign.y + height))
        cells = ((centres[columns] - sign.x) / sign.scale - 0.5) // (LETTER_WIDTH + 1)
        letters = [LETTERS.index(sign.text[int(c)]) for c in cells.clip(0, len(sign.text) - 1)]
        grid[0][np.ix_(rows, columns)] = WORDS.index(sign.text)
        grid[1][np.ix_(rows, columns)] = letters
    return out


def words_shown(looks: Iterable[Look]) -> np.ndarray:
    """Which words of `WORDS` each picture's signs say: float32 [B, 60]."""
    return np.array([[w in {s.text for s in look.signs} for w in WORDS] for look in looks], dtype=np.float32)
