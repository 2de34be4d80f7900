"""Do the conclusions hold elsewhere? What `generality` recorded, for notebook 07: conclusion by condition, and what changes.

The experiment is the controls' (second world seed, both sizes, number of rates, P); here its records are only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from ..errors import ResourceError
from .context import Study
from .reading import part, reader

EXPERIMENT = "generality"
COLUMNS = ("conclusion", "set", "model", "condition", "outcome", "mean", "lo", "hi", "n", "flops")
# what a conclusion measures -> the claim that it belongs to
CLAIMS = {"minus_constant": "C11", "gain": "C3", "rate_need": "C12", "rate_need_given_step": "C12"}
NOT_THERE = "*The conclusions under other conditions were not measured: {why}*"


def conditions(study: Study) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """(long, wide, why not): a row for each conclusion, set, model and condition; the same as a table; '' or why none is."""
    experiment = part(EXPERIMENT)
    empty = pd.DataFrame(columns=list(COLUMNS))
    if experiment is None:
        return empty, empty, NOT_THERE.format(why="this version has no such experiment.")
    with TemporaryDirectory() as folder:
        there = reader(study, Path(folder))
        try:
            return experiment.data(there), experiment.table(there), ""
        except ResourceError as error:
            return empty, empty, NOT_THERE.format(why=f"{str(error).partition(' in ')[0]}.")  # no folder's name: those differ


def claim_of(conclusion: str) -> str:
    """The claim that a conclusion of the experiment bears on; '' where none of those known here."""
    experiment = part(EXPERIMENT)
    measured = experiment.CONCLUSIONS[conclusion][0] if experiment is not None else ""
    return CLAIMS.get(measured, "")


def changes(long: pd.DataFrame, conclusions: Sequence[str]) -> str:
    """Where conclusions come out otherwise than in the tables of the controls (the first condition): one line, '' without rows.

    Undecided is not counted as a change: there the interval lies on both sides, or rests on too few pictures.
    """
    rows = long[long.conclusion.isin(conclusions)] if len(long) else long
    if not len(rows):
        return ""
    first = rows.condition.iloc[0]
    told, asked = [], 0
    for (conclusion, family, model), group in rows.groupby(["conclusion", "set", "model"], sort=False):
        by = group.set_index("condition").outcome
        asked += len(by) - 1
        for name, outcome in by.items():
            if "undecided" not in (outcome, by[first]) and outcome != by[first]:
                told.append(f"'{conclusion}' {by[first]} on {family} ({model}), but {outcome} under {name}")
    if not told:
        return f"in none of {asked} cells under other conditions does the conclusion turn round"
    return f"the conclusion turns round in {len(told)} of {asked} cells under other conditions: {'; '.join(told)}"
