"""Generations to be looked at step by step: what the book's interactive page shows, as plain data.

For scenes of several kinds, both scenes models and every budget a predictor was trained for: the words, the image tokens
kept, the rate chosen and the attention shares that it was chosen by, at each step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import paths
from .errors import ResourceError
from .provenance import device_name
from .store import Store, get_or_run

log = logging.getLogger(__name__)

BUDGETS = (0.5, 0.333, 0.2)
PER_KIND = 2  # scenes of each kind
_SEARCHED = 200  # scenes looked through for them
_MAX_NEW_TOKENS = 64


def scenes_shown(per_kind: int = PER_KIND) -> list[dict[str, Any]]:
    """The first scenes that fit each kind of notebook 06: [{kind, spec, index, id, prompt, reference}]; deterministic."""
    from .datasets import open_dataset
    from .experiments.context import ROLE_SPECS
    from .experiments.visualization import KINDS

    found = []
    for kind, (role, wanted) in KINDS.items():
        dataset = open_dataset(ROLE_SPECS[role], _SEARCHED)
        fitting = [i for i in range(len(dataset)) if wanted(dataset[i].meta["scene"])][:per_kind]
        for index in fitting:
            item = dataset[index]
            row = {"kind": kind, "spec": dataset.spec, "index": index, "id": item.id}
            found.append({**row, "prompt": item.prompt, "reference": item.references[0]})
    return found


def predictor_file(model_name: str, budget: float) -> Path:
    """The shipped predictor of a scenes model for a budget, seed 0. ResourceError if there is none."""
    file = paths.predictors() / f"{model_name}_t{budget:g}_s0.safetensors"
    if not file.is_file():
        raise ResourceError(f"no predictor {file.name} in {file.parent}: get a full checkout, or train it (notebook 02)")
    return file


def walk(model_name: str, rows: Sequence[dict[str, Any]], store: Store, budgets: Sequence[float] = BUDGETS) -> dict[str, Any]:
    """Generations of one scenes model over `rows` (of `scenes_shown`), from the store or computed (about a minute on a CPU).

    Returns the record (see `store.get_or_run`). Its payload: {"layer": P, "n_layers", "rates": [n_rates], "unpruned": {id:
    text}, "runs": {budget: {id: run}}} with run = {"text", "words" [steps], "kept" [steps], "chosen" [steps] index of the rate
    chosen, "ranking" [kept[0]] image tokens, most attended first, "shares" [steps][4] (sys, img, ins, res; mean over heads at
    layer P - 1), "flops": share of the unpruned model's, by convention}. Ids are those of `place`.
    """
    from .evaluate import predictor_hash
    from .predictor import RatePredictor

    files = [predictor_file(model_name, budget) for budget in budgets]
    weights = paths.checkpoints() / model_name
    config = {
        "model": model_name, "budgets": list(budgets), "max_new_tokens": _MAX_NEW_TOKENS,
        "predictors": [predictor_hash(RatePredictor.load(file)) for file in files],  # what is noted beside weights may change
        "scenes": [{"spec": row["spec"], "index": row["index"]} for row in rows],
    }  # fmt: skip
    return get_or_run(
        "walkthrough", config, lambda: _walk(model_name, rows, dict(zip(budgets, files, strict=True))), store=store,
        inputs=[weights], about={"device": device_name("cpu"), "dtype": "float32"},
    )  # fmt: skip


def place(row: dict[str, Any]) -> str:
    """A row's own name: the same scene may stand under two prompts."""
    return f"{row['id']}-{row['spec'].split(':')[1]}"


def _walk(model_name: str, rows: Sequence[dict[str, Any]], files: dict[float, Path]) -> dict[str, Any]:
    from .loading import load_vlm
    from .methods import DyRate
    from .models import model_info

    log.info("walking through %d scenes with %s", len(rows), model_name)
    model, processor = load_vlm(model_name, device="cpu")
    methods = {budget: DyRate(file) for budget, file in files.items()}
    first = next(iter(methods.values())).loaded
    runs: dict[str, dict[str, Any]] = {f"{budget:g}": {} for budget in methods}
    unpruned: dict[str, str] = {}
    for spec in dict.fromkeys(row["spec"] for row in rows):  # one prompt a spec, so one batch
        some = [row for row in rows if row["spec"] == spec]
        unpruned |= {name: run["text"] for name, run in _batch(model, processor, some, None).items()}
        for budget, method in methods.items():
            runs[f"{budget:g}"] |= _batch(model, processor, some, method)
    info = model_info(model)
    rates = [round(rate, 4) for rate in first.rates.tolist()]
    return {"layer": first.layer, "n_layers": info.n_layers, "rates": rates, "unpruned": unpruned, "runs": runs}


def _batch(model: Any, processor: Any, rows: Sequence[dict[str, Any]], method: Any) -> dict[str, dict[str, Any]]:
    from .datasets import open_dataset
    from .evaluate import ENGINE, batches
    from .generation import generate

    indices = [row["index"] for row in rows]
    dataset = open_dataset(rows[0]["spec"], max(indices) + 1)
    ((_, inputs),) = batches(model, processor, dataset, indices, len(indices))
    out = generate(model, inputs, method, _MAX_NEW_TOKENS, processor=processor, engine=ENGINE)
    found = {}
    for b, row in enumerate(rows):
        steps = int(out.lengths[b])
        run: dict[str, Any] = {"text": out.text[b]}
        if method is not None:
            shares = out.trace.attention[b, :steps].float().cpu()
            kept = out.trace.kept[b, :steps].tolist()
            tokens = out.new_tokens[b, :steps].tolist()
            run |= {
                "words": [processor.tokenizer.decode([token]).strip() for token in tokens],
                "kept": kept,
                "chosen": method.loaded(shares).argmax(-1).tolist(),
                "ranking": out.trace.kept_indices[b, : kept[0]].tolist(),
                "shares": [[round(value, 4) for value in step] for step in shares.mean(1).tolist()],
                "flops": {c: round(out.sample_flops(b, c).ratio, 4) for c in ("paper", "cached")},
            }
        found[place(row)] = run
    return found
