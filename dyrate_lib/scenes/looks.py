"""Scenes as a camera might have taken them: signs, crop, blur and noise over the plain rendering, in one batched pass.

Rows are grouped by what they need, so a batch of which few rows have a look costs little more than its plain rendering, and
the other rows keep every bit of it. Everything is plain tensor arithmetic, the same on CPU and CUDA up to the last bits of
float32; the noise itself comes from an integer hash and is equal in every bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import InputError
from .lettering import draw_signs
from .render import hash32, pack_scenes, render_packed, to_uint8
from .world import SIZE, Scene

if TYPE_CHECKING:  # the tasks import this package's drawing, not the other way round
    from .tasks.base import Look

BLUR_REACH = 3.0  # standard deviations on either side at which a blur's kernel ends


def crop(pictures: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Enlarge a square of each picture until it fills it, bilinearly.

    Args:
        pictures: float32 [B, 3, S, S].
        squares: float32 [B, 3], x and y of the top left corner and side, px; pixel i reaches from i to i + 1.

    Returns:
        float32 [B, 3, S, S]. Beyond the border of the picture, its outermost pixels go on.
    """
    size = pictures.shape[-1]
    steps = (torch.arange(size, device=pictures.device, dtype=torch.float32) + 0.5) / size
    x, y = (squares[:, i, None] + steps * squares[:, 2, None] for i in range(2))
    x, y = 2 * x / size - 1, 2 * y / size - 1
    grid = torch.stack((x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)), dim=-1)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def gaussian_blur(pictures: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Blur each picture by its own Gaussian, rows and columns one after another.

    Args:
        pictures: float32 [B, 3, H, W].
        sigmas: B standard deviations in px, each above 0; a kernel ends at three of its own.

    Returns:
        float32 [B, 3, H, W]. Beyond the border, the outermost pixels go on.
    """
    down, across = (_lines(sigmas, pictures.shape[dim], pictures.device)[:, None] for dim in (2, 3))
    return (down @ pictures.double() @ across.transpose(2, 3)).to(pictures.dtype)


def _lines(sigmas: Sequence[float], length: int, device: torch.device) -> torch.Tensor:
    """What blurring makes of a line of pixels, as matrices float64 [B, length, length], border included.

    Two products a picture rather than a step for each distance, of which a wide blur has hundreds; float64, so that no
    device's settings shorten the numbers.
    """
    distances, tails = np.zeros((2, len(sigmas), length))
    for sigma, weights, beyond in zip(sigmas, distances, tails, strict=True):
        half = np.exp(-0.5 * (np.arange(math.ceil(BLUR_REACH * sigma) + 1) / sigma) ** 2)
        half /= half[0] + 2 * half[1:].sum()
        n = min(len(half), length)
        weights[:n] = half[:n]
        beyond[:n] = half[::-1].cumsum()[::-1][:n] - half[:n]  # what is farther away than each distance
    near, far = (torch.from_numpy(t).to(device, non_blocking=True) for t in (distances, tails))
    axis = torch.arange(length, device=device)
    out = near[:, (axis[:, None] - axis).abs()]
    out[:, :, 0] += far
    out[:, :, -1] += far.flip(1)
    return out


def pixel_noise(seeds: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Noise of mean 0 and standard deviation 1 for every pixel and channel: float32 [B, 3, size, size].

    The sum of a hash's four bytes, near enough to a Gaussian (it ends at 3.45 standard deviations).

    Args:
        seeds: int64 [B].
        size: px.
    """
    axis = torch.arange(size, device=seeds.device)
    channel = torch.arange(3, device=seeds.device)[None, :, None, None]
    bits = hash32(axis[None, None, None, :], axis[None, None, :, None] * 3 + channel, seeds[:, None, None, None])
    total = (bits & 255) + ((bits >> 8) & 255) + ((bits >> 16) & 255) + (bits >> 24)
    return (total - 510).float() * (1 / math.sqrt(4 * (256**2 - 1) / 12))


def check_look(look: Look) -> None:
    """Refuse a look that no picture can have.

    Raises:
        InputError: for a blur or noise below 0, a crop without a side or reaching out of the picture.
    """
    if not (0 <= look.blur < math.inf and 0 <= look.noise < math.inf):
        raise InputError(f"blur and noise are standard deviations, got {look.blur} and {look.noise}: give 0 or more")
    if look.crop is not None:
        x, y, side = look.crop
        if not (side > 0 and x >= 0 and y >= 0 and x + side <= SIZE and y + side <= SIZE):
            raise InputError(f"crop {look.crop} is no (x, y, side) within a picture of {SIZE} px")


def _rows(chosen: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(chosen).to(device, non_blocking=True)


@torch.no_grad()
def apply_looks(pictures: torch.Tensor, looks: Sequence[Look]) -> torch.Tensor:
    """Give plainly rendered pictures their looks: signs, crop, blur, noise, then limits of 0 and 1.

    Args:
        pictures: float32 [B, 3, 336, 336] in 0..1, not changed.
        looks: B looks.

    Returns:
        float32 [B, 3, 336, 336] in 0..1; rows whose look is plain are equal to what they were.

    Raises:
        InputError: for another number of looks than pictures, or a look that no picture can have.
    """
    if len(looks) != len(pictures):
        raise InputError(f"{len(looks)} looks for {len(pictures)} pictures: give one for each")
    for look in looks:
        check_look(look)
    device, out = pictures.device, pictures.clone()
    signed = [b for b, look in enumerate(looks) if look.signs]
    cropped = [b for b, look in enumerate(looks) if look.crop is not None]
    blurred = [b for b, look in enumerate(looks) if look.blur > 0]
    noisy = [b for b, look in enumerate(looks) if look.noise > 0]
    if signed:
        rows = _rows(signed, device)
        out[rows] = draw_signs(out[rows], [looks[b].signs for b in signed])
    if cropped:
        rows = _rows(cropped, device)
        squares = torch.tensor([looks[b].crop for b in cropped], dtype=torch.float32)
        out[rows] = crop(out[rows], squares.to(device, non_blocking=True))
    if blurred:
        rows = _rows(blurred, device)
        out[rows] = gaussian_blur(out[rows], [looks[b].blur for b in blurred])
    if noisy:
        rows = _rows(noisy, device)
        noise = pixel_noise(_rows([looks[b].seed for b in noisy], device), pictures.shape[-1])
        strength = torch.tensor([looks[b].noise for b in noisy], dtype=torch.float32).to(device, non_blocking=True)
        out[rows] = (out[rows] + noise * strength[:, None, None, None]).clamp(0, 1)
    return out.clamp_(0, 1)


def render_looks(
    objects: np.ndarray, grounds: np.ndarray, looks: Sequence[Look], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Render what :func:`pack_scenes` returned, each scene with its look.

    Args:
        objects, grounds: of B scenes, see :func:`pack_scenes`.
        looks: B looks.
        device: where to render.

    Returns:
        float32 [B, 3, 336, 336] in 0..1; rows whose look is plain equal :func:`render_batch`.

    Raises:
        InputError: for another number of looks than scenes, or a look that no picture can have.
    """
    return apply_looks(render_packed(objects, grounds, device), looks)


def render_look(scene: Scene, look: Look) -> Image.Image:
    """One scene with its look, as an RGB PIL picture of 336 x 336 px."""
    pixels = to_uint8(render_looks(*pack_scenes([scene]), [look])[0]).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)
