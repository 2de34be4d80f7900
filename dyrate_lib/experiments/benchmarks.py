"""Notebook 03: Table II on scenes (caption quality of every method), and short answers as a stand-in for Table I."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..evaluate import batches
from ..methods import VTW, Method, RandomPrune, vtw_divergence
from .context import Record, Study
from .training_runs import BUDGET, LAYER, dyrate_cells, fixed_cell, kept_for_ratio, validation_set

ETA = {"small": 0.003, "base": 0.0005}  # the VTW authors' thresholds for 7B and 13B
FIRST_LAYER = 5  # their search starts here
EXTRAS = ("vtw-search", "dyrate-0.5", "dyrate-0.2")  # at smoke scale on the first set only
ROLE_COLUMNS = {
    "coco": "coco2017",
    "nocaps": "nocaps",
    "flickr30k": "flickr30k",
}  # role -> column of the paper's Table II


@dataclass(frozen=True)
class Row:
    """One row of the table: its key, its label, the colour it goes by, and the cells behind it (several for several seeds)."""

    key: str
    label: str
    style: str
    cells: tuple[Record, ...]


def caption_methods(study: Study, key: str) -> list[tuple[str, str, str, Callable[[], list[Method]]]]:
    """(row key, label, style, methods) of Table II for one model; several methods are seeds of one row."""
    seeds = study.scale.predictor_seeds
    rows: list[tuple[str, str, str, Callable[[], list[Method]]]] = [
        (kind, label, style, lambda kind=kind: [study.method(kind, key)])  # type: ignore[misc]
        for kind, label, style in (
            ("original", "Original", "original"),
            ("fastv-3", "FastV (P=3, R=0.5)", "fastv-3"),
            ("fastv-2", "FastV (P=2, R=0.5)", "fastv-2"),
            ("vtw", "VTW (half depth)", "vtw"),
        )
    ]
    found = vtw_layer(study, key)
    if found is not None:
        rows.append(("vtw-search", f"VTW (layer {found}, by its search)", "vtw", lambda: [VTW(found)]))
    rows.append(("random", "Random (P=2, R=0.5)", "random", lambda: [RandomPrune(2, 0.5, study.seed)]))
    rows.append(
        (
            "dyrate",
            "DyRate (target 0.333)",
            "dyrate",
            lambda: [study.method("dyrate", key, seed=seed) for seed in seeds],
        )
    )
    for target in study.scale.targets:
        if target != BUDGET:
            rows.append(
                (f"dyrate-{target:g}", f"DyRate (target {target:g})", "dyrate",
                 lambda t=target: [study.method("dyrate", key, target=t, seed=seeds[0])])  # type: ignore[misc]
            )  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------- records


def vtw_search(study: Study, key: str) -> Record:
    """VTW's own search for its layer: payload {divergence: {layer: KL}, n}, on held-out pictures."""
    data = validation_set(study)
    n = min(study.scale.n_search, len(data))
    first = min(FIRST_LAYER, study.info(key).n_layers - 1)

    def fn() -> dict[str, Any]:
        model, processor = study.model(key)
        inputs = (inputs for _, inputs in batches(model, processor, data, list(range(n)), min(n, 10)))
        found = vtw_divergence(model, inputs, first)
        return {"divergence": {str(layer): value for layer, value in found.items()}, "n": n}

    return study.record("vtw_search", {"data": data.identity, "n": n, "first_layer": first}, fn, models=(key,))


def vtw_layer(study: Study, key: str) -> int | None:
    """The first layer that VTW's threshold allows, or None where no layer meets it."""
    divergence = {int(layer): value for layer, value in vtw_search(study, key)["payload"]["divergence"].items()}
    return next((layer for layer in sorted(divergence) if divergence[layer] <= ETA[key]), None)


def matched_random(study: Study, key: str, role: str = "coco") -> Record:
    """Random removal at a fixed rate from DyRate's own layer, at DyRate's cost in the paper's convention."""
    kept = kept_for_ratio(study, key, dyrate_cells(study, key, role))
    return study.captions(key, role, RandomPrune(LAYER, 1 - kept / study.info(key).n_image_tokens, study.seed))


def refreshed_models(study: Study) -> tuple[str, ...]:
    """The models that `refreshed_fastv` runs on: at smoke scale the small one alone."""
    return study.keys if study.scale.name == "full" else study.keys[:1]


def refreshed_fastv(study: Study, key: str, role: str = "coco") -> Record:
    """FastV as first published: no cache, pruned anew at every token, on fewer pictures (each token costs a prefill)."""
    n = min(study.scale.n_refresh, len(study.dataset(role)))
    return study.captions(key, role, study.method("fastv-2", key, refresh=True), n=n)


def remembered(study: Study, key: tuple[Any, ...], fn: Callable[[], Any]) -> Any:
    """`fn()`, once for each study and key: records are checked whenever they are read, and tables read the same ones often."""
    memory = vars(study).setdefault("_remembered", {})
    if key not in memory:
        memory[key] = fn()
    return memory[key]


def table_rows(study: Study, key: str, role: str) -> list[Row]:
    """All rows of one set's table for one model; on the first set also the rows of equal cost."""
    return remembered(study, ("rows", key, role), lambda: _table_rows(study, key, role))


def _table_rows(study: Study, key: str, role: str) -> list[Row]:
    rows = [
        Row(name, label, style, tuple(study.captions(key, role, method) for method in methods()))
        for name, label, style, methods in caption_methods(study, key)
        if role == "coco" or study.scale.name == "full" or name not in EXTRAS
    ]
    if role == "coco":
        rows.append(Row("random-matched", "Random at DyRate's cost", "random", (matched_random(study, key),)))
        rows.append(Row("fixed", "Fixed rate at DyRate's cost", "fixed", (fixed_cell(study, key),)))
    return rows


def question_rows(study: Study, key: str) -> list[Row]:
    """The questions' rows: the methods of Table I that are built, and random."""
    return remembered(study, ("questions", key), lambda: _question_rows(study, key))


def _question_rows(study: Study, key: str) -> list[Row]:
    wanted = ("original", "fastv-3", "fastv-2", "vtw", "random", "dyrate")
    return [
        Row(name, label, style, tuple(study.captions(key, "questions", method) for method in methods()))
        for name, label, style, methods in caption_methods(study, key)
        if name in wanted
    ]


def compute(study: Study, models: Sequence[str] | None = None) -> list[Record]:
    """Every record of notebook 03, of some models only if given."""
    keys = tuple(models or study.keys)
    found: list[Record] = [vtw_search(study, key) for key in keys]
    for key, role in study.each([(key, role) for key in keys for role in study.roles], "captions"):
        found += [cell for row in table_rows(study, key, role) for cell in row.cells]
    for key in study.each(keys, "questions and FastV without a cache"):
        found += [refreshed_fastv(study, key)] if key in refreshed_models(study) else []
        if study.on_scenes:
            found += [cell for row in question_rows(study, key) for cell in row.cells]
    from . import equal_budget, pruning_cost  # which build on this module

    found += equal_budget.compute(study, keys)
    return found + (pruning_cost.compute(study) if study.keys[0] in keys else [])


def row_by_key(rows: Sequence[Row], key: str) -> Row:
    """The row of that key. InputError where there is none."""
    for row in rows:
        if row.key == key:
            return row
    raise InputError(f"no row {key!r}: there are {', '.join(row.key for row in rows)}")


def quantities(study: Study) -> dict[str, Any]:
    """What claims C2, C3 and C10 are judged by."""
    from .benchmark_claims import quantities

    return quantities(study)
