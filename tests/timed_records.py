"""Records of notebook 04's timings as a GPU would leave them, made up: each time is a known multiple of its floor."""

from __future__ import annotations

import copy

import numpy as np

from dyrate_lib.experiments import efficiency_cells as cells
from dyrate_lib.experiments.efficiency_course import kept_by_layer, least_ratio, reads_of, scaled_course
from dyrate_lib.experiments.efficiency_floors import floor_ms
from dyrate_lib.experiments.efficiency_measure import would_fit

LIMITS = {"device": "a GPU", "copy_gb_s": 4000.0, "matmul_tflops": {"bfloat16": 700.0, "float32": 50.0}, "threads": 1}
PREFILL, TOKEN = 1.4, 1.2  # times the floor, on the graph engine
LOOPS = {"graph": 1.0, "reference": 6.0, "stock": 7.0, "static": 1.5}
COURSES = {"7b": tuple(range(190, 80, -5)), "13b": tuple(range(180, 150, -5))}
TOO_LARGE = "ResourceError: A batch of 64 needs 170.0 GB: a batch of 40 would fit."


def columns(info, reads, n_image, batch, new, lengths, times=1.0, n=20):
    """Samples of a run of `new` tokens, spread by 1 % around the multiples above, wall clocks 0.1 ms later."""
    layer, kept = reads
    tables = {t: kept_by_layer(info, layer, kept, max(t, 2), n_image) for t in (1, *lengths)}
    until = {t: floor_ms(info, table, n_image, batch, LIMITS) for t, table in tables.items()}
    spread = np.linspace(0.99, 1.01, n)
    first = times * PREFILL * max(until[1]["prefill"], until[1]["prefill_bytes"]) * spread
    out = {f"ms_{t}": first + (t - 1) * times * TOKEN * until[t]["decode"] * spread for t in until if t <= new}
    return {**out, "wall_ms": out[f"ms_{new}"] + 0.1, "intake_ms": np.full(n, 0.3), "queued_ms": first}


def time_payload(cell, info, lengths):
    n_image, kept = 576 * cell.pictures, tuple(k * cell.pictures for k in COURSES[cell.model])
    reads = {name: reads_of(name, info.n_layers, n_image, kept, True) for name in cells.METHODS}
    contenders, failed = {}, {}
    for loop, method in cells.contender_names(cell):
        name, args = f"{loop} {method}", (info, reads[method], n_image, cell.batch)
        if cell == cells.Cell("13b", 64, 5) and method == "original":
            failed[name] = TOO_LARGE
            continue
        contenders[name] = {
            "first_seconds": 2.0, "peak_bytes": 20e9, "kv_held_bytes": 1e8 * sum(reads[method][1][:1]),
            "samples": columns(*args, lengths[1], lengths, LOOPS[loop]),
            "long": columns(*args, lengths[2], lengths) if loop == "graph" else {},
        }  # fmt: skip
    return {
        "contenders": contenders, "failed": failed, "would_fit": {name: would_fit(why) for name, why in failed.items()},
        "reads": {name: {"layer": layer, "kept": list(kept)} for name, (layer, kept) in reads.items()}, "ceilings": LIMITS,
        "compiling": {"said": [], "cudagraph_skips": 0, "unique_graphs": 1, "graph_breaks": 0}, "skipped": [], "captured": True,
    }  # fmt: skip


def sweep_payload(cell, info, lengths):
    kept = COURSES[cell.model]
    reads = {"original": reads_of("original", info.n_layers, 576, kept, True)}
    for budget in cells.BUDGETS["full"]:
        if budget >= least_ratio(info):
            reads[f"{budget:g}"] = (2, scaled_course(info, kept, budget))
    return {
        "contenders": {
            f"graph {name}": {"samples": columns(info, read, 576, cell.batch, lengths[1], lengths, n=6)}
            for name, read in reads.items()
        },
        "failed": {}, "reads": {name: {"layer": layer, "kept": list(kept)} for name, (layer, kept) in reads.items()},
        "least": least_ratio(info), "ceilings": LIMITS,
    }  # fmt: skip


def share_payload(cell, info, lengths):
    """A step of 4 ms; the predictor takes 0.02 ms of it, predictor and lengths 0.03 ms, the features another 2 us."""
    steps = {"course": 3.98, "course with predictor": 4.0, "one count": 3.97, "one count with predictor": 4.0}
    new, spread = lengths[1], np.linspace(0.99, 1.01, 20)
    kernels = [["_one", 8 * 160, 24000.0], ["_attend", 8 * 32, 3000.0], ["nvjet_hsh", 8, 2000.0], ["_advance", 8, 80.0]]
    return {
        "contenders": {
            name: {"samples": {"ms_1": 10 * spread, **dict.fromkeys((f"ms_{new}", "wall_ms"), (10 + (new - 1) * ms) * spread)}}
            for name, ms in steps.items()
        },
        "failed": {}, "mean_kept": 120, "attention_us": [10.0, 12.0, *[5.0] * (info.n_layers - 2)],
        "profile": {part: {"kernels": kernels, "total_us": 32000.0, "steps": 8} for part in ("decode", "prefill")},
    }  # fmt: skip


def agreement_payload():
    pairs = {"graph, reference: original": [-1, 7, -1, 30], "stock SDPA, stock eager: original": [-1, 5, 9, -1]}
    return {"real": pairs, "random": {}, "n": 4, "tokens": 64}


_made: dict = {}


def fill(study):
    """Put every cell's made-up record into a study of full scale."""
    if not _made:
        _made.update(_records(study))
    found = copy.deepcopy(_made)
    vars(study).setdefault("_remembered", {})["latency",] = found
    return found


def _records(study):
    found, lengths = {}, cells.LENGTHS["full"]
    for cell in cells.cells(study):
        info = cells.info_of(study, cell.model)
        config = cells.config_of(study, cell) | {"where": "gpu"}
        makers = {"time": time_payload, "sweep": sweep_payload, "share": share_payload}
        payload = makers[cell.kind](cell, info, lengths) if cell.kind in makers else agreement_payload()
        made = {"device": "a GPU", "seconds": 1.0, "date": "2026-01-01"}
        found[cell] = {"config": config, "payload": payload, "provenance": made}
    return found
