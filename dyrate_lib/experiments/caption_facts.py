"""Notebook 03: what CIDEr hides. Captions of Table II's cells scored by n-grams and by facts, with intervals.

Every measure is a function of sums over pictures, so that one bootstrap over pictures gives the intervals of all of them and of
their paired differences to the unpruned model. Replies of several predictor seeds are averaged picture by picture first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..metrics_sums import bleu4, caption_sums
from ..scenes.facts import Facts, caption_facts, fact_sums
from ..stats import bootstrap_sums, ratio
from ..stats_tests import paired_p_value
from .benchmark_tables import cider
from .benchmarks import Row, remembered, table_rows
from .context import Record, Study
from .summaries import Quantity

FAMILIES = {"coco": "short", "nocaps": "short", "flickr30k": "narrative", "late": "late"}
FIELDS = [field.name for field in dataclasses.fields(Facts)]
FLIPS = 9999


@dataclass(frozen=True)
class Measure:
    """A measure of captions: its label, whether more is better, and the function of sums [.., k] that it is."""

    label: str
    better: int
    of: Callable[[np.ndarray], np.ndarray]


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100.0 * ratio(sums)


WORDS = {
    "cider": Measure("CIDEr", 1, ratio),
    "bleu4": Measure("BLEU-4", 1, bleu4),
    "rouge_l": Measure("ROUGE-L", 1, ratio),
}
FACTS = {
    "hallucination": Measure("hallucinated objects %", -1, _percent),
    "omission": Measure("omitted objects %", -1, _percent),
}
ATTRIBUTES = {
    "mistaken_color": Measure("wrong colour %", -1, _percent),
    "mistaken_shape": Measure("wrong shape %", -1, _percent),
    "size_error": Measure("wrong size %", -1, _percent),
    "position_error": Measure("wrong position %", -1, _percent),
    "ground_error": Measure("wrong background %", -1, _percent),
    "repetition": Measure("repeated objects %", -1, _percent),
}
MEASURES = {**WORDS, **FACTS, **ATTRIBUTES}


def models(study: Study) -> tuple[str, ...]:
    """The models of these tables: all where the truth of the pictures is known, else none."""
    return study.keys if study.on_scenes else ()


def scored(study: Study, cell: Record, role: str) -> dict[str, np.ndarray]:
    """What each picture's caption adds to the measures: bleu [n, 10] and rouge [n] of `caption_sums`, facts [n, `FIELDS`].

    Pictures are in the order of their ids. Kept in the store of scores, so Java is needed the first time only.
    """

    def fn() -> dict[str, Any]:
        said = {entry["id"]: entry["text"] for entry in cell["payload"]}
        data = study.dataset(role, len(said))
        truth = {item.id: item.meta["scene"] for item in data}
        found = [dataclasses.astuple(caption_facts(said[name], truth[name], FAMILIES[role])) for name in sorted(said)]
        return {**caption_sums(said, data.references()), "facts": found}

    payload = study.of_replies("caption_facts", cell, role, fn, family=FAMILIES[role], fields=FIELDS)["payload"]
    return {name: np.asarray(payload[name], dtype=np.float64) for name in ("bleu", "rouge", "facts")}


def sums(study: Study, row: Row, role: str, measure: str) -> np.ndarray:
    """[pictures, k] what each picture adds to a measure, averaged over the row's seeds; pictures in the order of their ids."""
    return remembered(study, ("caption sums", role, measure, id(row)), lambda: _sums(study, row, role, measure))


def _sums(study: Study, row: Row, role: str, measure: str) -> np.ndarray:
    if measure == "cider":
        values = cider(study, row, role)
        return np.stack([values, np.ones_like(values)], axis=1)
    if measure in WORDS:
        found = [scored(study, cell, role) for cell in row.cells]
        if measure == "bleu4":
            return np.mean([entry["bleu"] for entry in found], axis=0)
        values = np.mean([entry["rouge"] for entry in found], axis=0)
        return np.stack([values, np.ones_like(values)], axis=1)
    facts = [
        [Facts(*counts) for counts in scored(study, cell, role)["facts"].astype(int).tolist()] for cell in row.cells
    ]
    return np.mean([fact_sums(some, measure) for some in facts], axis=0)


# ----------------------------------------------------------------------------------------------------------- numbers


def drawn(study: Study, row: Row, role: str, measure: str) -> np.ndarray:
    """[1 + resamples] a measure of the set and of its resamples; the same pictures in each resample for every row."""

    def make() -> np.ndarray:
        table = sums(study, row, role, measure)
        resampled = bootstrap_sums(table, study.scale.bootstrap, study.seed)
        return MEASURES[measure].of(np.vstack([table.sum(axis=0), resampled]))

    return remembered(study, ("caption draws", role, measure, id(row)), make)


def with_interval(draws: np.ndarray, n: int) -> Quantity:
    """{mean, lo, hi, n} of a statistic followed by those of resamples; NaN for a rate of nothing.

    Resamples that have nothing to take the rate of are left out.
    """
    finite = draws[1:][np.isfinite(draws[1:])]
    if not np.isfinite(draws[0]) or not finite.size:
        return {"mean": float("nan"), "lo": float("nan"), "hi": float("nan"), "n": n}
    lo, hi = np.quantile(finite, [0.025, 0.975])
    return {"mean": float(draws[0]), "lo": float(lo), "hi": float(hi), "n": n}


def level(study: Study, row: Row, role: str, measure: str) -> Quantity:
    """A measure of one row with its interval."""
    return with_interval(drawn(study, row, role, measure), len(sums(study, row, role, measure)))


def change(study: Study, row: Row, base: Row, role: str, measure: str, relative: bool = False) -> Quantity:
    """A measure of `row` minus that of `base`, paired; relative: in % of that of `base`."""
    a, b = (drawn(study, r, role, measure) for r in (row, base))
    with np.errstate(divide="ignore", invalid="ignore"):
        return with_interval(100.0 * (a / b - 1) if relative else a - b, len(sums(study, row, role, measure)))


def p_value(study: Study, row: Row, base: Row, role: str, measure: str) -> float:
    """Of no difference between two rows, by exchanging their captions picture by picture; NaN for a rate of nothing."""
    a, b = (sums(study, r, role, measure) for r in (row, base))
    of = MEASURES[measure].of
    if not np.isfinite([of(a.sum(axis=0)), of(b.sum(axis=0))]).all():
        return float("nan")
    return paired_p_value(a, b, of, FLIPS, study.seed)


def rows(study: Study, key: str, role: str) -> list[Row]:
    """Table II's rows of one set, unpruned first."""
    return table_rows(study, key, role)
