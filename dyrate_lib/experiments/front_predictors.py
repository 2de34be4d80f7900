"""Predictors along budgets: what DyRate can reach, which targets are trained for, and how near training comes to them.

C5 itself is notebook 02's: it asks for the worst of the three seeds at Table II's targets, and most targets here have one seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..budgets import cost_ratio
from ..loading import SCENES
from ..methods import RatePath
from . import training_runs
from .benchmarks import remembered
from .context import Record, Study
from .equal_budget import models, run_shape
from .summaries import mean_with_interval, show_interval
from .training_tables import ratios

FAMILIES = ("coco", "flickr30k", "late")  # the roles of the caption families that predictors are trained on
NEAR = 0.01  # how far below its reach a target is still trained for, as `train_predictor` lets pass without a word
MET = 0.02  # of the budget: what counts as met


def reach(study: Study, key: str, role: str = "") -> tuple[float, float]:
    """The lowest and highest FLOPs ratio that DyRate's rates can give on a set, paper's convention.

    Lowest: the highest rate from the first step on, for this set's prompts and the unpruned model's mean reply length. The
    layers before the first cut read every image token, and a share of 1 / n_rates stays. No role: of what predictors are trained
    on, the three families of captions in turn.
    """
    families = FAMILIES if study.on_scenes else study.roles[:1]
    each = [_lowest(study, key, name) for name in ((role,) if role else families)]
    return float(np.mean(each)), 1.0


def _lowest(study: Study, key: str, role: str) -> float:
    def search() -> float:
        most = (training_runs.N_RATES - 1) / training_runs.N_RATES
        run = run_shape(study, key, role)
        return cost_ratio(
            RatePath(training_runs.LAYER, (most,)), study.info(key), prompt_length=run["prompt_length"], steps=run["steps"],
            n_image=run["n_image"],
        )  # fmt: skip

    return remembered(study, ("reach", key, role), search)


def targets(study: Study, key: str) -> tuple[float, ...]:
    """The targets that predictors of a model are trained for along the fronts: those in reach, and those of Table II anyway."""
    lowest = reach(study, key)[0]
    return tuple(t for t in study.scale.front_targets if t in study.scale.targets or t >= lowest - NEAR)


def seeds(study: Study, target: float) -> tuple[int, ...]:
    """The seeds of a target: Table II's are trained with each, the others with the first."""
    return study.scale.predictor_seeds if target in study.scale.targets else study.scale.predictor_seeds[:1]


def wanted(study: Study, models_asked: Sequence[str] | None = None) -> list[tuple[str, float, int]]:
    """(model, target, seed) of all predictors of the fronts: what notebook 02 has to train at full scale."""
    keys = models(study) if models_asked is None else models_asked
    return [(key, target, seed) for key in keys for target in targets(study, key) for seed in seeds(study, target)]


def ensure(study: Study, key: str, target: float, seed: int) -> list[Record]:
    """Trains a predictor that this study has to make and has not yet; returns its training record, [] for a shipped one.

    Raises:
        ResourceError: a shipped one is missing.
    """
    shipped = study.model_name(key) in SCENES
    own = (study.records == "fresh" and study.scale.name == "full") or not shipped
    if own and not (study.out / "predictors" / study.predictor_file(key, target, seed)).is_file():
        record = training_runs.train(study, key, target, seed)
        training_runs.save_predictors(study, {(key, target, seed): record})
        return [record]
    study.predictor_path(key, target, seed)
    return []


def schedule(study: Study, key: str, target: float, seed: int) -> Record:
    """What a predictor does on held-out pictures, made sure of that it is there."""
    ensure(study, key, target, seed)
    return training_runs.schedule(study, key, target, seed)


# --------------------------------------------------------------------------------------------------- budgets met


def budget_table(study: Study) -> pd.DataFrame:
    """Every budget asked for: the FLOPs ratio that training reached on held-out pictures, and its error, without any search.

    error %: of the budget. met: within 2 % of it. A budget out of reach says from where on there is one.
    """
    rows = []
    for key in models(study):
        lowest, highest = reach(study, key)
        there = targets(study, key)
        for target in sorted(study.scale.front_targets):
            out_of_reach = f"out of reach: from {100 * lowest:.1f} to {100 * highest:.0f} %" if target < lowest else ""
            for seed in seeds(study, target) if target in there else ():
                found = mean_with_interval(
                    ratios(schedule(study, key, target, seed)), study.scale.bootstrap, study.seed
                )
                error = found["mean"] / target - 1
                shown = show_interval({name: 100 * found[name] for name in ("mean", "lo", "hi")}, 1)
                rows.append(
                    {"model": study.label(key), "asked %": round(100 * target, 6), "seed": seed, "reached % [95%]": shown,
                     "error, points": 100 * (found["mean"] - target), "error %": 100 * error,
                     "met to 2 %": "yes" if abs(error) <= MET else out_of_reach or "no", "n": found["n"]}
                )  # fmt: skip
            if target not in there:
                nothing = float("nan")
                rows.append(
                    {"model": study.label(key), "asked %": round(100 * target, 6), "seed": None, "reached % [95%]": "not trained",
                     "error, points": nothing, "error %": nothing, "met to 2 %": out_of_reach, "n": 0}
                )  # fmt: skip
    return pd.DataFrame(rows)


def budget_findings(study: Study) -> str:
    """One stable line a model: how many predictors meet their budget, and the worst of the others that are in reach."""
    table, lines = budget_table(study), []
    for key in models(study):
        lowest = 100 * reach(study, key)[0]
        some = table[(table.model == study.label(key)) & table["error %"].notna()]
        there = some[some["asked %"] >= lowest]
        worst = there.loc[there["error %"].abs().idxmax()]
        out = sorted(
            {f"{t:g}" for t in table[(table.model == study.label(key)) & (table["asked %"] < lowest)]["asked %"]}
        )
        lines.append(
            f"{study.label(key)}: {(there['met to 2 %'] == 'yes').sum()} of {len(there)} predictors meet their budget to 2 %; "
            f"the worst is off by {worst['error %']:+.1f} %, asked for {worst['asked %']:g} %. Out of reach, which begins at "
            f"{lowest:.1f} %: {', '.join(out) or 'none'}"
        )
    return "\n".join(lines)
