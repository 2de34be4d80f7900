"""Scenes to pixels: one torch implementation, vectorised over the batch, the same on CPU and CUDA.

Objects are signed distance functions (negative inside, in px), turned into coverage by a one-pixel ramp, which is what
anti-aliases them. Each object is computed in a tile around its own centre only, a ninth of the picture, and objects of
one shape are computed together over the whole batch; tiles are then laid over the ground in drawing order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import InputError
from .world import GROUNDS, MAX_OBJECTS, SHAPES, SIZE, Scene

# Copies to the device are all non_blocking: a waiting copy would make the host wait for the training step in flight.

TILE = 112  # px; the largest object's reach (1.12 * 45 px each way) fits with room for the ramp
_PAD = TILE // 2 + 2
OBJECT_FIELDS = 8  # shape id (-1: none), x, y, radius, angle, r, g, b
GROUND_FIELDS = 11  # kind id, rgb, rgb2, period, angle, phase, seed


def pack_scenes(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Scenes as numbers: objects float64 [B, 9, 8] (shape id -1 where there is none) and grounds float64 [B, 11]."""
    objects = np.zeros((len(scenes), MAX_OBJECTS, OBJECT_FIELDS))
    objects[:, :, 0] = -1
    grounds = np.zeros((len(scenes), GROUND_FIELDS))
    for b, scene in enumerate(scenes):
        for z, o in enumerate(scene.objects):
            objects[b, z] = (SHAPES.index(o.shape), o.x, o.y, o.radius, o.angle, *o.rgb)
        g = scene.ground
        grounds[b] = (GROUNDS.index(g.kind), *g.rgb, *g.rgb2, g.period, g.angle, g.phase, g.seed)
    return objects, grounds


def _box(x, y, half_x, half_y):
    dx, dy = x.abs() - half_x, y.abs() - half_y
    outside = torch.sqrt(dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2)
    return outside + torch.maximum(dx, dy).clamp(max=0)


def _half_planes(x, y, n: int, turn: float):
    """Signed distance to each of n lines at unit apothem directions: [n, ...], the apothem not yet taken off."""
    angles = [turn + 2 * math.pi * k / n for k in range(n)]
    return torch.stack([x * math.cos(a) + y * math.sin(a) for a in angles])


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Distance in px to a shape of radius ``r`` at the origin, negative inside; x right, y down; all broadcastable."""
    length = torch.sqrt(x * x + y * y + 1e-12)
    if shape == "circle":
        return length - 0.95 * r
    if shape == "ring":
        return (length - 0.74 * r).abs() - 0.25 * r
    if shape == "square":
        return _box(x, y, 0.82 * r, 0.82 * r)
    if shape == "cross":
        return torch.minimum(_box(x, y, 1.02 * r, 0.32 * r), _box(x, y, 0.32 * r, 1.02 * r))
    if shape == "diamond":
        half_w, half_h = 0.62 * r, 1.1 * r
        return (x.abs() * half_h + y.abs() * half_w - half_w * half_h) / torch.sqrt(half_w**2 + half_h**2)
    if shape == "triangle":
        return _half_planes(x, y, 3, math.pi / 2).amax(0) - 0.55 * r
    if shape == "hexagon":
        return _half_planes(x, y, 6, 0.0).amax(0) - 0.86 * r
    if shape == "star":
        # A point is in a five-pointed star if it is beyond at most one of the five lines.
        most, second, *rest = _half_planes(x, y, 5, math.pi / 2)
        most, second = torch.maximum(most, second), torch.minimum(most, second)
        for d in rest:
            most, second = torch.maximum(most, d), torch.maximum(second, torch.minimum(most, d))
        return second - 0.34 * r
    if shape == "heart":
        side, y = 0.56 * r, y - 0.12 * r
        diagonal = _box((x + y) * math.sqrt(0.5), (x - y) * math.sqrt(0.5), side, side)
        offset = side * math.sqrt(0.5)
        lobes = torch.sqrt((x.abs() - offset) ** 2 + (y + offset) ** 2 + 1e-12) - side
        return torch.minimum(diagonal, lobes)
    if shape == "moon":
        bite = torch.sqrt((x - 0.52 * r) ** 2 + y * y + 1e-12)
        return torch.maximum(length - r, 0.82 * r - bite)
    raise InputError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")


def hash32(a: torch.Tensor, b: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """32 pseudo-random bits for each integer pair, int64: integer arithmetic, hence equal on every device."""
    h = (a * 73856093) ^ (b * 19349663) ^ (seed * 83492791)
    h = h & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    h = ((h ^ (h >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return h ^ (h >> 15)


def _hash01(a: torch.Tensor, b: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """A pseudo-random number in 0..1 for each integer pair."""
    return (hash32(a, b, seed) & 0xFFFFFF).float() / float(0xFFFFFF)


def _blend_map(kind: str, p: torch.Tensor, seeds: torch.Tensor, size: int) -> torch.Tensor:
    """How much of the second colour each pixel has: [b, size, size] in 0..1. ``p`` [b, 3] = period, angle, phase."""
    device = p.device
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (SIZE / size)
    y, x = axis[:, None], axis[None, :]
    period, angle, phase = (p[:, i, None, None] for i in range(3))
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = x * cos + y * sin + phase * period, y * cos - x * sin + phase * period
    if kind == "plain":
        return torch.zeros(len(p), size, size, device=device)
    if kind == "shaded":
        reach = SIZE * (cos.abs() + sin.abs())
        low = SIZE * torch.minimum(cos, torch.zeros_like(cos))
        return ((x * cos + y * sin - low) / reach * 1.6 - 0.3).clamp(0, 1)

    def wave(t):  # a square wave with soft edges about a pixel wide
        return (0.5 + torch.sin(t * (2 * math.pi / period)) * period / (2 * math.pi)).clamp(0, 1)

    if kind == "striped":
        return wave(u)
    if kind == "checked":
        a, b = wave(u), wave(v)
        return a + b - 2 * a * b
    if kind == "dotted":
        cell = period * 0.9
        du, dv = torch.remainder(u, cell) - cell / 2, torch.remainder(v, cell) - cell / 2
        return (0.5 + cell * 0.27 - torch.sqrt(du * du + dv * dv + 1e-12)).clamp(0, 1)
    if kind == "speckled":
        ix, iy = (x / 3).long(), (y / 3).long()
        return (_hash01(ix, iy, seeds[:, None, None]) < 0.3).float()
    if kind == "cloudy":
        grid = torch.arange(9, device=device)
        coarse = _hash01(grid[None, :], grid[:, None], seeds[:, None, None])
        grid = torch.arange(17, device=device)
        fine = _hash01(grid[None, :] + 50, grid[:, None], seeds[:, None, None])
        layers = [F.interpolate(n[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]
                  for n in (coarse, fine)]  # fmt: skip
        return ((0.65 * layers[0] + 0.35 * layers[1]) * 2.2 - 0.6).clamp(0, 1)
    raise InputError(f"unknown ground {kind!r}: choose one of {', '.join(GROUNDS)}")


def _grounds(grounds: np.ndarray, device: torch.device, size: int) -> torch.Tensor:
    numbers = torch.from_numpy(grounds[:, 1:10].astype(np.float32)).to(device, non_blocking=True)
    seeds = torch.from_numpy(grounds[:, 10].astype(np.int64)).to(device, non_blocking=True)
    blend = torch.zeros(len(grounds), size, size, device=device)
    for kind_id in np.unique(grounds[:, 0].astype(int)):
        rows = torch.from_numpy(np.flatnonzero(grounds[:, 0] == kind_id)).to(device, non_blocking=True)
        blend[rows] = _blend_map(GROUNDS[kind_id], numbers[rows, 6:9], seeds[rows], size)
    first, second = numbers[:, 0:3, None, None], numbers[:, 3:6, None, None]
    return first + (second - first) * blend[:, None]


def _tiles(flat: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Coverage [M, TILE, TILE] of M objects in their tiles, and the tiles' top-left corners int64 [M, 2] (x, y)."""
    corner = np.floor(flat[:, 1:3]).astype(np.int64) - TILE // 2
    local = torch.from_numpy((flat[:, 1:3] - corner).astype(np.float32)).to(device, non_blocking=True)
    numbers = torch.from_numpy(flat[:, 3:5].astype(np.float32)).to(device, non_blocking=True)
    axis = torch.arange(TILE, device=device, dtype=torch.float32) + 0.5
    cover = torch.zeros(len(flat), TILE, TILE, device=device)
    for shape_id in np.unique(flat[:, 0].astype(int)):
        rows = torch.from_numpy(np.flatnonzero(flat[:, 0] == shape_id)).to(device, non_blocking=True)
        dx = axis[None, None, :] - local[rows, 0, None, None]
        dy = axis[None, :, None] - local[rows, 1, None, None]
        radius, angle = numbers[rows, 0, None, None], numbers[rows, 1, None, None]
        cos, sin = torch.cos(angle), torch.sin(angle)
        distance = signed_distance(SHAPES[shape_id], dx * cos + dy * sin, dy * cos - dx * sin, radius)
        cover[rows] = (0.5 - distance).clamp(0, 1)
    return cover, torch.from_numpy(corner).to(device, non_blocking=True)


@torch.no_grad()
def render_packed(objects: np.ndarray, grounds: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Render what :func:`pack_scenes` returned: float32 [B, 3, 336, 336] in 0..1 on ``device``."""
    device = torch.device(device)
    batch = len(objects)
    ground = _grounds(grounds, device, SIZE)
    side = SIZE + 2 * _PAD
    canvas = torch.zeros(batch, 3, side, side, device=device)
    canvas[:, :, _PAD:-_PAD, _PAD:-_PAD] = ground
    canvas = canvas.view(batch, 3, side * side)
    present = objects[:, :, 0] >= 0
    if present.any():
        where = np.argwhere(present)  # row-major: batch, then drawing order
        flat = objects[present]
        cover, corner = _tiles(flat, device)
        rgb = torch.from_numpy(flat[:, 5:8].astype(np.float32)).to(device, non_blocking=True)
        step = torch.arange(TILE, device=device)
        for z in range(int(where[:, 1].max()) + 1):
            chosen_np = np.flatnonzero(where[:, 1] == z)
            chosen = torch.from_numpy(chosen_np).to(device, non_blocking=True)
            rows = torch.from_numpy(where[chosen_np, 0]).to(device, non_blocking=True)
            index = (corner[chosen, 1, None, None] + _PAD + step[None, :, None]) * side
            index = (index + corner[chosen, 0, None, None] + _PAD + step[None, None, :]).flatten(1)
            index = index[:, None].expand(-1, 3, -1)
            alpha = cover[chosen].flatten(1)[:, None]
            picked = canvas[rows]
            under = picked.gather(2, index)
            picked.scatter_(2, index, under + (rgb[chosen, :, None] - under) * alpha)
            canvas[rows] = picked
    return canvas.view(batch, 3, side, side)[:, :, _PAD:-_PAD, _PAD:-_PAD].contiguous()


def render_batch(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> torch.Tensor:
    """Render scenes together.

    Args:
        scenes: B scenes.
        device: where to render.

    Returns:
        float32 [B, 3, 336, 336], values in 0..1 (equal to :func:`render` up to its rounding to 8 bits).
    """
    return render_packed(*pack_scenes(scenes), device)


def to_uint8(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in 0..1 as uint8, rounded to the nearest level."""
    return (pictures * 255).round().clamp(0, 255).to(torch.uint8)


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """One scene as an RGB PIL picture of ``size`` x ``size`` px (other sizes than 336 are resampled, Lanczos)."""
    pixels = to_uint8(render_batch([scene])[0]).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels, "RGB")
    return picture if size == SIZE else picture.resize((size, size), Image.Resampling.LANCZOS)


def object_masks(scene: Scene) -> torch.Tensor:
    """What is visible of each object: float32 [n, 336, 336] coverage in 0..1, hidden parts taken off."""
    objects, _ = pack_scenes([scene])
    flat = objects[0][: len(scene.objects)]
    cover, corner = _tiles(flat, torch.device("cpu"))
    side = SIZE + 2 * _PAD
    masks = torch.zeros(len(flat), side, side)
    for z, (x, y) in enumerate((corner + _PAD).tolist()):
        masks[:z, y : y + TILE, x : x + TILE] *= 1 - cover[z]
        masks[z, y : y + TILE, x : x + TILE] = cover[z]
    return masks[:, _PAD:-_PAD, _PAD:-_PAD].contiguous()
