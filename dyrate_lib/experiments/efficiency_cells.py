"""Notebook 04: the cells of Table III, each a record that can be asked for alone: everything in it was timed in one process.

`7b:16:576` times the loops and methods at batch 16 and 576 image tokens a prompt; `7b:16:sweep` DyRate at several budgets;
`7b:16:share` what predictor, ranking and bookkeeping take of a step, and the kernels of a step by time; `agreement` where greedy
replies of two loops first differ in bfloat16.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..benchmark import machine_ceilings
from ..errors import InputError, ResourceError
from ..loading import load_vlm, quietly
from ..models import ModelInfo
from .context import Record, Study
from .contradictions import llava_info
from .efficiency_course import TEXT_TOKENS, course, kept_by_layer, reads_of, stretched
from .efficiency_floors import floor_ms

ROLES = {"7b": "small", "13b": "base"}  # whose schedule a LLaVA-1.5 size replays
METHODS = ("original", "fastv-3", "fastv-2", "vtw", "dyrate")
BATCHES, PICTURES = (1, 4, 16, 64), (1, 5)
SWEEP_BATCHES = (1, 16, 64)
BUDGETS = {"full": (0.1, 0.2, 0.333, 0.5, 0.65, 0.8), "smoke": (0.333,)}  # of sweeps, in the paper's convention
LENGTHS = {"full": (16, 64, 256), "smoke": (4, 8, 10)}  # new tokens: the middle one is the headline
REPEATS = {"full": {1: (20, 3), 5: (7, 2)}, "smoke": {1: (2, 1)}}  # by pictures: of short runs, of long ones
SLOW_REPEATS = (
    7  # of loops that are there for comparison alone; stock generate, against which a target stands, takes all
)
CAPTURED_ROWS = 8192
KIND_NAMES = ("time", "sweep", "share", "agreement")
LAYOUT = 1  # of the records; a new one makes them anew


class NeedsGPU(ResourceError):
    """A record of GPU timings is not there, and this machine has no GPU to make it."""


@dataclass(frozen=True)
class Subject:
    """A model to time: its key in the claims (7b, 13b) or the study's (small), its name for load_vlm, and on what device."""

    key: str
    name: str
    gpu: bool


def subjects(study: Study) -> list[Subject]:
    """At full scale LLaVA-1.5's two sizes with random weights, on a GPU; at smoke scale the small model, where we are."""
    if study.scale.name == "full":
        return [Subject("7b", "random:llava-1.5-7b", True), Subject("13b", "random:llava-1.5-13b", True)]
    return [Subject("small", study.model_name("small"), torch.cuda.is_available())]


@dataclass(frozen=True)
class Cell:
    """One record's worth. model: a subject's key; batch; pictures in a prompt; kind: one of `KIND_NAMES`."""

    model: str
    batch: int = 1
    pictures: int = 1
    kind: str = "time"

    def name(self, n_image: int = 576) -> str:
        """As the command line takes it."""
        if self.kind == "agreement":
            return "agreement"
        return f"{self.model}:{self.batch}:{self.pictures * n_image if self.kind == 'time' else self.kind}"


def info_of(study: Study, key: str) -> ModelInfo:
    """Dimensions of a timed model."""
    return llava_info(key) if key in ROLES else study.info(key)


def cells(study: Study) -> list[Cell]:
    """Every cell of the scale, one model after the other."""
    if study.scale.name != "full":
        small = subjects(study)[0].key
        return [Cell(small, 1, 1, kind) for kind in KIND_NAMES]
    found = []
    for subject in subjects(study):
        key = subject.key
        found += [Cell(key, batch, pictures) for pictures in PICTURES for batch in BATCHES]
        found += [Cell(key, batch, 1, "share") for batch in (SWEEP_BATCHES if key == "7b" else (1,))]
        found += [Cell(key, batch, 1, "sweep") for batch in SWEEP_BATCHES if key == "7b"]
    return [*found, Cell("7b", 8, 1, "agreement")]


def parse_cell(study: Study, text: str) -> Cell:
    """The cell of that name.

    Raises:
        InputError: there is none; the message names those there are.
    """
    known = {cell.name(info_of(study, cell.model).n_image_tokens): cell for cell in cells(study)}
    if text.strip() not in known:
        raise InputError(f"no cell {text.strip()!r} at scale {study.scale.name}: there are {', '.join(known)}")
    return known[text.strip()]


def courses(study: Study, cell: Cell) -> tuple[int, ...]:
    """The course that DyRate replays in a cell: the trained predictor's of the scenes model in the same role."""
    role = ROLES.get(cell.model, cell.model)
    role = role if role in study.keys else study.keys[0]
    info = info_of(study, cell.model)
    return stretched(course(study, role), study.info(role).n_image_tokens, info.n_image_tokens * cell.pictures)


def contender_names(cell: Cell) -> list[tuple[str, str]]:
    """(loop, method) of what takes turns in a cell."""
    names = [("graph", method) for method in METHODS]
    if cell.pictures == 1 and cell.batch in (1, 16):
        names += [("reference", "original"), ("reference", "dyrate")]
    names.append(("stock", "original"))
    if cell.pictures == 1 and cell.batch == 1:
        names.append(("stock", "fastv-2"))
    if cell.model in ROLES and cell.pictures == 1 and cell.batch in (1, 16):  # compiled on a GPU alone
        names.append(("static", "original"))
    return names


def estimate_seconds(study: Study, cell: Cell) -> float:
    """About how long a cell takes on one H200 (at smoke scale: on two cores), the model's loading left out."""
    if study.scale.name != "full":
        return {"time": 25.0, "share": 10.0, "sweep": 5.0, "agreement": 8.0}[cell.kind]
    if cell.kind == "agreement":
        return 90.0
    info, n_image = info_of(study, cell.model), info_of(study, cell.model).n_image_tokens * cell.pictures
    limits = {"copy_gb_s": 3400.0, "matmul_tflops": {"bfloat16": 480.0}}
    new, long = LENGTHS["full"][1:]

    def run(name: str, n: int) -> float:
        layer, kept = reads_of(name, info.n_layers, n_image, (n_image // 4,), True)
        floor = floor_ms(info, kept_by_layer(info, layer, kept, n, n_image), n_image, cell.batch, limits)
        return (max(floor["prefill"], floor["prefill_bytes"]) + (n - 1) * floor["decode"]) / 1000

    short, more = REPEATS["full"][cell.pictures]
    warm = warmup(cell, n_image)
    if cell.kind == "sweep":
        return 10 + (len(BUDGETS["full"]) + 1) * run("dyrate", new) * (6 + warm)
    if cell.kind == "share":
        return 20 + 4 * run("dyrate", new) * 13
    seconds = 5.0
    for kind, method in contender_names(cell):
        if kind == "graph":
            seconds += run(method, new) * (short + 2 * warm) + run(method, long) * (more + warm)
        elif kind == "static":
            seconds += 90 + 1.6 * run(method, new) * short
        else:
            slow = 0.028 * info.n_layers / 32 * new + 1.5 * run(method, new)
            seconds += slow * (1 + (short if (kind, method) == ("stock", "original") else min(short, SLOW_REPEATS)))
    return seconds


def warmup(cell: Cell, n_image: int) -> int:
    """Runs before the first that counts: a prompt's pass that is captured takes more, while caches grow."""
    return 4 if cell.batch * (n_image + TEXT_TOKENS) <= CAPTURED_ROWS else 2


def config_of(study: Study, cell: Cell) -> dict[str, Any]:
    """What a record is found by. The course that DyRate replays is in the payload: another one is no other shape of work."""
    subject = next(s for s in subjects(study) if s.key == cell.model)
    info = info_of(study, cell.model)
    config: dict[str, Any] = {
        "layout": LAYOUT, "cell": cell.kind, "model": subject.name.rsplit("/", 1)[-1], "where": "gpu" if subject.gpu else "cpu",
        "batch": cell.batch, "image_tokens": info.n_image_tokens * cell.pictures, "text_tokens": TEXT_TOKENS,
        "new_tokens": list(LENGTHS[study.scale.name]),
    }  # fmt: skip
    if cell.kind == "time":
        config |= {"contenders": [f"{kind} {method}" for kind, method in contender_names(cell)],
                   "repeats": list(REPEATS[study.scale.name][cell.pictures])}  # fmt: skip
    elif cell.kind == "sweep":
        config["budgets"] = list(BUDGETS[study.scale.name])
    return config


def record_of(study: Study, cell: Cell, seconds: float = 450.0, skip: tuple[str, ...] = ()) -> Record | None:
    """The cell's record, made where it is missing; None where this machine cannot make it.

    seconds: sampling stops after these (three samples at least are taken, one of long runs). skip: what to leave out: loops such
    as "static", and "long" for the runs of most new tokens.
    """
    from .efficiency_agreement import agreement
    from .efficiency_measure import measure, sweep
    from .efficiency_share import share

    subject = next(s for s in subjects(study) if s.key == cell.model)

    def fn() -> dict[str, Any]:
        if subject.gpu and not torch.cuda.is_available():
            raise NeedsGPU(f"timing {subject.name} needs a GPU")
        make = {"time": measure, "sweep": sweep, "share": share, "agreement": agreement}[cell.kind]
        return make(study, cell, time.monotonic() + seconds, skip)

    about = {"dtype": "bfloat16" if subject.gpu else "float32"}
    return if_there(study, lambda: study.record("latency", config_of(study, cell), fn, about=about))


def if_there(study: Study, get: Any) -> Record | None:
    """A record of timings, or None where it is not there and this machine cannot make it."""
    try:
        return get()
    except NeedsGPU:
        return None
    except ResourceError:
        if study.store.frozen:  # nothing is computed from a frozen store, so the record is simply not there
            return None
        raise


def timed_model(study: Study, subject: Subject) -> tuple[Any, Any]:
    """The model to time, in bfloat16 on a GPU; only one is held at a time."""
    memory = vars(study).setdefault("_timed", {})
    if subject.name not in memory:
        forget(study)
        memory = vars(study).setdefault("_timed", {})
        with quietly():
            memory[subject.name] = load_vlm(subject.name, device="cuda" if subject.gpu else "cpu")
    return memory[subject.name]


def forget(study: Study) -> None:
    """Give the timed model back."""
    vars(study).pop("_timed", None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limits_here(study: Study, device: torch.device) -> dict[str, Any]:
    """The machine's ceilings, measured once in this process."""
    memory = vars(study).setdefault("_ceilings", {})
    if device.type not in memory:
        memory[device.type] = machine_ceilings(device, 10 if study.scale.name == "full" else 3)
    return memory[device.type]
