"""`python -m dyrate_lib bench` (`make bench`): loops and methods in turns on this machine, a table with ratios and floors.

Nothing is recorded. On a CPU by default scenes-small in float32, the reference loop beside stock `generate`, with a picture of
scenes and the shipped predictor; on a GPU LLaVA-1.5-7B's dimensions with random weights in bfloat16, the graph engine beside
both, and DyRate as the replayed course of notebook 04.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ..benchmark import machine_ceilings
from ..datasets import open_dataset
from ..errors import InputError, ResourceError
from ..evaluate import batches
from ..loading import SCENES, load_vlm, quietly
from ..methods import VTW, DyRate, FastV, Method, NoReduction
from ..models import ModelInfo, model_info
from ..plotting import METHODS as STYLES
from .efficiency_cells import ROLES
from .efficiency_clock import engine_for, latency_inputs, make_run
from .efficiency_course import TEXT_TOKENS, Replay, course, kept_by_layer, stretched
from .efficiency_floors import floor_ms
from .efficiency_overhead import kind_of
from .efficiency_rounds import Contender, Rounds, sample
from .efficiency_rows import LOOPS
from .efficiency_share import profile

METHODS = ("original", "fastv-2", "vtw", "dyrate")
STRAIGHT = (1 / 3, 1 / 6)  # share of image tokens at the first and the last step, where no course was recorded


def bench(
    model: str | None = None, batch: int = 1, pictures: int = 1, new: int = 64, repeats: int = 5,
    loops: Sequence[str] | None = None, methods: Sequence[str] = METHODS, device: str | None = None,
) -> tuple[pd.DataFrame, str]:  # fmt: skip
    """Time loops x methods in turns; returns the table and a line on the machine and what was timed.

    Args:
        model: as `load_vlm` takes it; None chooses by machine. pictures: in a prompt (random weights only).
        loops: of graph, reference, stock, static; None is what runs here without compiling.
        methods: keys of Table III; stock runs original and FastV only.

    Raises:
        InputError: counts below 1, fewer than two new tokens, unknown loops, methods or device. ResourceError: no such GPU.
    """
    cuda = _on_gpu(device)
    loops = tuple(loops or (("graph", "reference", "stock") if cuda else ("reference", "stock")))
    _check(batch, pictures, new, repeats, loops, methods, cuda)
    name = subject(model, device)
    with quietly():
        vlm, processor = load_vlm(name, device=device)
    place, info = next(vlm.parameters()).device, model_info(vlm)
    limits = machine_ceilings(place, 5)
    inputs = _inputs(name, vlm, processor, batch, pictures)
    n_image = int((inputs["input_ids"][0] == vlm.config.image_token_id).sum())
    made = {key: _method(key, name, info, n_image, new) for key in methods}
    contenders = [
        Contender(f"{loop} {key}", loop, key, make_run(loop, vlm, inputs, made[key]), repeats)
        for loop in loops
        for key in methods
        if loop in ("graph", "reference") or key == "original" or (loop == "stock" and key.startswith("fastv"))
    ]
    engine = engine_for(vlm) if "graph" in loops else None
    warm = 4 if cuda and batch * (n_image + TEXT_TOKENS) <= 8192 else 2 if cuda else 1
    failed = sample(contenders, Rounds(new, repeats, new, 0, warm, (new,), math.inf), place, engine)
    rows = [
        _row(one, info, limits, batch, new, n_image, made[one.method], inputs, vlm) for one in contenders if one.samples
    ]
    table = pd.DataFrame(rows)
    _ratios(table)
    size = "bfloat16" if next(vlm.parameters()).dtype == torch.bfloat16 else "float32"
    about = (
        f"{name} in {size} on {limits['device']} ({torch.get_num_threads()} threads): {batch} prompt(s), {n_image} image tokens, "
        f"{new} new tokens, medians of {repeats}; copies {limits['copy_gb_s']:.0f} GB/s, products "
        f"{limits['matmul_tflops'][size]:.3g} TFLOP/s{_said(made.get('dyrate'), name)}"
        + "".join(f"\n{what}: {why}" for what, why in failed.items())
    )
    return table.drop(columns=["loop key", "method key"]), about


def _said(method: Method | None, name: str) -> str:
    """What course DyRate replays, where it does."""
    if not isinstance(method, Replay):
        return ""
    source = "notebook 04's course" if _recorded(name) else "a straight line, as no course is recorded here"
    return f"; DyRate reads {method.kept[0]} to {method.kept[-1]} image tokens ({source})"


def _check(
    batch: int, pictures: int, new: int, repeats: int, loops: Sequence[str], methods: Sequence[str], cuda: bool
) -> None:
    if min(batch, pictures, repeats) < 1 or new < 2:
        raise InputError("bench needs a batch, pictures and repeats of at least 1 and at least 2 new tokens")
    wrong = [loop for loop in loops if loop not in LOOPS] + [key for key in methods if key not in (*METHODS, "fastv-3")]
    if wrong:
        raise InputError(
            f"no loop or method {wrong[0]!r}: there are {', '.join(LOOPS)} and {', '.join((*METHODS, 'fastv-3'))}"
        )
    if "original" not in methods:
        raise InputError("bench needs the method 'original', which the ratios are to")
    if cuda and not torch.cuda.is_available():
        raise ResourceError("a GPU was asked for and there is none: use --device cpu")


def _method(key: str, name: str, info: ModelInfo, n_image: int, new: int) -> Method:
    """The method by its key; DyRate by the shipped predictor on scenes models, elsewhere as a replayed course."""
    if key == "dyrate" and Path(name).name in SCENES:
        from .. import paths

        return DyRate(str(paths.predictors() / f"{Path(name).name}_t0.333_s0.safetensors"))
    if key == "dyrate":
        return Replay(min(2, info.n_layers - 1), stretched(_recorded(name) or _straight(new), 576, n_image))
    half = info.n_layers // 2
    known = {"original": NoReduction(), "fastv-2": FastV(2, 0.5), "fastv-3": FastV(3, 0.5), "vtw": VTW(half)}
    return known[key]


def _straight(new: int) -> tuple[int, ...]:
    """A made-up course of 576 tokens."""
    return tuple(int(576 * share) for share in np.linspace(*STRAIGHT, new))


def _recorded(name: str) -> tuple[int, ...] | None:
    """Notebook 04's course of the model in the same role, of 576 tokens; None where it is not recorded."""
    from .context import open_study

    role = ROLES["13b" if "13b" in name else "7b"]
    try:
        study = open_study("04_efficiency", scale="full", records="committed", progress=False)
        study.store.frozen = True
        return course(study, role)
    except ResourceError:
        return None


def _row(
    one: Contender,
    info: ModelInfo,
    limits: Any,
    batch: int,
    new: int,
    n_image: int,
    method: Method,
    inputs: Any,
    vlm: Any,
) -> dict[str, Any]:
    """Medians of a contender, beside floors for what the method really read."""
    from ..generation import generate

    whole = np.array([s["wall_ms"] for s in one.samples])
    first, last = (np.array([s["ms"][str(n)] for s in one.samples]) for n in (1, new))
    read = method if one.kind != "static" else NoReduction()
    engine = "reference" if one.kind in ("stock", "static") else None
    if read.name == "none":
        table = kept_by_layer(info, 1, (n_image,), new, n_image)
    else:
        kept = generate(vlm, inputs, read, new, eos_token_id=[], engine=engine).trace.kept_by_layer
        table = kept.float().mean(0).round().long().cpu().numpy()
    size = next(vlm.parameters()).element_size()
    text = inputs["input_ids"].shape[1] - n_image
    floor = floor_ms(info, table, n_image, batch, limits, size, text)
    low, high = np.percentile(whole, [25, 75])
    return {
        "loop key": one.kind, "method key": one.method, "loop": LOOPS[one.kind], "method": STYLES[one.method][0],
        "prefill ms": np.median(first), "ms a token": np.median(last - first) / (new - 1), "end to end ms": np.median(whole),
        "middle half": f"{low:.0f} to {high:.0f}",
        "prefill x floor": np.median(first) / max(floor["prefill"], floor["prefill_bytes"]),
        "decode x floor": np.median(last - first) / (new - 1) / floor["decode"],
    }  # fmt: skip


def _ratios(table: pd.DataFrame) -> None:
    """Columns "x faster than unpruned" (same loop) and "x faster than stock" (unpruned), where those were timed."""
    whole = table.set_index(["loop key", "method key"])["end to end ms"]
    stock = whole.get(("stock", "original"), np.nan)
    base = [whole.get((loop, "original"), np.nan) for loop in table["loop key"]]
    table["x faster than unpruned"] = np.array(base) / table["end to end ms"]
    table["x faster than stock"] = stock / table["end to end ms"]


def subject(model: str | None = None, device: str | None = None) -> str:
    """The model that is timed: the one named, else LLaVA-1.5-7B's dimensions on a GPU and scenes-small elsewhere."""
    return model or ("random:llava-1.5-7b" if _on_gpu(device) else "scenes-small")


def _on_gpu(device: str | None) -> bool:
    try:
        return torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    except RuntimeError as error:
        raise InputError(f"there is no device {device!r}: cpu or cuda") from error


def _inputs(name: str, vlm: Any, processor: Any, batch: int, pictures: int) -> Any:
    if Path(name).name in SCENES:
        return next(iter(batches(vlm, processor, open_dataset("scenes:narrative:test", batch), None, batch)))[1]
    return latency_inputs(vlm, processor, batch, pictures)


def bench_profile(
    model: str | None = None, new: int = 32, batch: int = 1, pictures: int = 1, device: str | None = None
) -> pd.DataFrame:
    """Where the reference loop's time goes under FastV, by kind of operator: % of a prompt's pass and of decode steps.

    model, batch, pictures, device: what `bench` times.
    """
    name = subject(model, device)
    with quietly():
        vlm, processor = load_vlm(name, device=device)
    inputs, place = _inputs(name, vlm, processor, batch, pictures), next(vlm.parameters()).device
    run, parts = make_run("reference", vlm, inputs, FastV(2, 0.5)), {}
    for part, n, first in (("prompt's pass", 1, None), ("decode steps", new, 8)):
        found = profile(run, place, n, first, top=10**6)
        spent: dict[str, float] = {}
        for name, _, us in found["kernels"]:
            spent[kind_of(name)] = spent.get(kind_of(name), 0.0) + us
        parts[f"{part}, %"] = {kind: 100 * us / found["total_us"] for kind, us in spent.items()}
    return (
        pd.DataFrame(parts)
        .fillna(0.0)
        .sort_values("decode steps, %", ascending=False)
        .rename_axis("operators")
        .reset_index()
    )
