"""Notebook 04: contenders sampled in turns, so that a machine whose clock drifts treats them alike and rounds are paired."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..engine import Engine
from ..errors import InputError, ResourceError
from .efficiency_clock import Clock, Sample

MEMORY = (ResourceError, torch.OutOfMemoryError)  # what fewer samples would cure


@dataclass
class Contender:
    """One loop under one method. run(n, clock): generate n tokens and tell the clock of each; most: samples at most."""

    name: str
    kind: str
    method: str
    run: Callable[[int, Clock], Any]
    most: int = 20
    samples: list[Sample] = field(default_factory=list)
    long: list[Sample] = field(default_factory=list)


def timed(contender: Contender, n: int, device: torch.device, at: Sequence[int]) -> Sample:
    """One run of n tokens, timed."""
    clock = Clock(device, [*at, n])
    clock.begin()
    contender.run(n, clock)
    found = clock.end()
    if found["tokens"] != n:  # then times would stand under the wrong numbers of tokens
        raise InputError(f"{contender.name} told of {found['tokens']} tokens where {n} were to be timed")
    return found


def clear(engine: Engine | None, device: torch.device) -> None:
    """Give back caches, graphs and what the allocator holds."""
    if engine is not None:
        engine.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def kv_held(engine: Engine) -> int:
    """Bytes of keys and values that the engine's latest run holds, all samples."""
    state = next(reversed(engine.plans.values())).state
    return sum(buffer.numel() * buffer.element_size() for pair in (*state.low, *state.tail) for buffer in pair)


@dataclass
class Rounds:
    """How to sample: new tokens of a run and its samples, of a long run and its samples, runs to warm up, and until when."""

    new: int
    repeats: int
    long: int
    long_repeats: int
    warmup: int
    at: tuple[int, ...]
    deadline: float


def sample(
    contenders: Sequence[Contender], rounds: Rounds, device: torch.device, engine: Engine | None
) -> dict[str, str]:
    """Sample all contenders in turns, first short runs, then long ones; returns what failed: {contender: reason}.

    A contender with fewer samples than others takes part in every second (third, ..) round. Where all do not fit on the device
    together, or not beside each other, they are sampled one after the other instead, which the result then says ("turns").
    """
    failed: dict[str, str] = {}
    with collected():
        for n, repeats, to in ((rounds.new, rounds.repeats, "samples"), (rounds.long, rounds.long_repeats, "long")):
            some = [c for c in contenders if c.name not in failed and (to == "samples" or c.kind == "graph")]
            if not repeats or not some:
                continue
            if attempt(partial(_take_turns, some, rounds, device, n, repeats, to)):
                failed["turns"] = "all contenders do not fit side by side: one after the other"
                for contender in some:  # not while the error is handled: its frames hold what did not fit
                    getattr(contender, to).clear()
                    clear(engine, device)
                    alone = partial(_take_turns, [contender], rounds, device, n, repeats, to)
                    if reason := attempt(alone):
                        failed[contender.name] = reason
            clear(engine, device)
    return failed


def _take_turns(
    contenders: Sequence[Contender], rounds: Rounds, device: torch.device, n: int, repeats: int, to: str
) -> None:
    for turn in range(rounds.warmup):
        for contender in contenders:
            if contender.kind == "graph" or turn == 0:  # graphs are captured when caches have stopped growing
                timed(contender, n, device, rounds.at)
    least = 3 if repeats > 3 else 1  # of long runs there are few, and one may take a minute
    for turn in range(repeats):
        if turn >= least and time.monotonic() > rounds.deadline:
            return
        for contender in contenders:
            every = max(1, -(-repeats // contender.most))
            if turn % every == 0:
                getattr(contender, to).append(timed(contender, n, device, rounds.at))


def attempt(work: Callable[[], Any], failures: tuple[type[Exception], ...] = MEMORY) -> str:
    """Why the work failed, "" if it did not. An error that no number of samples explains goes its way."""
    try:
        work()
        return ""
    except failures as error:
        if isinstance(error, torch.AcceleratorError):  # the device answers no more
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:400] if str(error) else ''}"


@contextmanager
def collected() -> Iterator[None]:
    """No garbage collection inside: one in the middle of a run would be counted as the model's time."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Compiling(logging.Handler):
    """Listens to what torch's compiler says of graphs that it gave up; `found()` returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "cudagraph" in text.lower() or "recompile_limit" in text:
            self.said.append(text.splitlines()[0][:300])

    def __enter__(self) -> Compiling:
        from torch._dynamo.utils import counters

        counters.clear()
        logging.getLogger("torch").addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        logging.getLogger("torch").removeHandler(self)

    def found(self) -> dict[str, Any]:
        """{said: [messages], cudagraph_skips, unique_graphs, graph_breaks}."""
        from torch._dynamo.utils import counters

        return {
            "said": sorted(set(self.said))[:8], "cudagraph_skips": int(counters["inductor"]["cudagraph_skips"]),
            "unique_graphs": int(counters["stats"]["unique_graphs"]), "graph_breaks": int(sum(counters["graph_break"].values())),
        }  # fmt: skip
