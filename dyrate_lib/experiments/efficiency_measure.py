"""Notebook 04: how a cell is measured: contenders alone for memory, then in turns for time; and DyRate over budgets."""

from __future__ import annotations

import re
import time
from typing import Any

import torch

from ..engine import Engine
from ..errors import InputError
from ..models import ModelInfo
from .context import Study
from .efficiency_cells import (
    BUDGETS,
    LENGTHS,
    METHODS,
    REPEATS,
    ROLES,
    SLOW_REPEATS,
    Cell,
    contender_names,
    courses,
    info_of,
    limits_here,
    subjects,
    timed_model,
    warmup,
)
from .efficiency_clock import Clock, engine_for, latency_inputs, make_run
from .efficiency_course import kept_by_layer, least_ratio, reads_of, scaled_course, timed_method
from .efficiency_rounds import MEMORY, Compiling, Contender, Rounds, attempt, clear, kv_held, sample


def measure(study: Study, cell: Cell, deadline: float, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """payload of a "time" cell: {contenders: {name: {samples, long, ..}}, failed, reads, ceilings, compiling, course}."""
    subject = next(s for s in subjects(study) if s.key == cell.model)
    model, processor = timed_model(study, subject)
    device, info = next(model.parameters()).device, info_of(study, cell.model)
    n_image, kept = info.n_image_tokens * cell.pictures, courses(study, cell)
    lengths = LENGTHS[study.scale.name]
    limits = limits_here(study, device)
    inputs = latency_inputs(model, processor, cell.batch, cell.pictures)
    reads = {name: reads_of(name, info.n_layers, n_image, kept, cell.model in ROLES) for name in METHODS}
    short, long = REPEATS[study.scale.name][cell.pictures]
    contenders = []
    for kind, name in contender_names(cell):
        if kind not in skip:
            run = make_run(kind, model, inputs, timed_method(name, *reads[name]))
            most = (
                short
                if kind in ("graph", "static") or (kind, name) == ("stock", "original")
                else min(short, SLOW_REPEATS)
            )
            contenders.append(Contender(f"{kind} {name}", kind, name, run, most))
    engine = engine_for(model)
    warm = warmup(cell, n_image) if engine.capture else 0  # nothing to capture, and each has run alone before
    rounds = Rounds(lengths[1], short, lengths[2], 0 if "long" in skip else long, warm, lengths, deadline)
    with Compiling() as compiling:
        alone = {c.name: run_alone(c, rounds, device, engine, reads[c.method], info, n_image) for c in contenders}
        ready = [c for c in contenders if "failed" not in alone[c.name]]
        failed = {name: found.pop("failed") for name, found in alone.items() if "failed" in found}
        failed |= sample(ready, rounds, device, engine)
        compiled = compiling.found()
    clear(engine, device)
    engine.mark = lambda what: None
    if any(c.kind == "static" for c in contenders):
        torch._dynamo.reset()
        vars(model).pop("_previous_max_cache_length", None)
    return {
        "contenders": {c.name: {**alone[c.name], "samples": packed(c.samples), "long": packed(c.long)} for c in ready},
        "failed": failed, "would_fit": {name: would_fit(text) for name, text in failed.items()},
        "reads": {name: {"layer": layer, "kept": list(counts)} for name, (layer, counts) in reads.items()},
        "ceilings": limits, "compiling": compiled, "skipped": list(skip), "captured": engine.capture,
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()), "threads": torch.get_num_threads(),
    }  # fmt: skip


def run_alone(
    contender: Contender, rounds: Rounds, device: torch.device, engine: Engine, reads: tuple[int, tuple[int, ...]],
    info: ModelInfo, n_image: int,
) -> dict[str, Any]:  # fmt: skip
    """Memory of a contender that has the device for itself, and whether it reads what it should; {failed: why} if it cannot."""
    clear(engine, device)
    out: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        out["bytes_before"] = torch.cuda.memory_allocated(device)
    runs = {"graph": max(1, rounds.warmup - 1), "static": 3}.get(contender.kind, 1)

    def work() -> None:
        for _ in range(runs):
            clock = Clock(device, ())
            clock.begin()
            found = contender.run(rounds.new, clock)
            told = clock.end()["tokens"]
        if told != rounds.new:
            raise InputError(f"{contender.name} told of {told} tokens where {rounds.new} were made")
        if contender.kind in ("graph", "reference"):
            wanted = kept_by_layer(info, *reads, steps=rounds.new, n_image=n_image)
            got = found.trace.kept_by_layer.cpu().numpy()
            if not (got == wanted[None]).all():
                raise InputError(f"{contender.name} does not read what it was told")
        if contender.kind == "graph":
            out["kv_held_bytes"] = kv_held(engine)

    start = time.perf_counter()
    # what is not ours may fail in ways of its own, which the record then tells
    reason = attempt(work, (Exception,) if contender.kind in ("stock", "static") else MEMORY)
    out["first_seconds"] = round(time.perf_counter() - start, 2)
    if device.type == "cuda" and not reason:
        out["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    clear(engine, device)
    return out | ({"failed": reason} if reason else {})


def packed(samples: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Samples as columns: wall_ms, queued_ms, intake_ms, and ms_N for the first N tokens; numbers to the microsecond."""
    out: dict[str, list[float]] = {}
    for one in samples:
        row = {"wall_ms": one["wall_ms"], **{f"{k}_ms": v for k, v in one["host_ms"].items()}}
        row |= {f"ms_{n}": v for n, v in one["ms"].items()}
        for name, value in row.items():
            out.setdefault(name, []).append(round(float(value), 4))
    return out


def would_fit(reason: str) -> int | None:
    """How many samples would fit, where the refusal says so."""
    found = re.search(r"a batch of (\d+) would fit", reason)
    return int(found[1]) if found else 0 if "not even one" in reason else None


def sweep(study: Study, cell: Cell, deadline: float, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """payload of a "sweep" cell: DyRate's course scaled to budgets in the paper's convention, in turns with the unpruned loop."""
    subject = next(s for s in subjects(study) if s.key == cell.model)
    model, processor = timed_model(study, subject)
    device, info = next(model.parameters()).device, info_of(study, cell.model)
    n_image, kept = info.n_image_tokens, courses(study, cell)
    inputs, least = latency_inputs(model, processor, cell.batch), least_ratio(info)
    reads = {"original": reads_of("original", info.n_layers, n_image, kept, True)}
    for budget in BUDGETS[study.scale.name]:
        if budget >= least:
            layer, _ = reads_of("dyrate", info.n_layers, n_image, kept, True)
            reads[f"{budget:g}"] = (layer, scaled_course(info, kept, budget))
    engine, lengths = engine_for(model), LENGTHS[study.scale.name]
    contenders = []
    for name, (layer, counts) in reads.items():
        method = timed_method("original" if name == "original" else "dyrate", layer, counts)
        contenders.append(Contender(f"graph {name}", "graph", name, make_run("graph", model, inputs, method)))
    repeats = 6 if study.scale.name == "full" else 2
    warm = warmup(cell, n_image) if engine.capture else 1
    rounds = Rounds(lengths[1], repeats, lengths[2], 0, warm, lengths, deadline)
    failed = sample(contenders, rounds, device, engine)
    engine.mark = lambda what: None
    return {
        "contenders": {c.name: {"samples": packed(c.samples)} for c in contenders if c.samples}, "failed": failed,
        "reads": {name: {"layer": layer, "kept": list(counts)} for name, (layer, counts) in reads.items()},
        "least": least, "ceilings": limits_here(study, device),
    }  # fmt: skip
