"""What a callable takes, and what the machine could do at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from .errors import InputError, ResourceError


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing: median_ms, iqr_ms (distance between the quartiles), n, and all samples_ms."""

    median_ms: float
    iqr_ms: float
    n: int
    samples_ms: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples_ms: list[float]) -> Timing:
        """From single measurements in milliseconds."""
        low, middle, high = np.percentile(samples_ms, [25, 50, 75])
        return cls(float(middle), float(high - low), len(samples_ms), tuple(float(s) for s in samples_ms))


def _device(device: str | torch.device | None) -> torch.device:
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError("a GPU was asked for and there is none: pass device='cpu'")
    return wanted


def _once(fn: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, everything it queued on the GPU included."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    begin = time.perf_counter()
    fn()
    return 1000.0 * (time.perf_counter() - begin)


def time_callable(
    fn: Callable[[], Any], device: str | torch.device | None = None, warmup: int = 3, repeats: int = 10
) -> Timing:
    """Times `fn()`: CUDA events on a GPU, the processor's clock otherwise; `warmup` calls beforehand are not counted.

    Raises InputError for fewer than one repeat, ResourceError for a GPU that is not there.
    """
    _check_counts(warmup, repeats)
    place = _device(device)
    for _ in range(warmup):
        fn()
    return Timing.of([_once(fn, place) for _ in range(repeats)])


def _check_counts(warmup: int, repeats: int) -> None:
    if repeats < 1 or warmup < 0:
        raise InputError(f"repeats must be at least 1 and warmup not negative, not {repeats} and {warmup}")


def machine_ceilings(device: str | torch.device | None = None, repeats: int = 10) -> dict[str, Any]:
    """Measured bounds of this machine: what no decode step and no prefill can beat.

    Returns:
        device (name), copy_gb_s (bytes read plus written per second of a large copy, in 1e9), matmul_tflops (dtype ->
        1e12 FLOPs per second of a large square product; bfloat16 and float32 on a GPU, float32 on a CPU), threads (CPU
        threads that torch uses).
    """
    from .provenance import device_name

    place = _device(device)
    on_gpu = place.type == "cuda"
    size = 2**30 if on_gpu else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    copy = time_callable(lambda: target.copy_(source), place, repeats=repeats)
    side = 8192 if on_gpu else 1024
    rates = {}
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,):
        square = torch.randn(side, side, device=place).to(dtype)
        timing = time_callable(partial(torch.matmul, square, square), place, repeats=repeats)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / timing.median_ms / 1e9
    return {
        "device": device_name(place.type),
        "copy_gb_s": 2 * size / copy.median_ms / 1e6,
        "matmul_tflops": rates,
        "threads": torch.get_num_threads(),
    }
