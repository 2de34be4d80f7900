"""Which kernels the packed pass runs on: tried before training begins, timed where there is a choice, never fatal."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import torch

from ..errors import InputError
from .packed_forward import ATTENTIONS, PackedForward
from .training_plan import Say

REPEATS = 4  # of a trial's work, timed


def fast_forward(
    build: Callable[[str], PackedForward],
    attention: str,
    compile: bool,
    work: Callable[[PackedForward], None],
    say: Say,
) -> tuple[PackedForward, bool]:
    """The first pass that works, the fastest one where `attention` is "auto".

    Args:
        build: makes a pass that computes attention in the way named, one of `ATTENTIONS`.
        attention: one of them, or "auto": compiled, all of them are tried; not compiled, it is "masked".
        compile: whether to compile the pass.
        work: does with a pass everything that training will do with it, backward included.
        say: hears what failed and why, and what was chosen.

    Returns:
        The pass, and whether it is compiled. A way that fails gives way to "masked", compiling to eager mode.

    Raises:
        InputError: for an unknown kind of attention.
    """
    if attention not in (*ATTENTIONS, "auto"):
        raise InputError(f"unknown attention {attention!r}: choose one of {', '.join(ATTENTIONS)}, auto")
    if not compile:
        return build("masked" if attention == "auto" else attention), False
    wanted = ATTENTIONS if attention == "auto" else tuple(dict.fromkeys((attention, "masked")))
    with suppress(AttributeError):  # two blocks x their last layer x with and without gradients, for each way
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 16 * len(wanted))
    timed: dict[str, tuple[float, PackedForward]] = {}
    for kind in wanted:
        started = time.monotonic()
        try:
            forward = build(kind)
            forward.compile()
            work(forward)
            say(f"compiled both blocks in {time.monotonic() - started:.1f} s ({kind} attention)")
            timed[kind] = (_seconds(work, forward) if attention == "auto" else 0.0), forward
        except Exception as error:  # whatever the compiler's reason: training goes on without it, and says so
            timed.pop(kind, None)
            say(f"{kind} attention could not be compiled; the reason: {type(error).__name__}: {error}"[:600])
        if timed and attention != "auto":
            break
    if not timed:
        say("not compiled, going on in eager mode with masked attention")
        return build("masked"), False
    kind = min(timed, key=lambda k: timed[k][0])
    if attention == "auto":
        times = ", ".join(f"{k} {1000 * seconds:.0f} ms" for k, (seconds, _) in timed.items())
        say(f"forward and backward passes take {times}: {kind} attention it is")
    return timed[kind][1], True


def _seconds(work: Callable[[PackedForward], None], forward: PackedForward) -> float:
    """The least time of several, for another process on the same device may get in between."""
    found = []
    for _ in range(REPEATS):
        started = time.monotonic()
        work(forward)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.monotonic() - started)
    return min(found)
