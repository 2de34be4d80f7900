"""Buffers of keys and values, and whether they fit: two arenas that are kept, so that a captured graph finds them again.

Layers below P hold whole prompts, layers from P on the tokens kept at the prompt's pass, so the second arena shrinks with the
rate. It is asked for only when the rate is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ResourceError
from ..loading import free_memory
from ..models import ModelInfo

ROUND = 32  # buffers are made a multiple of this long, so that near lengths share a graph
PATIENCE = 16
CHUNK = 32768  # rows of the MLP computed at once: bounds what a long prompt takes beside its cache


def rounded(n: int, multiple: int = ROUND) -> int:
    """`n` up to a whole number of `multiple`."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class LayerShape:
    """One layer's buffer: `slots` image entries, then text; `entries` in all."""

    slots: int
    entries: int


class Arena:
    """One block of memory that is carved into buffers. `made` counts how often it moved: a graph of an earlier one is void.

    It grows at once and shrinks only after `PATIENCE` batches in a row that needed less than half of it. moving: called before
    the block is given up, to let go of all buffers of it, which would keep its memory.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, moving: Callable[[], None] = lambda: None) -> None:
        self.device, self.dtype, self.moving, self.made = device, dtype, moving, 0
        self._block: Tensor | None = None
        self._idle = 0
        self._carved: tuple[list[tuple[int, ...]], list[Tensor]] = ([], [])  # the latest: making 60 views takes 0.2 ms
        self._total = 0  # elements of those

    def room(self) -> int:
        """Elements of the block."""
        return 0 if self._block is None else self._block.numel()

    def holds(self, shapes: Sequence[tuple[int, ...]]) -> bool:
        """Whether the block is large enough for these shapes, so that no memory need be found (asking for it takes 1 ms)."""
        return shapes == self._carved[0] or sum(math.prod(shape) for shape in shapes) <= self.room()

    def carve(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Buffers of these shapes, side by side; what is in them is undefined."""
        same = shapes == self._carved[0]
        sizes = [] if same else [math.prod(shape) for shape in shapes]
        total = self._total if same else sum(sizes)
        self._idle = self._idle + 1 if 2 * total < self.room() else 0
        if self._block is None or total > self.room() or self._idle > PATIENCE:
            self.free()  # first
            self._block = torch.empty(total, device=self.device, dtype=self.dtype)
            self._idle, same = 0, False
            sizes = sizes or [math.prod(shape) for shape in shapes]
        if same:
            return self._carved[1]
        parts, at = [], 0
        for shape, size in zip(shapes, sizes, strict=True):
            parts.append(self._block[at : at + size].view(shape))
            at += size
        self._carved, self._total = (list(shapes), parts), total
        return parts

    def free(self) -> None:
        """Give the memory back."""
        self.moving()
        self._block, self._carved, self._total = None, ([], []), 0
        self.made += 1


def cache_bytes(info: ModelInfo, entries: list[int], dtype: torch.dtype) -> int:
    """Bytes of keys and values for one sample, `entries` in each layer."""
    return 2 * sum(entries) * info.n_kv_heads * info.head_dim * dtype.itemsize


def prefill_bytes(info: ModelInfo, batch: int, rows: int, dtype: torch.dtype) -> int:
    """Bytes that a prompt's pass takes beside weights and cache: hidden rows, q, k, v, and one chunk of the MLP."""
    total, heads = batch * rows, info.n_heads + 2 * info.n_kv_heads
    wide = 4 * info.hidden + 2 * heads * info.head_dim
    return (total * wide + min(total, CHUNK) * 3 * info.mlp) * dtype.itemsize


def check_fit(info: ModelInfo, batch: int, rows: int, entries: list[int], device: torch.device, dtype: torch.dtype,
              already: int = 0) -> None:  # fmt: skip
    """Refuse a batch that cannot fit, before it is allocated.

    rows: of the longest prompt at the layers in question; entries: of every layer's buffer that must be made; already: bytes
    that are there and would be given back or used again.

    Raises:
        ResourceError: says how many samples would fit.
    """
    free = free_memory(device)
    if free is None:
        return
    if device.type == "cuda":  # what torch holds but does not use
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free += already

    def need(samples: int) -> int:
        return samples * cache_bytes(info, entries, dtype) + prefill_bytes(info, samples, rows, dtype)

    if need(batch) <= free:
        return
    low, high = 0, batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= free else (low, middle)
    raise ResourceError(
        f"A batch of {batch} needs {need(batch) / 1e9:.1f} GB for keys, values and the prompt's pass, {free / 1e9:.1f} GB are "
        f"free on {device.type}: " + (f"a batch of {low} would fit." if low else "not even one sample would fit.")
    )
