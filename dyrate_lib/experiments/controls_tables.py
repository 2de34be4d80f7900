"""The controls' tables: scores at equal cost, what follows the need, whether dropping may be final, what there is to see."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..plotting import INPUTS as INPUT_STYLES
from . import controls
from .benchmarks import remembered
from .context import ROLE_LABELS, Study
from .controls_needs import following, middle_shares, more_to_see, planned_cost, scenes
from .controls_numbers import (
    FINALITY_ROLES,
    SEEN_ROLES,
    adjusted,
    cells,
    changed,
    cost_gap,
    difference,
    fed,
    point_of_flops,
    relative,
    share_of_gap,
)
from .generality import HOLDS, NOT, OPEN, outcome
from .summaries import mean_with_interval, percent, show_interval

VARIANT_LABELS = {
    "final": "final, ranked once (the paper's)", "reversible": "reversible, ranked once",
    "reranked": "reversible, ranked at each step",
}  # fmt: skip


def label(fed_with: str) -> str:
    """What a control is fed with, for a table."""
    return INPUT_STYLES[fed_with][0]


def place(study: Study, role: str) -> str:
    """A set's name for a table."""
    return ROLE_LABELS[role] if study.on_scenes else study.dataset(role).name


def p_values(study: Study) -> dict[tuple, float]:
    """Holm-adjusted p-values of shares minus each control at equal cost, one family over all sets and models."""

    def made() -> dict[tuple, float]:
        others = [kind for kind in controls.inputs(study) if kind != "shares"]
        pairs = {
            (key, role, kind): (fed(study, key, role, "shares").equal, fed(study, key, role, kind).equal)
            for key, role in cells(study)
            for kind in others
        }
        return adjusted(study, pairs)

    return remembered(study, ("p-values",), made)


def control_table(study: Study) -> pd.DataFrame:
    """One row for each model, set and control: cost, CIDEr, and how the shares stand to it, as run and at equal cost."""
    rows, adjusted_p = [], p_values(study)
    for key, role in cells(study):
        shares = fed(study, key, role, "shares")
        for kind in controls.inputs(study):
            row = fed(study, key, role, kind)
            told = planned_cost(study, key, role, kind)
            first = kind == "shares"
            rows.append(
                {
                    "model": study.label(key), "set": place(study, role), "fed with": label(kind), "seeds": len(row.costs),
                    "FLOPs % as trained": 100 * (row.cost if told is None else told),
                    "FLOPs % compared": 100 * row.cost, "cached": 100 * row.cached,
                    "CIDEr": float(row.raw.mean()), "at equal cost": float(row.equal.mean()),
                    "shares minus it, as run": "" if first else show_interval(difference(study, shares.raw, row.raw), 1),
                    "at equal cost [95 %]": "" if first else show_interval(difference(study, shares.equal, row.equal), 1),
                    "p (Holm)": None if first else adjusted_p[key, role, kind],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def gap_table(study: Study) -> pd.DataFrame:
    """What knowing the need gains over a constant, how much of it the shares recover, and what costs leave open."""
    rows = []
    for key, role in cells(study) if "oracle" in controls.inputs(study) else []:
        oracle, none = (fed(study, key, role, kind).equal for kind in ("oracle", "none"))
        others = [kind for kind in ("step", "none", "foreign", "oracle")]
        rows.append(
            {
                "model": study.label(key), "set": place(study, role),
                "oracle minus constant": show_interval(difference(study, oracle, none), 1),
                "share of it that attention recovers": show_interval(share_of_gap(study, key, role), 2),
                "largest gap in FLOPs, points": 100 * cost_gap(study, key, role, others),
                "CIDEr a point of FLOPs": point_of_flops(study, key, role),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def answer_line(study: Study) -> str:
    """Stable lines: over sets and models, how often the shares are better than each control, worse, or neither, at equal cost."""
    told = []
    for kind in controls.inputs(study)[1:]:
        found = [difference(study, fed(study, k, r, "shares").equal, fed(study, k, r, kind).equal) for k, r in cells(study)]
        verdicts = [outcome(value, 0.0, True) for value in found]
        better, worse, left = (verdicts.count(kind) for kind in (HOLDS, NOT, OPEN))
        told.append(f"attention shares against {label(kind)}: better {better}, worse {worse}, open {left} of {len(found)}")
    return "\n".join(told)


def need_table(study: Study) -> pd.DataFrame:
    """Rank correlations of each control's rate with the need over a reply, mean over pictures; empty without scenes."""
    names = {
        "rate_need": "named rate and need", "rate_need_given_step": "given the step", "rate_step": "named rate and step",
        "in_force_need": "removed share and need",
    }  # fmt: skip
    rows = []
    for key, role in cells(study) if study.on_scenes else []:
        for kind in controls.inputs(study):
            found = following(study, key, role, kind)
            shown = {title: show_interval(found[name], 2) if name in found else None for name, title in names.items()}
            rows.append({"model": study.label(key), "set": place(study, role), "fed with": label(kind), **shown})
    return pd.DataFrame(rows)


def finality_table(study: Study) -> pd.DataFrame:
    """Final, reversible and ranked anew: cost in both conventions, CIDEr, and the paper's variant against the others."""
    rows = []
    for key, role in cells(study):
        final = changed(study, key, role, "final")
        for name in controls.VARIANTS:
            row = changed(study, key, role, name)
            gain = None if name == "final" else relative(study, final.equal, row.equal)
            rows.append(
                {
                    "model": study.label(key), "set": place(study, role), "dropping": VARIANT_LABELS[name],
                    "seeds": len(row.costs),
                    "FLOPs %": 100 * row.cost, "FLOPs %, cached": 100 * row.cached, "CIDEr": float(row.raw.mean()),
                    "final minus it, as run": show_interval(difference(study, final.raw, row.raw), 1) if name != "final" else "",
                    "at equal cost": show_interval(difference(study, final.equal, row.equal), 1) if name != "final" else "",
                    "relative, %": None if gain is None else show_interval(percent(gain), 1),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def finality_line(study: Study) -> str:
    """One stable line: where final dropping loses more than 5 % against each other variant, models and longer captions."""
    told = []
    for name in controls.VARIANTS[1:]:
        pairs = [(key, role) for key, role in cells(study) if role in FINALITY_ROLES]
        found = [relative(study, changed(study, k, r, "final").equal, changed(study, k, r, name).equal) for k, r in pairs]
        verdicts = [outcome(value, -0.05, True) for value in found]
        no, yes, left = (verdicts.count(kind) for kind in (HOLDS, NOT, OPEN))
        told.append(f"{name}: no in {no}, yes in {yes}, open in {left}")
    return "does final dropping cost more than 5 % of CIDEr against dropping that is " + "; ".join(told)


def seen_table(study: Study) -> pd.DataFrame:
    """Rank correlation over pictures of the share removed at mid-reply with objects and clutter; empty without scenes."""
    rows = []
    for key, role in cells(study) if study.on_scenes else []:
        found = more_to_see(study, key, role)
        rows.append(
            {
                "model": study.label(key), "set": place(study, role), "pictures": found["removed_objects"]["n"],
                "removed and objects": show_interval(found["removed_objects"], 3),
                "removed and clutter": show_interval(found["removed_clutter"], 3),
                "given the objects": show_interval(found["removed_clutter_given_objects"], 3),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def seen_data(study: Study) -> pd.DataFrame:
    """Share removed at mid-reply by number of objects and by quarter of clutter: mean with interval, and pictures."""
    rows: list[dict[str, Any]] = []
    for key, role in cells(study) if study.on_scenes else []:
        if role not in SEEN_ROLES and any(known in controls.roles(study) for known in SEEN_ROLES):
            continue
        seen, removed = scenes(study, role)["payload"], middle_shares(study, key, role)
        clutter = np.array([row["clutter"] for row in seen])
        quarter = np.searchsorted(np.quantile(clutter, [0.25, 0.5, 0.75]), clutter, side="right") + 1
        for by, groups in (("objects", np.array([row["objects"] for row in seen])), ("clutter, quarter", quarter)):
            for group in np.unique(groups):
                found = mean_with_interval(removed[groups == group], study.scale.bootstrap, study.seed)
                rows.append({"model": key, "role": role, "by": by, "group": int(group), **found})
    return pd.DataFrame(rows)
