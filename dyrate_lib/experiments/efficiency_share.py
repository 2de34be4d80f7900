"""Notebook 04: what predictor and bookkeeping take of a decode step, and which kernels a step's time goes to.

Four loops take turns: DyRate's replayed course with its predictor, the same without; one count throughout, with the predictor
and its bookkeeping and without any. The features are by-products of the attention kernel in all of them, so what they cost is
taken from the profile: the feature layer's attention against that of the other layers that read every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..methods import Method
from ..methods.base import PrefillView
from .context import Study
from .efficiency_cells import LENGTHS, Cell, courses, info_of, subjects, timed_model, warmup
from .efficiency_clock import Clock, engine_for, latency_inputs, make_run
from .efficiency_course import LAYER, Replay
from .efficiency_measure import packed
from .efficiency_rounds import Contender, Rounds, sample

FIRST, PROFILED = 8, 8  # steps before the profile begins, and in it: graphs have been captured by then
TOP = 16


@dataclass
class Fixed(Method):
    """The `count` most important image tokens from P on, and no look at anything later: the barest loop that prunes."""

    layer: int = LAYER
    count: int = 0
    name: ClassVar[str] = "fixed"

    def prefill(self, view: PrefillView) -> Tensor:
        return view.n_image.clamp(max=self.count)


def share(study: Study, cell: Cell, deadline: float, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """payload {contenders: {name: {samples}}, failed, profile: {decode, prefill}, attention_us, mean_kept}."""
    subject = next(s for s in subjects(study) if s.key == cell.model)
    model, processor = timed_model(study, subject)
    device, info = next(model.parameters()).device, info_of(study, cell.model)
    kept, lengths = courses(study, cell), LENGTHS[study.scale.name]
    count = round(float(np.mean(kept[: lengths[1]])))
    inputs, engine = latency_inputs(model, processor, cell.batch), engine_for(model)
    methods: dict[str, Method] = {
        "course with predictor": Replay(LAYER, kept), "course": Replay(LAYER, kept, predict=False),
        "one count with predictor": Replay(LAYER, (count,)), "one count": Fixed(LAYER, count),
    }  # fmt: skip
    contenders = [Contender(name, "graph", name, make_run("graph", model, inputs, m)) for name, m in methods.items()]
    repeats = 20 if study.scale.name == "full" else 2
    warm = warmup(cell, info.n_image_tokens) if engine.capture else 1
    failed = sample(contenders, Rounds(lengths[1], repeats, lengths[1], 0, warm, lengths, deadline), device, engine)
    out: dict[str, Any] = {
        "contenders": {c.name: {"samples": packed(c.samples)} for c in contenders if c.samples}, "failed": failed,
        "mean_kept": count,
    }  # fmt: skip
    run = contenders[0].run
    out["profile"] = {
        "decode": profile(run, device, lengths[1], FIRST if lengths[1] > 2 * FIRST else 2),
        "prefill": profile(run, device, 1, None),
    }
    out["attention_us"] = by_layer(out["profile"]["decode"].pop("attention"), info.n_layers)
    out["profile"]["prefill"].pop("attention")
    engine.mark = lambda what: None
    return out


def profile(run: Callable, device: torch.device, n: int, first: int | None, top: int = TOP) -> dict[str, Any]:
    """Kernels (on a CPU operators) by time of `PROFILED` decode steps from step `first` on, or (None) of a prompt's pass.

    Returns {kernels: [[name, calls, us]], total_us, steps, attention: [us of each attention kernel in order]}.
    """
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    steps = min(PROFILED, max(1, n - 1 - (first or 0)))
    clock = Clock(device, ())
    for _ in range(3 if cuda else 1):
        clock.begin()
        run(n, clock)
        clock.end()
    found = torch.profiler.profile(activities=activities)
    seen = {"passes": 0, "on": False}

    def begin() -> None:
        _wait(device)
        found.start()
        seen["on"] = True

    def end() -> None:
        _wait(device)
        found.stop()
        seen["on"] = False

    class Watch(Clock):
        def token(self) -> None:
            seen["passes"] += 1
            if first is not None and seen["passes"] == first:
                begin()
            elif first is not None and seen["passes"] == first + steps:
                end()

    watch = Watch(device, ())
    watch.begin()
    if first is None:
        begin()
    run(n, watch)
    if seen["on"]:
        end()
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    device_type = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU  # an operator repeats its kernels
    events = [e for e in found.key_averages() if e.device_type == device_type]
    rows = [(e.key, int(e.count), float(getattr(e, spent))) for e in events]
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    if not rows:
        raise InputError("the profiler saw nothing")
    ordered = sorted(
        (e for e in found.events() if cuda and e.name.startswith("_attend")), key=lambda e: e.time_range.start
    )
    return {
        "kernels": [[name[:80], n, round(us, 2)] for at, (name, n, us) in enumerate(rows) if at < top or name.startswith("_")],
        "total_us": round(sum(row[2] for row in rows), 2), "steps": steps,
        "attention": [float(e.self_device_time_total or e.time_range.elapsed_us()) for e in ordered],
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_layer(durations: list[float], n_layers: int) -> list[float]:
    """Mean microseconds of each layer's attention kernel, from those of whole steps in order; [] where they do not divide."""
    if not durations or len(durations) % n_layers:
        return []
    return [round(float(us), 3) for us in np.asarray(durations).reshape(-1, n_layers).mean(0)]
