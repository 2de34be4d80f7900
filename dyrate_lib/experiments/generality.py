"""Do the conclusions hold elsewhere? The same numbers with other numbers of rates, another P, other scenes, at both sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from . import controls
from .attention import FAMILIES
from .benchmarks import remembered
from .context import Record, Study
from .controls_needs import follow, following, named, named_courses
from .controls_numbers import cider, difference, fed, relative
from .controls_training import Recipe
from .pieces import Piece
from .summaries import Quantity

HOLDS, NOT, OPEN = "holds", "does not", "undecided"
MIN_N = 500  # pictures that a verdict must rest on, as in claims_beyond.yaml
HALF = 0.5  # of the FLOPs: with P = 4 or five rates a third is out of reach (notebook 05)
FIRST = "as above"


@dataclass(frozen=True)
class Condition:
    """What is changed against the tables of the controls: the recipe, or the scenes (those of another seed)."""

    recipe: Recipe
    elsewhere: bool = False


# the first stands for the controls' own cells, three seeds; all others are of one seed
CONDITIONS: dict[str, Condition] = {
    FIRST: Condition(Recipe()),
    "other scenes": Condition(Recipe(), elsewhere=True),
    "half of the FLOPs": Condition(Recipe(target=HALF)),
    "5 rates": Condition(Recipe(target=HALF, n_rates=5)),
    "10 rates": Condition(Recipe(target=HALF, n_rates=10)),
    "P = 1": Condition(Recipe(target=HALF, layer=1)),
    "P = 3": Condition(Recipe(target=HALF, layer=3)),
    "P = 4": Condition(Recipe(target=HALF, layer=4)),
}
# conclusion -> (what is measured, threshold, whether it must lie above it)
CONCLUSIONS: dict[str, tuple[str, float, bool]] = {
    "better than one rate of the same cost": ("minus_constant", 0.0, True),
    "loses at most 2 % of CIDEr": ("gain", -0.02, True),
    "names lower rates where the image is needed": ("rate_need", 0.0, False),
    "also at the same step": ("rate_need_given_step", 0.0, False),
}


def conditions(study: Study) -> tuple[str, ...]:
    """The conditions of the scale, with what they are compared with: half of the FLOPs for those that were trained for it."""
    asked = [name for name in CONDITIONS if name in study.scale.conditions]
    halves = any(CONDITIONS[name].recipe.target == HALF for name in asked)
    return tuple(name for name in CONDITIONS if name in asked or name == FIRST or (halves and name == "half of the FLOPs"))


def place(study: Study, condition: Condition) -> Study:
    """The study itself, or the same one on other scenes."""
    if not condition.elsewhere:
        return study

    def other() -> Study:
        return dataclasses.replace(study, seed=study.seed + 1, _datasets={}, _ids={})

    return remembered(study, ("other scenes",), other)


def pair(study: Study, key: str, role: str, condition: Condition) -> tuple[Record, Record]:
    """Replies under the predictor of a condition, and under one constant rate that costs the same; both from its P on."""
    mine = controls.learned(study, key, role, condition.recipe)
    return mine, controls.constant(study, key, role, controls.ratio(mine), condition.recipe.layer)


def _constant(study: Study, key: str, role: str, condition: Condition) -> Record:
    return pair(study, key, role, condition)[1]


def pieces(study: Study, keys: Sequence[str]) -> list[Piece]:
    """Trainings and replies of every condition but the first."""
    out = []
    for name in conditions(study)[1:]:
        condition = CONDITIONS[name]
        there, recipe = place(study, condition), condition.recipe
        before = "other scenes: " if condition.elsewhere else ""  # pieces of the study itself have the names of `controls.pieces`
        for key in sorted(keys, key=lambda key: key != "base"):
            trained = f"{before}{key} train {recipe}"
            out.append(Piece(trained, controls.training(there, key, recipe).run))
            for role in controls.roles(there):
                unpruned, head = f"{before}{key} {role} unpruned", f"{key} {role}, {name}:"
                out += [
                    Piece(unpruned, partial(controls.unpruned, there, key, role)),
                    Piece(f"{head} shares", partial(controls.learned, there, key, role, recipe), (trained,)),
                    Piece(f"{head} constant", partial(_constant, there, key, role, condition), (unpruned, f"{head} shares")),
                ]
                if study.on_scenes:
                    out.append(Piece(f"{head} named", partial(named, there, key, role, recipe), (f"{head} shares",)))
    return out


# --------------------------------------------------------------------------------------------------------- numbers


def measured(study: Study, key: str, role: str, name: str) -> dict[str, Any]:
    """minus_constant, gain (against unpruned, relative) and the rank correlations of a condition; flops, the mean ratio."""
    condition = CONDITIONS[name]
    there = place(study, condition)
    if name == FIRST:
        shares, none = fed(study, key, role, "shares"), fed(study, key, role, "none")
        mine, constant, cost, follows = shares.equal, none.equal, shares.cost, following(study, key, role, "shares")
    else:
        cells = pair(there, key, role, condition)
        mine, constant = (cider(there, record, role) for record in cells)
        cost = controls.ratio(cells[0])
        courses = named_courses(there, key, role, condition.recipe) if study.on_scenes else None
        follows = follow(there, role, [(cells[0], courses)]) if study.on_scenes else {}
    original = cider(there, controls.unpruned(there, key, role), role)
    gain = relative(study, mine, original)
    found = {"minus_constant": difference(study, mine, constant), "flops": cost, **follows}
    return found if gain is None else {**found, "gain": gain}


def outcome(quantity: Mapping[str, float] | None, threshold: float, above: bool) -> str:
    """Whether a conclusion holds: its whole interval lies on the right side of the threshold, or on the wrong one, or neither.

    Without a quantity, or with fewer than `MIN_N` pictures behind it, nothing is decided.
    """
    if quantity is None or quantity["n"] < MIN_N:
        return OPEN
    below, beyond = quantity["hi"] < threshold, quantity["lo"] > threshold
    right, wrong = (beyond, below) if above else (below, beyond)
    return HOLDS if right else NOT if wrong else OPEN


def data(study: Study) -> pd.DataFrame:
    """One row for each conclusion, set, model and condition: outcome, mean, lo, hi, n and FLOPs."""
    rows = []
    for key in controls.models(study):
        for role in controls.roles(study):
            for name in conditions(study):
                found = remembered(study, ("measured", key, role, name), partial(measured, study, key, role, name))
                for conclusion, (what, threshold, above) in CONCLUSIONS.items():
                    value: Quantity | None = found.get(what)
                    rows.append(
                        {
                            "conclusion": conclusion, "set": FAMILIES[role] if study.on_scenes else role, "model": key,
                            "condition": name, "outcome": outcome(value, threshold, above),
                            **(value or dict.fromkeys(("mean", "lo", "hi"), float("nan"))), "flops": found["flops"],
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def table(study: Study) -> pd.DataFrame:
    """Conclusion, set and size by condition: outcome and estimate; a star where the outcome is not that of the first column."""
    long, rows = data(study), []
    for (conclusion, family, model), part in long.groupby(["conclusion", "set", "model"], sort=False):
        by = part.set_index("condition")
        row: dict[str, Any] = {"DyRate ...": conclusion, "captions": family, "model": model}
        for name in conditions(study):
            entry = by.loc[name]
            mark = "" if entry.outcome == by.loc[FIRST].outcome else " *"
            shown = "" if pd.isna(entry["mean"]) else f" ({_shown(conclusion, entry['mean'])})"
            row[name] = f"{entry.outcome}{mark}{shown}"
        rows.append(row)
    order = {name: i for i, name in enumerate((*CONCLUSIONS, *dict.fromkeys(long["set"]), *dict.fromkeys(long.model)))}
    return pd.DataFrame(sorted(rows, key=lambda row: [order[row[name]] for name in ("DyRate ...", "captions", "model")]))


def _shown(conclusion: str, value: float) -> str:
    what = CONCLUSIONS[conclusion][0]
    return f"{value:+.1%}" if what == "gain" else f"{value:+.1f}" if what == "minus_constant" else f"{value:+.2f}"


def line(study: Study) -> str:
    """How often each conclusion holds, does not, or stays undecided, over all sets, sizes and conditions."""
    long = data(study)
    told = []
    for conclusion in CONCLUSIONS:
        found = long[long.conclusion == conclusion].outcome.value_counts()
        told.append(f"{conclusion}: " + ", ".join(f"{found.get(kind, 0)} {kind}" for kind in (HOLDS, NOT, OPEN)))
    return "\n".join(told)
