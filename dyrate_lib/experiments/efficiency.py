"""Notebook 04: what pruning saves, in FLOPs of two conventions and in measured time, prefill and decode apart."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..attention import image_scores, row_attention, shares_by_type
from ..benchmark import generate_run, machine_ceilings, stock_run, time_callable
from ..errors import InputError, ResourceError
from ..loading import load_vlm
from ..masks import IMG, INS, SYS
from ..methods import VTW, FastV, Method, NoReduction
from ..methods.base import PrefillView, StepView
from ..models import model_info
from ..predictor import RatePredictor
from .benchmarks import remembered
from .context import Record, Study
from .contradictions import llava_info
from .training_runs import LAYER, N_RATES

TEXT_TOKENS, SYSTEM_TOKENS = 64, 35  # of the prompt timed, BOS included; LLaVA-1.5's system prompt has about 35
NEW_TOKENS = {"full": 64, "smoke": 12}
PAPER_VTW = 16  # Table III: layer 16 for both sizes
ROLES = {"7b": "small", "13b": "base"}  # whose schedule a LLaVA-1.5 size replays
FEATURE_LOOPS = 20  # features and classifier are short: timed in loops


@dataclass
class Replay(Method):
    """A recorded course of kept counts, with the predictor run (and ignored) at every step: DyRate's work on other weights.

    layer: P; kept: image tokens kept at step t, the last one from then on. The predictor is an untrained one of the right size.
    """

    layer: int = LAYER
    kept: tuple[int, ...] = (0,)
    name: ClassVar[str] = "replay"
    _course: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _predictor: RatePredictor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.kept or any(b > a for a, b in zip(self.kept, self.kept[1:], strict=False)):
            raise InputError(f"Replay: kept must be given and never rise, got {self.kept}")

    def prepare(self, n_layers: int, n_heads: int, device: torch.device) -> int:
        layer = self.resolve_layer(n_layers)
        self._course = torch.tensor(self.kept, device=device)
        if self._predictor is None or self._predictor.n_heads != n_heads:
            self._predictor = RatePredictor(n_heads, N_RATES, layer)
        self._predictor = self._predictor.to(device)
        return layer

    def _at(self, step: int, shares: Tensor, n_image: Tensor) -> Tensor:
        self._predictor(shares).argmax(-1)  # type: ignore[misc]
        return torch.minimum(self._course[min(step, len(self.kept) - 1)].expand_as(n_image), n_image)  # type: ignore[index]

    def prefill(self, view: PrefillView) -> Tensor:
        return self._at(0, view.shares, view.n_image)

    def step(self, view: StepView) -> Tensor:
        return self._at(view.step, view.shares, view.n_image)


def course(study: Study, key: str) -> tuple[int, ...]:
    """Image tokens that the 33.3 % predictor of a scenes model keeps at each step of a long caption, mean over pictures.

    Of the narrative set, whose replies are about as long as what is timed. Step t averages over pictures still generating.
    """
    rows = long_cell(study, key)["payload"]
    longest = max(len(row["kept"]) for row in rows)
    n_image = max(row["n_image"] for row in rows)
    means = [np.mean([row["kept"][t] / row["n_image"] for row in rows if len(row["kept"]) > t]) for t in range(longest)]
    counts = np.minimum.accumulate(np.round(np.array(means) * n_image).astype(int))
    return tuple(int(count) for count in counts)


def long_cell(study: Study, key: str) -> Record:
    """Replies of the 33.3 % predictor (first seed) to the narrative set."""
    role = "flickr30k" if study.on_scenes else "coco"
    seed = study.scale.predictor_seeds[0]
    return remembered(study, ("long", key), lambda: study.captions(key, role, study.method("dyrate", key, seed=seed)))


def scene_cells(study: Study, key: str) -> dict[str, Record]:
    """Replies to the short captions by method, for FLOPs on scenes: original, fastv-2, fastv-3, vtw, dyrate."""
    kinds = ("original", "fastv-3", "fastv-2", "vtw", "dyrate")
    return remembered(
        study,
        ("scene cells", key),
        lambda: {kind: study.captions(key, "coco", study.method(kind, key)) for kind in kinds},
    )


# ---------------------------------------------------------------------------------------------------------- latency


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


def timed_methods(study: Study, subject: Subject) -> dict[str, Method]:
    """What is timed: the paper's rows, DyRate as the replayed course of the scenes model in the same role."""
    kept = course(study, ROLES.get(subject.key, subject.key))
    n_layers = (llava_info(subject.key) if subject.key in ROLES else study.info(subject.key)).n_layers
    half = PAPER_VTW if subject.key in ROLES else n_layers // 2
    return {
        "original": NoReduction(), "fastv-3": FastV(3, 0.5), "fastv-2": FastV(2, 0.5), "vtw": VTW(half),
        "dyrate": Replay(LAYER, kept),
    }  # fmt: skip


def latency_inputs(model: Any, processor: Any, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """A prompt of `TEXT_TOKENS` text tokens around one picture, random words and pixels, on the model's device."""
    info, parameter = model_info(model), next(model.parameters())
    tokenizer, image = processor.tokenizer, int(model.config.image_token_id)
    special = {*tokenizer.all_special_ids, image}
    words = [i for i in range(min(len(tokenizer), info.vocab)) if i not in special]
    random = np.random.default_rng(seed)
    text = [int(i) for i in random.choice(words, TEXT_TOKENS - 1)]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else words[0]
    ids = [start, *text[: SYSTEM_TOKENS - 1], *[image] * info.n_image_tokens, *text[SYSTEM_TOKENS - 1 :]]
    rows = torch.tensor([ids] * batch)
    pixels = torch.as_tensor(
        random.standard_normal((batch, 3, info.image_size, info.image_size)), dtype=parameter.dtype
    )
    made = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "pixel_values": pixels}
    return {name: value.to(parameter.device) for name, value in made.items()}


def time_rounds(
    runs: Mapping[str, Callable[[int], None]], new_tokens: int, warmup: int, repeats: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of `run(1)` (prefill) and `run(new_tokens)` (end to end) of each method, `repeats` of each.

    The methods take turns in every round, so that a machine whose clock drifts treats them alike and rounds are paired.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {"prefill_ms": [], "end_to_end_ms": []} for name in runs}
    for _ in range(warmup):
        for run in runs.values():
            run(1)
            run(new_tokens)
    was_on = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, run in runs.items():
                samples[name]["prefill_ms"] += time_callable(lambda run=run: run(1), device, 0, 1).samples_ms  # type: ignore[misc]
                samples[name]["end_to_end_ms"] += time_callable(
                    lambda run=run: run(new_tokens), device, 0, 1
                ).samples_ms  # type: ignore[misc]
    finally:
        if was_on:
            gc.enable()
    return samples


def feature_times(model: Any, new_tokens: int, repeats: int) -> list[float]:
    """Milliseconds of the features and the classifier of one decode step at batch 1, on the model's own shapes."""
    info, parameter = model_info(model), next(model.parameters())
    length = info.n_image_tokens + TEXT_TOKENS + new_tokens // 2
    q = torch.randn(1, info.n_heads, 1, info.head_dim, device=parameter.device, dtype=parameter.dtype)
    keys = torch.randn(1, info.n_kv_heads, length, info.head_dim, device=parameter.device, dtype=parameter.dtype)
    types = torch.full((1, length), INS, device=parameter.device)
    types[:, :SYSTEM_TOKENS] = SYS
    types[:, SYSTEM_TOKENS : SYSTEM_TOKENS + info.n_image_tokens] = IMG
    columns = (types == IMG).nonzero()[:, 1][None]
    readable = torch.ones_like(types, dtype=torch.bool)
    predictor = RatePredictor(info.n_heads, N_RATES).to(parameter.device)

    @torch.no_grad()
    def loop() -> None:
        for _ in range(FEATURE_LOOPS):
            attention = row_attention(q, keys, readable)
            image_scores(attention, columns)
            predictor(shares_by_type(attention, types)[:, 0]).argmax(-1)

    return [ms / FEATURE_LOOPS for ms in time_callable(loop, parameter.device, 3, repeats).samples_ms]


def latency(study: Study, subject: Subject, engine: str = "ours", batch: int = 1) -> Record | None:
    """Timings of one model: payload {samples: {method: {prefill_ms, end_to_end_ms}}, peak_bytes, features_ms, ...}.

    engine: "ours" (the pruned loop) or "stock" (transformers' generate, under the method's context). Other engines and batches
    than ours at batch 1 are there for comparison and take fewer repeats and methods. None where the record is not there and this
    machine cannot make it (a GPU is needed and there is none).
    """
    methods, new_tokens = timed_methods(study, subject), NEW_TOKENS[study.scale.name]
    repeats = study.scale.latency_repeats
    if engine != "ours" or batch > 1:
        methods = {name: methods[name] for name in ("original", "fastv-2", "dyrate")}
        repeats = max(2, repeats // 3)
    config = {
        "model": subject.key if subject.gpu and subject.key in ROLES else "scenes", "name": subject.name.rsplit("/", 1)[-1],
        "where": "gpu" if subject.gpu else "cpu", "engine": engine, "batch": batch, "new_tokens": new_tokens,
        "text_tokens": TEXT_TOKENS, "repeats": repeats, "warmup": study.scale.latency_warmup,
        "course": list(methods["dyrate"].kept),  # type: ignore[attr-defined]
        "methods": list(methods),
    }  # fmt: skip

    def fn() -> dict[str, Any]:
        if subject.gpu and not torch.cuda.is_available():
            raise NeedsGPU(f"latency of {subject.name} needs a GPU")
        model, processor = timed_model(study, subject)
        device = next(model.parameters()).device
        inputs = latency_inputs(model, processor, batch)
        make = generate_run if engine == "ours" else stock_run
        runs = {name: make(model, inputs, method) for name, method in methods.items()}
        samples = time_rounds(runs, new_tokens, study.scale.latency_warmup, repeats, device)
        peaks = {name: _peak(run, new_tokens, device) for name, run in runs.items()}
        out: dict[str, Any] = {"samples": samples, "peak_bytes": peaks, "threads": torch.get_num_threads()}
        if engine == "ours" and batch == 1:
            out["features_ms"] = feature_times(model, new_tokens, repeats)
        return out

    about = {"dtype": "bfloat16" if subject.gpu else "float32"}
    return if_there(study, lambda: study.record("latency", config, fn, about=about))


def if_there(study: Study, get: Callable[[], Record]) -> Record | None:
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
        memory.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        memory[subject.name] = load_vlm(subject.name, device="cuda" if subject.gpu else "cpu")
    return memory[subject.name]


def _peak(run: Callable[[int], None], new_tokens: int, device: torch.device) -> int | None:
    """The largest GPU allocation during one run, or None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(new_tokens)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


def ceilings(study: Study, gpu: bool) -> Record | None:
    """What the machine could do at best (see benchmark.machine_ceilings); None as in `latency`."""

    def fn() -> dict[str, Any]:
        if gpu and not torch.cuda.is_available():
            raise NeedsGPU("the ceilings of a GPU need one")
        return machine_ceilings("cuda" if gpu else "cpu", study.scale.latency_repeats)

    config = {"where": "gpu" if gpu else "cpu", "repeats": study.scale.latency_repeats}
    return if_there(study, lambda: study.record("ceilings", config, fn))


def latency_cells(study: Study) -> dict[tuple[str, str, int], Record]:
    """All timings there are: (model, engine, batch) -> record. Batches above 1 and stock generate where time allows."""
    return remembered(study, ("latency",), lambda: _latency_cells(study, study.keys_asked))


def _latency_cells(study: Study, keys: Sequence[str]) -> dict[tuple[str, str, int], Record]:
    first = subjects(study)[0]
    # where one model plays both roles, its course is replayed on both sizes
    chosen = [s for s in subjects(study) if keys == study.keys or ROLES.get(s.key, s.key) in keys]
    wanted = [(s, "ours", 1) for s in chosen]
    if first in chosen:
        wanted += [(first, "stock", 1), (first, "ours", 16 if study.scale.name == "full" else 2)]
    wanted.sort(key=lambda cell: chosen.index(cell[0]))  # one model after the other: two do not fit at once
    found = {}
    for subject, engine, batch in study.each(wanted, "latency"):
        record = latency(study, subject, engine, batch)
        if record is not None:
            found[subject.key, engine, batch] = record
    vars(study).pop("_timed", None)
    return found


def compute(study: Study) -> list[Record]:
    """Every record of notebook 04 that this machine can make."""
    found: list[Record] = []
    for key in study.keys_asked:
        found += [long_cell(study, key), *scene_cells(study, key).values()]
    found += list(latency_cells(study).values())
    limits = ceilings(study, subjects(study)[0].gpu)
    return found + ([limits] if limits is not None else [])


def quantities(study: Study) -> dict[str, Any]:
    """What claims C4 and C6 are judged by."""
    from .efficiency_tables import quantities

    return quantities(study)
