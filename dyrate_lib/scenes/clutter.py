"""How much there is to see in a picture, from its pixels alone."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..errors import InputError

EDGE = 0.04  # change of luminance a pixel, of a range of 1, from which on a pixel counts as an edge


def edge_density(picture: Image.Image | np.ndarray) -> float:
    """Share of a picture's pixels that lie on edges, 0..1: a standard measure of visual clutter.

    Edge density orders photographs about as people's ratings of clutter do (Mack and Oliva 2004; compared with other measures by
    Rosenholtz, Li and Nakano 2007). In scenes it is chiefly the ground's texture (plain about 0.01, speckled 0.44) and hardly
    depends on the number of objects, so the two ask different things. Luminance is Rec. 601's; an edge is where its gradient
    (central differences) is longer than :data:`EDGE`.

    Args:
        picture: an image, or uint8 [height, width, 3] of at least 3 x 3 pixels.

    Raises:
        InputError: an array of another shape or type.
    """
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 3:
        raise InputError(
            f"a picture is uint8 [height, width, 3] of 3 pixels a side at least, not {pixels.dtype} {pixels.shape}"
        )
    luminance = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    down, across = np.gradient(luminance)
    return float((np.hypot(down, across)[1:-1, 1:-1] > EDGE).mean())
