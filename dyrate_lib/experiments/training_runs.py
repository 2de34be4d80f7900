"""Notebook 02: training the rate predictors, what they learned, and whether masks in training stand for discarding."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..datasets import CaptionDataset, Item, open_dataset
from ..evaluate import ENGINE, batches, describe, predict
from ..generation import generate
from ..loading import SCENES
from ..masks import kept_counts, prefix_masks
from ..methods import Method, RatePath
from ..models import Adapter
from ..predictor import RatePredictor
from ..published import coco_parts
from ..training import encode_responses, masked_logits, read_prompt_and_response, train_predictor
from .budgets import kept_for, reply_shapes
from .context import Record, Study
from .gradient_check import TEMPERATURES, gradient_demonstration

MIXTURE = ("short", "narrative", "late")  # caption families that a predictor is trained on, in turn
LAYER, N_RATES, BUDGET = 2, 20, 0.333
TRAIN_SCENES = {"full": 1024, "smoke": 64}
SETTINGS = ("lr", "lam", "tau", "convention")  # of train_predictor, left at their defaults


# ------------------------------------------------------------------------------------------------------------- data


def mixture(split: str, n_scenes: int, seed: int = 0) -> CaptionDataset:
    """Items of the three caption families in turn over the same scenes: item i is family i % 3 of scene i // 3."""
    parts = [open_dataset(f"scenes:{family}:{split}", n_scenes, seed) for family in MIXTURE]

    def make(index: int) -> Item:
        return parts[index % len(parts)][index // len(parts)]

    texts = json.dumps([[make(i).prompt, make(i).references] for i in range(len(parts))])
    name = f"scenes:mixture:{split}"
    return CaptionDataset(
        name, name, len(parts) * n_scenes, seed, make, hashlib.sha256(texts.encode()).hexdigest()[:16]
    )


def training_set(study: Study) -> CaptionDataset:
    """What predictors are trained on: scenes of split train, or the train part of a COCO folder, where it has one.

    Without one, the pictures that are not evaluated on; a folder with no more pictures than are evaluated gives all of them:
    then training has seen the evaluated pictures.
    """
    if study.on_scenes:
        return mixture("train", TRAIN_SCENES[study.scale.name], study.seed)
    spec = study.spec("coco")
    kind, _, place = spec.partition(":")
    part = next((name for name in coco_parts(place) if name.startswith("train")), None) if kind == "coco" else None
    if part is not None and "#" not in place:
        train = open_dataset(f"{spec}#{part}", None, study.seed)
        if train.identity["texts"] != study.dataset("coco").identity["texts"]:
            return train
    whole, used = open_dataset(spec, None, study.seed), len(study.dataset("coco"))
    first = used if len(whole) >= used + study.scale.train_batch else 0
    return CaptionDataset(
        whole.spec, "coco:train", len(whole) - first, study.seed, lambda i: whole[first + i], whole.identity["texts"]
    )


def validation_set(study: Study) -> CaptionDataset:
    """Held-out pictures for the budget and the schedules: split val of the mixture, or the COCO folder's evaluated ones."""
    if study.on_scenes:
        return mixture("val", -(-study.scale.n_validation // len(MIXTURE)), study.seed)
    return study.dataset("coco")


# ----------------------------------------------------------------------------------------------------------- records


def wanted(study: Study, models: Sequence[str] | None = None) -> list[tuple[str, float, int]]:
    """(model, target, seed) of the predictors that this study trains.

    All of them at full scale, and for models that ship without predictors; at smoke scale one, as a proof that it trains.
    """
    out = []
    for key in models or study.keys:
        everything = study.scale.name == "full" or not _shipped(study, key)
        if everything:
            out += [(key, target, seed) for target in study.scale.targets for seed in study.scale.predictor_seeds]
        elif key == "small":
            out.append((key, BUDGET, study.scale.predictor_seeds[0]))
    return out


def _shipped(study: Study, key: str) -> bool:
    return study.model_name(key) in SCENES


def _defaults() -> dict[str, Any]:
    """The settings of train_predictor that a record's key should hold."""
    known = inspect.signature(train_predictor).parameters
    return {name: known[name].default for name in SETTINGS}


def train(study: Study, key: str, target: float, seed: int) -> Record:
    """One trained predictor: payload {history, weight, bias, n_heads}."""
    data, scale = training_set(study), study.scale
    config = {
        "target": target, "seed": seed, "steps": scale.train_steps, "batch_size": scale.train_batch, "layer": LAYER,
        "n_rates": N_RATES,
        "max_new_tokens": scale.max_new_tokens, "data": data.identity, **_defaults(),
    }  # fmt: skip

    def fn() -> dict[str, Any]:
        model, processor = study.model(key)
        result = train_predictor(
            model, processor, data, target=target, seed=seed, steps=scale.train_steps, batch_size=scale.train_batch, layer=LAYER,
            n_rates=N_RATES, max_new_tokens=scale.max_new_tokens, progress=study.progress and len(wanted(study)) == 1,
        )  # fmt: skip
        weights = result.predictor.linear
        history = [{name: round(float(value), 6) for name, value in row.items()} for row in result.history]
        return {"history": history, "weight": weights.weight, "bias": weights.bias, "n_heads": result.predictor.n_heads}

    return study.record("training", config, fn, models=(key,), together=True)


def as_predictor(record: Record) -> RatePredictor:
    """The predictor that a training record holds."""
    payload, config = record["payload"], record["config"]
    kept = {name: config[name] for name in ("target", "seed", "steps", "batch_size", *SETTINGS)}
    predictor = RatePredictor(
        payload["n_heads"], config["n_rates"], config["layer"], {"model": config["models"][0], **kept}
    )
    weights = {"linear.weight": torch.tensor(payload["weight"]), "linear.bias": torch.tensor(payload["bias"])}
    predictor.load_state_dict(weights)
    return predictor.eval().requires_grad_(False)


def save_predictors(study: Study, records: dict[tuple[str, float, int], Record]) -> list[str]:
    """Write the trained predictors to <out>/predictors, where the later notebooks of this run find them; their file names.

    The proof that is trained at smoke scale is not written: the shipped predictors stay in use.
    """
    written = []
    for (key, target, seed), record in records.items():
        new = study.records == "fresh" and study.scale.name == "full"
        if new or not _shipped(study, key):
            path = study.out / "predictors" / study.predictor_file(key, target, seed)
            as_predictor(record).save(path)
            written.append(path.name)
    return written


def shipped_agree(study: Study, records: dict[tuple[str, float, int], Record]) -> str:
    """Whether the predictors in data/predictors are the ones of these records, as one stable line."""
    same = 0
    for (key, target, seed), record in records.items():
        mine, shipped = as_predictor(record), study.predictor(key, target, seed)
        same += int(
            torch.equal(mine.linear.weight, shipped.linear.weight)
            and torch.equal(mine.linear.bias, shipped.linear.bias)
        )
    if study.scale.name == "smoke":
        return "smoke scale: the predictor trained here is a proof only; the later notebooks use the shipped ones"
    return f"{same} of {len(records)} predictors in use are those trained in these records"


def schedule(study: Study, key: str, target: float, seed: int) -> Record:
    """What a predictor does on held-out pictures: payload [{id, family, steps, kept, prompt_length, n_image, flops}]."""
    return schedule_of(study, key, study.method("dyrate", key, target=target, seed=seed))


def schedule_of(study: Study, key: str, method: Method) -> Record:
    """The same of any method."""
    data = validation_set(study)
    config = {"data": data.identity, "method": describe(method), "max_new_tokens": study.scale.max_new_tokens}

    def fn() -> list[dict[str, Any]]:
        model, processor = study.model(key)
        made = predict(
            model,
            processor,
            data,
            method,
            max_new_tokens=study.scale.max_new_tokens,
            batch_size=study.scale.batch_size,
            progress=False,
        )
        families = [data[i].meta.get("family", "coco") for i in range(len(data))]
        keep = ("id", "steps", "kept", "prompt_length", "n_image", "flops")
        return [
            {**{name: row[name] for name in keep}, "family": family} for row, family in zip(made, families, strict=True)
        ]

    return study.record("schedules", config, fn, models=(key,))


def schedules(study: Study, models: Sequence[str] | None = None) -> dict[tuple[str, float, int], Record]:
    """The schedules of every predictor in use, those of `models` only if given; at smoke scale of the first seed."""
    seeds = study.scale.predictor_seeds if study.scale.name == "full" else study.scale.predictor_seeds[:1]
    cells = [(key, t, s) for key in models or study.keys for t in study.scale.targets for s in seeds]
    return {cell: schedule(study, *cell) for cell in study.each(cells, "schedules")}


def masked_against_discarded(study: Study, key: str = "small") -> Record:
    """Teacher-forced logits under masks beside those of the loop that discards, along random rate paths, in float32.

    payload: {differences: [n_masked] largest absolute difference of logits of each path, logit_range, steps}.
    """
    data = validation_set(study)
    n = min(study.scale.n_masked, len(data))
    config = {"data": data.identity, "n": n, "layer": LAYER, "n_rates": N_RATES, "seed": study.seed}

    def fn() -> dict[str, Any]:
        model, processor = study.model(key)
        differences: list[float] = []
        steps: list[int] = []
        top = 0.0
        random = torch.Generator().manual_seed(study.seed)
        for indices, inputs in batches(model, processor, data, list(range(n)), min(n, 10)):
            texts = [data[i].references[0] for i in indices]
            found, largest, lengths = _compare_once(model, processor, inputs, texts, random, study.scale.max_new_tokens)
            differences, top, steps = differences + found, max(top, largest), steps + lengths
        return {"differences": differences, "largest_logit": top, "steps": steps}

    return study.record("masked_discarded", config, fn, models=(key,))


@torch.no_grad()
def _compare_once(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], texts: list[str], random: torch.Generator, limit: int
) -> tuple[list[float], float, list[int]]:
    adapter, device = Adapter(model), inputs["input_ids"].device
    response, lengths = encode_responses(processor.tokenizer, texts, limit, device)
    # rates rise here and there, as a predictor's would; every path starts somewhere else
    steps = response.shape[1]
    jumps = (torch.rand(len(texts), steps, generator=random) < 4.0 / steps).long() * torch.randint(
        1, 4, (len(texts), steps), generator=random
    )
    chosen = (torch.randint(0, N_RATES // 2, (len(texts), 1), generator=random) + jumps.cumsum(1)).clamp(
        max=N_RATES - 1
    )
    forced = read_prompt_and_response(adapter, adapter.embed(inputs), response, LAYER)
    counts = kept_counts(forced.prompt.n_image, N_RATES).gather(1, chosen.to(device))
    masked = masked_logits(adapter, forced, prefix_masks(counts, forced.scores.shape[1]).float())
    path = RatePath(LAYER, [[k / N_RATES for k in row] for row in chosen.tolist()])
    discarded = generate(model, inputs, path, forced_tokens=response, return_logits=True, engine=ENGINE).logits
    assert discarded is not None  # asked for
    gap = (masked.float() - discarded.float()).abs().amax(-1)
    return (
        [float(row[:length].max()) for row, length in zip(gap, lengths, strict=True)],
        float(discarded.abs().max()),
        lengths,
    )


def demonstration(study: Study) -> Record:
    """The toy of `gradient_check`, as a record."""
    samples = 20000 if study.scale.name == "full" else 2000
    config = {"samples": samples, "seed": study.seed, "temperatures": TEMPERATURES}
    return study.record("gradient_toy", config, lambda: gradient_demonstration(samples, study.seed))


# ------------------------------------------------------------------------------------- one fixed rate of the same cost


def kept_for_ratio(study: Study, key: str, cells: Sequence[Record], layer: int = LAYER) -> int:
    """The constant count of image tokens from layer `layer` on that costs what the replies in `cells` did, on average.

    Cost is the FLOPs ratio in the paper's convention, for the same prompts and reply lengths.
    """
    ratio = float(np.mean([row["flops"]["paper"] for cell in cells for row in cell["payload"]]))
    return kept_for(study.info(key), [shape for cell in cells for shape in reply_shapes(cell)], ratio, layer)


def dyrate_cells(study: Study, key: str, role: str = "coco", target: float = BUDGET) -> list[Record]:
    """Replies under the predictors of every seed."""
    return [
        study.captions(key, role, study.method("dyrate", key, target=target, seed=s))
        for s in study.scale.predictor_seeds
    ]


def fixed_cell(study: Study, key: str, role: str = "coco") -> Record:
    """Replies under one fixed rate from step 0, FastV's ranking, at DyRate's cost in the paper's convention."""
    kept = kept_for_ratio(study, key, dyrate_cells(study, key, role))
    n_image = study.info(key).n_image_tokens
    return study.captions(key, role, RatePath(LAYER, ((n_image - kept) / n_image,)))


def compute(study: Study, models: Sequence[str] | None = None) -> list[Record]:
    """Every record of notebook 02; with `models` only those of some models, so that two machines can share the work."""
    keys = tuple(models or study.keys)
    trained = trained_cells(study, keys)
    save_predictors(study, trained)
    records = [*trained.values(), *schedules(study, keys).values()]
    if "small" in keys:
        records += [masked_against_discarded(study), demonstration(study)]
    for key in keys:
        records += [study.captions(key, "coco"), *dyrate_cells(study, key), fixed_cell(study, key)]
    return records


def trained_cells(study: Study, models: Sequence[str] | None = None) -> dict[tuple[str, float, int], Record]:
    """The training records of this study, by (model, target, seed)."""
    return {cell: train(study, *cell) for cell in study.each(wanted(study, models), "predictors")}


def quantities(study: Study) -> dict[str, Any]:
    """What claims C5 and F3 are judged by."""
    from .training_tables import quantities

    return quantities(study)
