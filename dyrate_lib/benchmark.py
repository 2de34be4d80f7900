"""Latency and memory, prefill and decode apart, and what the machine could do at best.

Times any engine: what is timed is a callable `run(new_tokens)` that generates exactly that many tokens.
`generate_run` makes one from `dyrate_lib.generate`, `stock_run` from transformers' own `model.generate`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import InputError, ResourceError

if TYPE_CHECKING:
    import pandas as pd


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


def latency(
    run: Callable[[int], Any],
    new_tokens: int = 64,
    device: str | torch.device | None = None,
    warmup: int = 2,
    repeats: int = 10,
    batch: int = 1,
) -> dict[str, Any]:
    """Times generation with prefill and decode apart.

    `run(1)` is prefill and one token; `run(new_tokens)` adds `new_tokens - 1` decode steps; decode time per token is
    the difference of their medians over these steps. The two alternate: a drifting clock touches both alike.

    Args:
        run: generates exactly the given number of tokens (end-of-sequence switched off, or the figures mean nothing).
        batch: samples that one run generates for; used for the throughput only.

    Returns:
        prefill_ms, decode_ms_per_token, end_to_end_ms (medians), prefill_iqr_ms, end_to_end_iqr_ms, tokens_per_second,
        new_tokens, batch, repeats, peak_bytes and working_bytes (largest GPU allocation during a run, and how much of
        it came on top of what was allocated before; None on a CPU). Decode time may come out negative if the machine's
        noise exceeds it: use more tokens or repeats.

    Raises:
        InputError: fewer than two tokens, no repeats. ResourceError: no such GPU.
    """
    _check_counts(warmup, repeats)
    if new_tokens < 2 or batch < 1:
        raise InputError(f"new_tokens must be at least 2 and batch at least 1, not {new_tokens} and {batch}")
    place = _device(device)
    for _ in range(warmup):
        run(1)
        run(new_tokens)
    before = _reset_peak(place)
    prefill, total = [], []
    was_on = gc.isenabled()
    gc.disable()  # a collection in the middle of a run would be counted as the model's time
    try:
        for _ in range(repeats):
            prefill.append(_once(lambda: run(1), place))
            total.append(_once(lambda: run(new_tokens), place))
    finally:
        if was_on:
            gc.enable()
    first, full = Timing.of(prefill), Timing.of(total)
    peak = torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None
    return {
        "prefill_ms": first.median_ms,
        "decode_ms_per_token": (full.median_ms - first.median_ms) / (new_tokens - 1),
        "end_to_end_ms": full.median_ms,
        "prefill_iqr_ms": first.iqr_ms,
        "end_to_end_iqr_ms": full.iqr_ms,
        "tokens_per_second": 1000.0 * batch * new_tokens / full.median_ms,
        "new_tokens": new_tokens,
        "batch": batch,
        "repeats": repeats,
        "peak_bytes": peak,
        "working_bytes": peak - before if peak is not None else None,
    }


def _check_counts(warmup: int, repeats: int) -> None:
    if repeats < 1 or warmup < 0:
        raise InputError(f"repeats must be at least 1 and warmup not negative, not {repeats} and {warmup}")


def _reset_peak(place: torch.device) -> int:
    if place.type != "cuda":
        return 0
    torch.cuda.synchronize(place)
    torch.cuda.reset_peak_memory_stats(place)
    return torch.cuda.memory_allocated(place)


def generate_run(model: Any, inputs: Mapping[str, Any], method: Any = None) -> Callable[[int], None]:
    """`run(new_tokens)` for `latency` from our own pruned loop; it never stops at an end-of-sequence token."""
    from .generation import generate

    def run(new_tokens: int) -> None:
        generate(model, inputs, method=method, max_new_tokens=new_tokens, eos_token_id=[], engine="reference")

    return run


def stock_run(model: Any, inputs: Mapping[str, Any], method: Any = None) -> Callable[[int], None]:
    """`run(new_tokens)` from transformers' greedy `model.generate`, inside the method's context if one is given.

    Entering and leaving the context is part of what is timed: it is part of what a user waits for.
    """

    def run(new_tokens: int) -> None:
        with torch.inference_mode(), nullcontext() if method is None else method(model):
            out = model.generate(
                **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        made = out.shape[1] - inputs["input_ids"].shape[1]
        if made != new_tokens:
            raise InputError(f"the model made {made} tokens where {new_tokens} were to be timed")

    return run


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


def latency_table(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Latencies of several methods as a table, each beside its ratio to the first row (the unpruned model).

    Args:
        rows: name -> what `latency` returned. All must have timed the same number of tokens and the same batch.

    Returns:
        DataFrame indexed by name: prefill_ms, decode_ms_per_token, end_to_end_ms, each followed by its `_ratio`, and
        peak_bytes. Raises InputError for no rows or rows that cannot be compared.
    """
    import pandas as pd

    if not rows:
        raise InputError("there are no latencies to tabulate")
    if len({(row["new_tokens"], row["batch"]) for row in rows.values()}) > 1:
        raise InputError("latencies of different lengths or batches cannot stand in one table")
    table = pd.DataFrame.from_dict({name: dict(row) for name, row in rows.items()}, orient="index")
    columns = []
    for column in ("prefill_ms", "decode_ms_per_token", "end_to_end_ms"):
        table[f"{column}_ratio"] = table[column] / table[column].iloc[0]
        columns += [column, f"{column}_ratio"]
    return table[[*columns, "peak_bytes"]].rename_axis("method")
