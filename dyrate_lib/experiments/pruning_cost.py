"""Notebook 03: what pruning itself costs, measured: scoring, choosing, merging, at the prompt and at each later step.

The method runs as it does in our loop, and the calls that exist for its sake alone are timed and their matrix products
counted: `cut` before the LLM; `queries`, `look`, `cut` and `leaving` inside it; the look at the query row and the choice of
FastV and DyRate. What a shorter sequence saves is not in here. At full scale on a model of LLaVA-1.5-7B's dimensions with
random weights on a GPU, at smoke scale on the small model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from ..benchmark import time_callable
from ..budgets import fit_budget
from ..evaluate import describe
from ..methods import BeforeLLM, DyRate, FastV, Method, NoReduction, Staged
from ..models import Adapter, ModelInfo
from ..predictor import RatePredictor
from .context import Record, Study
from .efficiency import NeedsGPU, Subject, if_there, latency_inputs, subjects, timed_model
from .equal_budget import RIVALS
from .training_runs import LAYER, N_RATES

SHARE = 1 / 3  # of the image tokens, on average over the layers: 192 of 576
STEPS = 4  # later passes that are measured, of methods that work there


class Meter:
    """Wraps calls so that their time, or the FLOPs of their matrix products, is added up in `total`."""

    def __init__(self, device: torch.device, count_flops: bool) -> None:
        self.device, self.count_flops, self.total = device, count_flops, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def wrap(self, owner: Any, *names: str) -> None:
        """Replace methods of the object `owner` by metered ones (on the object alone)."""
        for name in names:
            setattr(owner, name, self._metered(getattr(owner, name)))

    def _metered(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                out = call(*args, **options)
            self.total += counter.get_total_flops()
            return out

        def timed(*args: Any, **options: Any) -> Any:
            start = self._now()
            out = call(*args, **options)
            self.total += 1000.0 * (self._now() - start)
            return out

        return counted if self.count_flops else timed

    def take(self) -> float:
        """What was added up since the last call."""
        total, self.total = self.total, 0.0
        return total


@torch.no_grad()
def metered_run(model: Any, inputs: Any, method: Method, steps: int, count_flops: bool = False) -> list[float]:
    """Milliseconds (or FLOPs) of a method's own work: at the prompt, then at each of `steps` later passes.

    Only DyRate and methods that anneal work at later passes; for others these are not run and count as nothing.
    """
    adapter, method = Adapter(model), copy.copy(method)
    meter = Meter(next(model.parameters()).device, count_flops)
    if isinstance(method, BeforeLLM):
        meter.wrap(method, "cut")
    if isinstance(method, Staged):
        meter.wrap(method, "queries")
    runner: Any = method.runner(adapter, method.embed(adapter, inputs), steps + 1)
    if isinstance(method, Staged):
        meter.wrap(runner.state, "look", "cut", *(["leaving"] if method.anneals else []))
    elif not isinstance(method, BeforeLLM | NoReduction):
        meter.wrap(runner.state, "start", "advance")
        if isinstance(method, FastV | DyRate):  # others need no look at the query row; our trace takes one all the same
            meter.wrap(runner, "_look")
    token = runner.prefill().argmax(-1)
    spent = [meter.take()]
    if not works_later(method):
        return spent + [0.0] * steps
    for _ in range(steps):
        token = runner.decode(token).argmax(-1)
        spent.append(meter.take())
    return spent


def works_later(method: Method) -> bool:
    """Whether a method looks at later tokens, too."""
    return isinstance(method, DyRate) or (isinstance(method, Staged) and method.anneals)


def costed_methods(info: ModelInfo) -> dict[str, Method]:
    """What is measured: every rival at 192 of 576 tokens a layer, or the nearest it can be set to, and DyRate.

    DyRate's predictor is untrained: what it costs does not hang on its weights.
    """
    tokens = SHARE * info.n_image_tokens
    found = {rival.key: fit_budget(rival.make(), info, tokens=tokens, steps=1).method for rival in RIVALS}
    return {**found, "dyrate": DyRate(RatePredictor(info.n_heads, N_RATES, LAYER))}


def cost(study: Study) -> Record | None:
    """payload {methods: {key: {prompt_ms, step_ms: [repeats], prompt_flops, step_flops}}, unpruned_ms: [..], layers..}.

    None where the record needs a GPU and there is none.
    """
    subject = subjects(study)[0]
    info = _info(study, subject)
    methods, repeats = costed_methods(info), study.scale.latency_repeats if study.scale.name == "full" else 1
    config = {
        "model": subject.key, "name": subject.name.rsplit("/", 1)[-1], "where": "gpu" if subject.gpu else "cpu",
        "methods": {key: {k: v for k, v in describe(m).items() if k != "predictor"} for key, m in methods.items()},
        "steps": STEPS, "repeats": repeats,
    }  # fmt: skip

    def fn() -> dict[str, Any]:
        if subject.gpu and not torch.cuda.is_available():
            raise NeedsGPU("the cost of pruning at 7B's dimensions needs a GPU")
        return _measure(*timed_model(study, subject), methods, repeats)

    record = if_there(study, lambda: study.record("pruning_cost", config, fn, about={"dtype": _dtype(subject)}))
    vars(study).pop("_timed", None)
    return record


def _measure(model: Any, processor: Any, methods: dict[str, Method], repeats: int) -> dict[str, Any]:
    inputs, device = latency_inputs(model, processor, 1), next(model.parameters()).device
    out: dict[str, Any] = {"methods": {}, "threads": torch.get_num_threads()}
    for key, method in methods.items():
        flops = metered_run(model, inputs, method, STEPS, count_flops=True)  # warms up, too
        runs = np.array([metered_run(model, inputs, method, STEPS) for _ in range(repeats)])
        out["methods"][key] = {
            "prompt_ms": runs[:, 0].tolist(), "step_ms": runs[:, 1:].mean(1).tolist(), "prompt_flops": flops[0],
            "step_flops": float(np.mean(flops[1:])),
        }  # fmt: skip
    adapter = Adapter(model)
    prompt = adapter.embed(inputs)

    def whole() -> None:
        NoReduction().runner(adapter, prompt, 1).prefill()

    out["unpruned_ms"] = list(time_callable(whole, device, 1, repeats).samples_ms)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        whole()
    out["unpruned_flops"] = counter.get_total_flops()
    return out


def _info(study: Study, subject: Subject) -> ModelInfo:
    from .contradictions import llava_info

    return llava_info(subject.key) if subject.key in ("7b", "13b") else study.info(subject.key)


def _dtype(subject: Subject) -> str:
    return "bfloat16" if subject.gpu else "float32"


def compute(study: Study) -> list[Record]:
    """The record, where this machine can make it."""
    found = cost(study)
    return [found] if found is not None else []


def cost_table(study: Study) -> pd.DataFrame:
    """Median time of a method's own work, and its matrix products as a share of the unpruned prompt's; "" without a record."""
    record = cost(study)
    if record is None:
        return pd.DataFrame()
    payload, names = record["payload"], {**{rival.key: rival.label for rival in RIVALS}, "dyrate": "DyRate"}
    whole, out = float(np.median(payload["unpruned_ms"])), []
    for key in names:
        found = payload["methods"][key]
        prompt, step = float(np.median(found["prompt_ms"])), float(np.median(found["step_ms"]))
        spread = np.percentile(found["prompt_ms"], [25, 75])
        out.append(
            {
                "method": names[key], "at the prompt, ms": prompt, "quartiles": f"{spread[0]:.2f} to {spread[1]:.2f}",
                "% of the unpruned prompt's time": 100 * prompt / whole, "each later token, ms": step,
                "GFLOPs at the prompt": found["prompt_flops"] / 1e9,
                "% of the unpruned prompt's FLOPs": 100 * found["prompt_flops"] / payload["unpruned_flops"],
                "MFLOPs each later token": found["step_flops"] / 1e6,
            }
        )  # fmt: skip
    return pd.DataFrame(out)


def cost_words(study: Study) -> str:
    """On what the cost was measured, in a line."""
    record = cost(study)
    if record is None:
        return "No record of the pruning's own cost: it needs a GPU."
    about, payload = record["provenance"], record["payload"]
    return (
        f"{record['config']['name']}, {about['device']}, {about.get('dtype', 'float32')}, batch 1, "
        f"{record['config']['repeats']} repeats; unpruned prompt pass {np.median(payload['unpruned_ms']):.1f} ms"
    )
