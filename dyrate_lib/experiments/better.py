"""Our own method at a quarter of the FLOPs, beside DyRate trained for it, and FastV's ranking at one rate of that cost.

The method is `MergeRate`, named apart from the paper's: what is dropped joins what stays, which then weighs as much as it stands
for. Its rate is a predictor's, or one constant rate that costs what is asked on each set, counted beforehand. Three rows tell
what does it: the same choice of tokens without the weights, FastV's choice with them, and `RelookRate`, whose dropped tokens may
come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from ..budgets import fit_budget
from ..methods import MergeRate, Method, RelookRate
from ..stats import mean_over_seeds
from ..stats_tests import equivalence
from . import controls
from .context import ROLE_LABELS, Record, Study
from .controls_numbers import cider, difference, relative
from .controls_training import Recipe, predictor, recipes, train
from .equal_budget import run_shape_of
from .pieces import Piece
from .summaries import percent, show_interval

QUARTER, MARGIN = 0.25, 0.02  # of the FLOPs; of CIDEr: the margin of equivalence in claims_beyond.yaml
LAYER = 1  # all rows of ours cut here: the layer below is enough to rank by, and each one that sees all costs 1/16 on scenes
MADE: dict[str, Method] = {  # at some rate; what is searched is the rate that costs what is asked
    "merge": MergeRate(rates=(0.5,), layer=LAYER),
    "unweighed": MergeRate(rates=(0.5,), layer=LAYER, weigh=False),
    "by attention": MergeRate(rates=(0.5,), layer=LAYER, rated_by="last", spread=0.0),
    "relook": RelookRate(rates=(0.5,), layer=LAYER, window=4, pool="max"),
}
ROWS = ("original", "fixed", "dyrate", "relook", "unweighed", "by attention", "merge", "merge, predictor")
BETTER = "merge"  # the row that C15 judges
LABELS = {
    "original": "Original", "fixed": "FastV (P = 2): one rate", "dyrate": "DyRate trained for 0.25",
    "relook": "RelookRate (ours), one rate", "unweighed": "MergeRate without weights",
    "by attention": "MergeRate, FastV's choice",
    "merge": "MergeRate (ours), one rate", "merge, predictor": "MergeRate (ours), attention shares",
}  # fmt: skip
STYLES = {"unweighed": "merge", "by attention": "merge", "merge, predictor": "merge"}  # whose colour a row has, where not its own


def roles(study: Study) -> tuple[str, ...]:
    """The sets of these rows: one a family, and with the short captions those of unseen pairs."""
    found = controls.roles(study)
    return (*found, "nocaps") if "coco" in found and "nocaps" in study.roles else found


def recipe(name: str) -> Recipe | None:
    """What the predictors of a row are trained with; None for rows without any."""
    if name == "dyrate":
        return Recipe(target=QUARTER)
    return Recipe(target=QUARTER, layer=LAYER) if name == "merge, predictor" else None


def better_method(study: Study, key: str, role: str, name: str = BETTER, seed: int = 0) -> Method:
    """A row of ours for a quarter of the FLOPs on a set, in the paper's convention: with a predictor, or at one rate."""
    trained = recipe(name)
    if trained is not None:
        return MergeRate(predictor(train(study, key, replace(trained, seed=seed))))
    shape = run_shape_of(controls.unpruned(study, key, role))
    return fit_budget(MADE[name], study.info(key), flops=QUARTER, convention="paper", **shape).method


def cells(study: Study, key: str, role: str, name: str) -> list[Record]:
    """A row's replies, one record a training seed where there is a predictor."""
    if name == "original":
        return [controls.unpruned(study, key, role)]
    if name == "fixed":
        return [controls.constant(study, key, role, QUARTER)]
    if name in MADE:
        return [controls.cell(study, key, role, better_method(study, key, role, name))]
    return [_trained(study, key, role, name, made.seed) for made in _seeds(study, name)]


def _seeds(study: Study, name: str) -> list[Recipe]:
    trained = recipe(name)
    assert trained is not None  # called for rows with a predictor only
    return recipes(study, trained)[: None if name == "dyrate" else 1]


def _trained(study: Study, key: str, role: str, name: str, seed: int) -> Record:
    if name == "dyrate":
        return controls.learned(study, key, role, Recipe(target=QUARTER, seed=seed))
    return controls.cell(study, key, role, better_method(study, key, role, name, seed))


def pieces(study: Study, keys: Sequence[str]) -> list[Piece]:
    """All records of the rows."""
    out = []
    for key in sorted(keys, key=lambda key: key != "base"):
        trained = {name: _seeds(study, name) for name in ROWS if recipe(name) is not None}
        out += [controls.training(study, key, made) for seeds in trained.values() for made in seeds]
        for role in roles(study):
            head = f"{key} {role}"
            out.append(Piece(f"{head} unpruned", partial(controls.unpruned, study, key, role)))
            for name in ("fixed", *MADE):
                out.append(Piece(f"{head} quarter {name}", partial(_only, study, key, role, name), (f"{head} unpruned",)))
            for name, seeds in trained.items():
                for made in seeds:
                    run = partial(_trained, study, key, role, name, made.seed)
                    out.append(Piece(f"{head} quarter {name} {made.seed}", run, (f"{key} train {made}",)))
    return out


def _only(study: Study, key: str, role: str, name: str) -> Record:
    return cells(study, key, role, name)[0]


def scores(study: Study, key: str, role: str, name: str) -> Any:
    """[pictures] CIDEr x 100 of a row, mean over seeds."""
    return mean_over_seeds([cider(study, record, role) for record in cells(study, key, role, name)])


def table(study: Study) -> pd.DataFrame:
    """Every row on every set: what it costs, CIDEr, and how it stands to the unpruned model and to DyRate."""
    rows = []
    for key in controls.models(study):
        for role in roles(study):
            original, dyrate = (scores(study, key, role, name) for name in ("original", "dyrate"))
            for name in ROWS:
                records, values = cells(study, key, role, name), scores(study, key, role, name)
                gain = relative(study, values, original)
                margin = MARGIN * float(original.mean())
                rows.append(
                    {
                        "model": study.label(key), "set": ROLE_LABELS[role] if study.on_scenes else study.dataset(role).name,
                        "method": LABELS[name], "seeds": len(records),
                        "FLOPs %": 100 * sum(map(controls.ratio, records)) / len(records),
                        "FLOPs %, cached": 100 * sum(controls.ratio(r, "cached") for r in records) / len(records),
                        "CIDEr": float(values.mean()),
                        "minus unpruned": show_interval(difference(study, values, original), 2),
                        "relative, %": None if gain is None else show_interval(percent(gain), 1),
                        "within 2 % of unpruned": _equivalent(study, values, original, margin) if name != "original" else "",
                        "minus DyRate": show_interval(difference(study, values, dyrate), 2) if name != "dyrate" else "",
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _equivalent(study: Study, values: Any, original: Any, margin: float) -> str:
    if margin <= 0:
        return "no scores to compare"
    found = equivalence(values, original, margin, study.scale.bootstrap, study.seed)
    return str(found).split("(90 %): ")[1].replace(f"{found.margin:g}", "2 %")


def quantities(study: Study) -> dict[str, Any]:
    """What claim C15 reads."""
    out: dict[str, Any] = {}
    for key in controls.models(study):
        for role in roles(study):
            head = f"c15.{key}.{role}"
            original, mine, dyrate = (scores(study, key, role, name) for name in ("original", BETTER, "dyrate"))
            records = cells(study, key, role, BETTER)
            out[f"{head}.flops_ratio"] = {"mean": sum(map(controls.ratio, records)) / len(records), "n": int(mine.size)}
            out[f"{head}.better_minus_original"] = difference(study, mine, original)
            gain = relative(study, mine, original)
            if gain is not None:
                out[f"{head}.better_gain"] = gain
            out[f"{head}.better_minus_dyrate"] = difference(study, mine, dyrate)
    return out
