"""How the budget is held in training: the squared penalty beside a Lagrangian. Budget error, quality, course of the ratio."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from ..methods import DyRate
from ..training_budget import CONSTRAINTS
from . import controls
from .context import Record, Study
from .controls_numbers import difference, scored
from .controls_training import Recipe, predictor, recipes, train
from .pieces import Piece
from .summaries import mean_with_interval, show_interval
from .training_runs import BUDGET, schedule_of

TARGETS = (0.5, 0.2)  # further targets, of the first seed, at full scale; on held-out pictures only


def wanted(study: Study) -> list[Recipe]:
    """The predictors compared: both constraints at the paper's budget with every seed, and at further targets with one."""
    further = TARGETS if study.scale.name == "full" else ()
    made = [recipe for kind in CONSTRAINTS for recipe in recipes(study, Recipe(constraint=kind))]
    return made + [Recipe(constraint=kind, target=target) for target in further for kind in CONSTRAINTS]


def held_out(study: Study, key: str, recipe: Recipe) -> Record:
    """What a predictor does on notebook 02's held-out mixture; payload as `training_runs.schedule`."""
    return schedule_of(study, key, DyRate(predictor(train(study, key, recipe))))


def pieces(study: Study, keys: Sequence[str]) -> list[Piece]:
    """Trainings, what they cost on held-out pictures, and the Lagrangian's replies (the penalty's are the controls')."""
    out = []
    for key in keys:
        for recipe in wanted(study):
            name = f"{key} train {recipe}"
            out.append(controls.training(study, key, recipe))
            out.append(Piece(f"{key} held out {recipe}", partial(held_out, study, key, recipe), (name,)))
        for role in controls.roles(study):
            for recipe in recipes(study, Recipe(constraint="lagrangian")):
                run = partial(controls.learned, study, key, role, recipe)
                out.append(Piece(f"{key} {role} lagrangian {recipe.seed}", run, (f"{key} train {recipe}",)))
    return out


def table(study: Study) -> pd.DataFrame:
    """Target and FLOPs reached on held-out pictures, the worst seed's error, and at the paper's budget quality on each set."""
    rows = []
    for key in controls.models(study):
        for kind in CONSTRAINTS:
            for target in dict.fromkeys(recipe.target for recipe in wanted(study)):
                made = [recipe for recipe in wanted(study) if (recipe.constraint, recipe.target) == (kind, target)]
                reached = [_ratios(held_out(study, key, recipe)) for recipe in made]
                error = [float(ratios.mean()) - target for ratios in reached]
                expected = [_tail(history(train(study, key, recipe)).flops_ratio) - target for recipe in made]
                rows.append(
                    {
                        "model": study.label(key), "constraint": kind, "asked, FLOPs %": 100 * target, "seeds": len(made),
                        "reached, FLOPs %": show_interval(
                            mean_with_interval(100 * np.mean(reached, axis=0), study.scale.bootstrap, study.seed), 2
                        ),
                        "error, points": 100 * float(np.mean(error)), "largest error": 100 * max(map(abs, error)),
                        "within 2 % of the target": sum(abs(e) <= 0.02 * target for e in error),
                        "error of the expectation at the end": 100 * float(np.mean(expected)),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def quality_table(study: Study) -> pd.DataFrame:
    """CIDEr of both constraints on each set, raw and carried to the penalty's cost; Lagrangian minus penalty."""
    rows = []
    for key in controls.models(study):
        for role in controls.roles(study):
            penalty, lagrangian = (
                scored(study, key, role, controls.constrained(study, key, role, kind)) for kind in CONSTRAINTS
            )
            rows.append(
                {
                    "model": study.label(key), "set": study.dataset(role, study.scale.n_controls).name,
                    "FLOPs %, penalty": 100 * penalty.cost, "FLOPs %, Lagrangian": 100 * lagrangian.cost,
                    "CIDEr, penalty": float(penalty.raw.mean()), "CIDEr, Lagrangian": float(lagrangian.raw.mean()),
                    "Lagrangian - penalty, as run": show_interval(difference(study, lagrangian.raw, penalty.raw), 2),
                    "at equal cost": show_interval(difference(study, lagrangian.equal, penalty.equal), 2),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def history(record: Record) -> pd.DataFrame:
    """The training curve, one row a step; `mu` is the Lagrangian's multiplier."""
    return pd.DataFrame(record["payload"]["history"])


def courses(study: Study) -> pd.DataFrame:
    """Every curve at the paper's budget: model, constraint, seed, step, flops_ratio (expected), hard_ratio, ce, and mu."""
    parts = []
    for key in controls.models(study):
        for kind in CONSTRAINTS:
            for recipe in recipes(study, Recipe(constraint=kind, target=BUDGET)):
                curve = history(train(study, key, recipe))
                parts.append(curve.assign(model=key, constraint=kind, seed=recipe.seed))
    return pd.concat(parts, ignore_index=True)


def line(study: Study) -> str:
    """How many predictors of each constraint meet their target within 2 % of it, on held-out pictures."""
    told = []
    for kind in CONSTRAINTS:
        made = [(key, r) for key in controls.models(study) for r in wanted(study) if r.constraint == kind]
        near = sum(abs(float(_ratios(held_out(study, key, r)).mean()) / r.target - 1) <= 0.02 for key, r in made)
        told.append(f"{kind} {near} of {len(made)}")
    return "targets met within 2 % on held-out pictures, without a search: " + ", ".join(told)


def _ratios(record: Record) -> np.ndarray:
    return np.array([row["flops"]["paper"] for row in record["payload"]])


def _tail(values: pd.Series) -> float:
    """Mean of the last tenth of the steps."""
    return float(values.tail(max(1, len(values) // 10)).mean())


