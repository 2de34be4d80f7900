"""How long the full study takes on original weights: replies and steps, rates measured or estimated, hours on several GPUs.

`python -m dyrate_lib plan --model 7b --gpus 8`; the README's sheet is this table (`plan --write README.md`). Counts come from the
scales, from the tables' own lists of methods and from the committed records of the same cells on scenes. A rate is measured where
notebook 04 has timed that size in that loop at batch 16; elsewhere it is estimated, and says by what.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import marks
from .accounting import flop_parts, flops, kv_bytes
from .dimensions import llava_dimensions
from .errors import InputError, ResourceError
from .memory import CONTEXT, FLOAT, TEXT_TOKENS, parameter_count, training_memory
from .models import ModelInfo

if TYPE_CHECKING:
    import pandas as pd

SIZES = ("7b", "13b")
LOOPS = ("reference", "graph")
BATCH = 16  # of evaluation: what notebook 04 timed beside batch 1, and what a card of 24 GB holds of the 7B
CAPTION, ANSWER = 64, 16  # new tokens that a caption and a short answer are counted at: limits, most replies end sooner
# passes over the attention maps in float32 (`teacher_forcing._MaskedAttention`): reads and writes, forward and backward
MAPS_FORWARD, MAPS_BACKWARD = 10, 12
MARK = "plan"


@dataclass(frozen=True)
class Stage:
    """One row: what is done, how often, seconds for all of it on one GPU, in how many parts it can be spread (None: any), bytes
    on a card, and where the rate is from (`measured` or estimated)."""

    name: str
    count: int
    unit: str
    seconds: float
    parts: int | None
    memory: int
    measured: bool
    source: str

    def hours(self, gpus: int) -> float:
        """On so many GPUs: parts are not divided, and nothing is lost to loading or to waiting."""
        share = 1 / gpus if self.parts is None else math.ceil(self.parts / gpus) / self.parts
        return self.seconds * share / 3600


@dataclass(frozen=True)
class Rate:
    """Seconds a reply at batch 16 by (method "original" or "dyrate", new tokens), of one size in one loop; peak bytes; source."""

    seconds: dict[tuple[str, int], float]
    memory: int
    measured: bool
    source: str


# ----------------------------------------------------------------------------------------------------------------- rates


@functools.cache
def _timed(size: str = "7b") -> tuple[dict[str, Any], str]:
    """Notebook 04's record of a size at batch 16, and what it is called."""
    from .experiments.context import open_study
    from .experiments.efficiency_cells import Cell, record_of

    study = open_study("04_efficiency", scale="full", records="committed", progress=False)
    study.store.frozen = True  # timings are read here, never made
    cell = Cell(size, BATCH)
    record = record_of(study, cell)
    if record is None:
        raise ResourceError(
            f"there is no record of {cell.name()} in data/results/latency, which the plan's rates are from: python -m dyrate_lib "
            "run 04_efficiency on a GPU makes it"
        )
    device = record["provenance"]["device"].removeprefix("NVIDIA ")
    return record, f"`latency` {cell.name()}, {device}"


def reply_rate(size: str, loop: str = "reference") -> Rate:
    """Seconds a reply of LLaVA-1.5 of a size ("7b" or "13b") in a loop ("reference" or "graph").

    Measured where the loop was timed at that size; else 7B's times the ratio of their FLOPs, and of memory the weights and 7B's
    rest times the caches' ratio: notebook 04 times 13B in the graph engine alone.

    Raises:
        InputError: another size or loop. ResourceError: the timings are not among the committed records.
    """
    if size not in SIZES or loop not in LOOPS:
        raise InputError(f"there are rates for {' and '.join(SIZES)} in the loops {' and '.join(LOOPS)}, not {size!r}, {loop!r}")
    record, source = _timed(size)
    if size != "7b" and f"{loop} original" not in record["payload"]["contenders"]:
        return _estimated(size, reply_rate("7b", loop))
    seconds, peak = {}, 0
    for method in ("original", "dyrate"):
        found = record["payload"]["contenders"][f"{loop} {method}"]
        peak = max(peak, found["peak_bytes"])
        for new, key in ((CAPTION, "wall_ms"), (ANSWER, f"ms_{ANSWER}")):
            seconds[method, new] = float(np.median(found["samples"][key])) / 1000 / BATCH
    return Rate(seconds, peak, True, source)


def _estimated(size: str, known: Rate) -> Rate:
    small, large = llava_dimensions("7b"), llava_dimensions(size)
    seconds = {
        (method, new): each * _reply_flops(large, new) / _reply_flops(small, new) for (method, new), each in known.seconds.items()
    }
    rest = (known.memory - _timed()[0]["payload"]["weights_bytes"]) * kv_bytes(large, 1) / kv_bytes(small, 1)
    return Rate(seconds, round(2 * parameter_count(large) + rest), False, f"{known.source}, by the ratio of FLOPs")


def size_ratio() -> tuple[float, float]:
    """What a reply of 64 tokens costs by 13B over 7B: FLOPs, by which rates are estimated, and time in the graph engine."""
    large, small = (_reply_flops(llava_dimensions(size), CAPTION) for size in ("13b", "7b"))
    slower, faster = (reply_rate(size, "graph").seconds["original", CAPTION] for size in ("13b", "7b"))
    return large / small, slower / faster


def _reply_flops(info: ModelInfo, new: int) -> float:
    kept = np.full((new, info.n_layers), info.n_image_tokens)
    return float(flops(info, info.n_image_tokens + TEXT_TOKENS, info.n_image_tokens, kept))


def training_step_flops(info: ModelInfo, batch: int, response: int = CAPTION, layer: int = 2) -> tuple[float, float]:
    """FLOPs of one step of `train_predictor`: (matrix products in the weights' type, attention's in float32).

    Layers from P = `layer` on run forward, once more in the backward pass (checkpointed, as on a small card), and backward with
    respect to their inputs alone, for the weights are frozen; attention's backward pass has four products where forward has two.
    """
    rows, n_image = info.n_image_tokens + TEXT_TOKENS + response, info.n_image_tokens
    parts = flop_parts(info, rows, n_image, np.full((1, info.n_layers), n_image))
    attention = 4.0 * info.n_heads * info.head_dim * rows**2  # of a layer
    matrices = parts["prefill"] - info.n_layers * attention
    later = info.n_layers - layer
    head = 2 * parts["head"] * response  # forward and backward, of the response's rows
    products = matrices * (1 + 2 * later / info.n_layers) + layer * attention + parts["vision"] + parts["projector"] + head
    return batch * products, batch * later * attention * 4


def training_seconds(info: ModelInfo, batch: int, limits: dict[str, Any], layer: int = 2) -> float:
    """Seconds of a training step at a machine's measured ceilings (`benchmark.machine_ceilings`): a lower bound.

    Products at the matrix rate of their type, and passes over the float32 attention maps at the rate of a copy.
    """
    products, exact = training_step_flops(info, batch, layer=layer)
    rows = info.n_image_tokens + TEXT_TOKENS + CAPTION
    maps = batch * info.n_heads * rows**2 * FLOAT * (info.n_layers - layer) * (2 * MAPS_FORWARD + MAPS_BACKWARD)
    rate = limits["matmul_tflops"]
    return products / (rate["bfloat16"] * 1e12) + exact / (rate["float32"] * 1e12) + maps / (limits["copy_gb_s"] * 1e9)


# ---------------------------------------------------------------------------------------------------------------- counts


def evaluations() -> list[tuple[str, bool]]:
    """(name, whether DyRate) of all evaluations by lmms-eval: the paper's rows, rivals at one budget, DyRate's other budgets."""
    from .experiments.equal_budget import RIVALS
    from .experiments.scales import SCALES
    from .experiments.training_runs import BUDGET

    scale = SCALES["full"]
    rows = [(name, False) for name in ("original", "FastV P=3", "FastV P=2", "VTW")]
    rows += [(f"DyRate {BUDGET:g}, seed {seed}", True) for seed in scale.predictor_seeds]
    rows += [(f"{rival.label} at {scale.equal_level:g}", False) for rival in RIVALS]
    return rows + [(f"DyRate {target:g}", True) for target in scale.targets if target != BUDGET]


def study_replies(size: str) -> tuple[int, int]:
    """(all, DyRate's) replies of the study's cells for the model in the role of that size, sets that only scenes have left out.

    Counted in the committed records of captions: `make reproduce` computes the same cells on COCO, nocaps and Flickr30k.

    Raises:
        ResourceError: there are no such records.
    """
    from .loading import SCENES

    model = SCENES[SIZES.index(size)]
    if model not in _counted():
        raise ResourceError(f"data/results/captions holds no replies of {model}, which the plan counts: a checkout has them")
    return _counted()[model]


@functools.cache
def _counted() -> dict[str, tuple[int, int]]:
    """Replies of the committed records by model: all, and DyRate's."""
    from .experiments.context import ROLE_SPECS
    from .store import Store

    sets = {ROLE_SPECS[role] for role in ("coco", "nocaps", "flickr30k")}
    found: dict[str, tuple[int, int]] = {}
    for record in Store.committed().records("captions"):
        config = record["config"]
        if config["data"]["name"] in sets:
            every, dyrate = found.get(config["model"], (0, 0))
            n = len(record["payload"]["ids"])
            found[config["model"]] = every + n, dyrate + n * (config["method"]["method"] == "dyrate")
    return found


def stages(size: str = "7b", loop: str = "reference") -> list[Stage]:
    """All stages of the full study for one size; `loop` is that of lmms-eval, the study has its own (`evaluate.ENGINE`).

    Raises what `reply_rate` and `study_replies` raise.
    """
    from .evaluate import ENGINE
    from .experiments import ablations
    from .experiments.scales import SCALES
    from .lmms.benchmarks import BENCHMARKS

    scale, info = SCALES["full"], llava_dimensions(size)
    record, source = _timed()
    step = training_seconds(info, scale.train_batch, record["payload"]["ceilings"])
    held = training_memory(info, scale.train_batch, layer=2, checkpoint=True).total + CONTEXT
    told = f"FLOPs, traffic over the machine's ceilings in {source}"
    runs = len(scale.targets) * len(scale.predictor_seeds)
    trained = [("predictors (02)", runs, scale.train_steps)]
    if size == "7b":  # ablations are of one model, as in the paper
        trained.append(("predictors of the ablations (05)", len(ablations._shapes_trained()), scale.ablation_steps))
    found = [
        Stage(name, n * steps, f"steps of {scale.train_batch} pictures", n * steps * step, n, held, False, told)
        for name, n, steps in trained
    ]

    def replies(name: str, every: int, dyrate: int, new: int, loop: str) -> Stage:
        rate = reply_rate(size, loop)
        seconds = (every - dyrate) * rate.seconds["original", new] + dyrate * rate.seconds["dyrate", new]
        return Stage(name, every, f"replies of {new} tokens", seconds, None, rate.memory, rate.measured, rate.source)

    every, dyrate = study_replies(size)
    found.append(replies("the study's replies (02, 03, 05)", every, dyrate, CAPTION, ENGINE if ENGINE in LOOPS else LOOPS[0]))
    rows = evaluations()
    for name, table, new in (("lmms-eval, captions", 2, CAPTION), ("lmms-eval, short answers", 1, ANSWER)):
        items = sum(b.items for b in BENCHMARKS.values() if b.table == table)
        found.append(replies(name, len(rows) * items, sum(ours for _, ours in rows) * items, new, loop))
    return found


# ----------------------------------------------------------------------------------------------------------------- table


def plan_table(sizes: Sequence[str] = ("7b",), gpus: int = 8) -> pd.DataFrame:
    """The sheet: a row for each stage of each size, and their sums. Hours with lmms-eval in the reference loop and in the graph
    engine. Raises InputError for no GPU, and what `stages` raises."""
    import pandas as pd

    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise InputError(f"gpus={gpus!r} must be a whole number, 1 or more")
    rows = []
    for size in sizes:
        both = {loop: stages(size, loop) for loop in LOOPS}
        for slow, fast in zip(both["reference"], both["graph"], strict=True):
            rows.append(
                {
                    "model": size.upper(), "stage": slow.name, "work": f"{slow.count:,} {slow.unit}",
                    "a second": f"{slow.count / slow.seconds:.1f}" + _other(fast.count / fast.seconds, slow.count / slow.seconds),
                    "one GPU, h": slow.hours(1), f"{gpus} GPUs, h": slow.hours(gpus),
                    f"{gpus} GPUs, graph engine, h": fast.hours(gpus), "memory, GB": slow.memory / 1e9,
                    "rate": _source(slow) + (f"; graph engine {_source(fast)}" if fast.measured and not slow.measured else ""),
                }
            )  # fmt: skip
        total = {
            "one GPU, h": sum(s.hours(1) for s in both["reference"]),
            f"{gpus} GPUs, h": sum(s.hours(gpus) for s in both["reference"]),
            f"{gpus} GPUs, graph engine, h": sum(s.hours(gpus) for s in both["graph"]),
            "memory, GB": max(s.memory for s in both["reference"]) / 1e9,
        }
        rows.append({"model": size.upper(), "stage": "all", "work": "", "a second": "", **total, "rate": ""})
    return pd.DataFrame(rows)


def _source(stage: Stage) -> str:
    return ("measured: " if stage.measured else "estimated: ") + stage.source


def _other(fast: float, slow: float) -> str:
    return f" ({fast:.1f})" if fast != slow else ""


def about(sizes: Sequence[str] = ("7b",)) -> str:
    """What the counts are made of, in sentences."""
    from .experiments.scales import SCALES
    from .lmms.benchmarks import BENCHMARKS

    rows = evaluations()
    items = {table: sum(b.items for b in BENCHMARKS.values() if b.table == table) for table in (1, 2)}
    info = llava_dimensions(sizes[0])
    record, _ = _timed()
    step = training_seconds(info, SCALES["full"].train_batch, record["payload"]["ceilings"])
    return (
        f"lmms-eval: {len(rows)} evaluations ({sum(not ours for _, ours in rows)} of other methods and the unpruned model, "
        f"{sum(ours for _, ours in rows)} of DyRate) of {items[2]:,} captions and {items[1]:,} short answers, "
        f"{len(rows) * sum(items.values()):,} replies a model.\nReplies are counted at {CAPTION} and {ANSWER} new tokens, batch "
        f"{BATCH}; methods other than DyRate at the unpruned model's rate.\nA training step of {sizes[0].upper()} is put at "
        f"{step:.2f} s, a lower bound.{_compared() if '13b' in sizes else ''}"
    )


def _compared() -> str:
    counted, timed = size_ratio()
    return (
        f"\n13B is estimated to take {counted:.2f} times 7B's time for a caption, the ratio of FLOPs; in the graph engine, where "
        f"both are measured, it is {timed:.2f}."
    )


def sheet(sizes: Sequence[str] = SIZES, gpus: int = 8) -> str:
    """The README's section: the table as Markdown, and what it counts."""
    from .plotting import markdown_table

    return f"{markdown_table(plan_table(sizes, gpus), 2)}\n\n{about(sizes)}"


def write_plan(file: str | Path) -> None:
    """Put the sheet for both sizes and eight GPUs between the marks `plan` of a text file. Raises what `marks.replace` raises."""
    marks.replace(file, MARK, sheet())
