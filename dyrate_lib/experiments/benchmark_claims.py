"""Notebook 03: what C2, C3 and C10 are judged by, and what is found set by set."""

from __future__ import annotations

from typing import Any

import numpy as np

from .benchmark_tables import answers, cider, per_picture, relative
from .benchmarks import ROLE_COLUMNS, question_rows, row_by_key, table_rows
from .context import ROLE_LABELS, Study
from .summaries import Quantity, difference_with_interval, mean_with_interval


def quantities(study: Study) -> dict[str, Any]:
    """c2.*, c3.* and c10.* as claims.yaml names them."""
    out: dict[str, Any] = {}
    for key in study.keys:
        for role in study.roles:
            if role in ROLE_COLUMNS:
                out.update(_caption_quantities(study, key, role))
        if study.on_scenes:
            out.update(_question_quantities(study, key))
    return {name: value for name, value in out.items() if np.isfinite(value["mean"])}


def _caption_quantities(study: Study, key: str, role: str) -> dict[str, Any]:
    rows, options = table_rows(study, key, role), (study.scale.bootstrap, study.seed)
    each = {name: cider(study, row_by_key(rows, name), role) for name in ("original", "fastv-2", "vtw", "dyrate")}
    out = {
        f"c2.{key}.{role}.fastv2_loss": _negated(relative(study, each["fastv-2"], each["original"])),
        f"c2.{key}.{role}.fastv2_minus_vtw": difference_with_interval(each["fastv-2"], each["vtw"], *options),
        f"c3.{key}.{role}.dyrate_minus_original": difference_with_interval(each["dyrate"], each["original"], *options),
        f"c3.{key}.{role}.dyrate_gain": relative(study, each["dyrate"], each["original"]),
    }
    if role == "coco":
        out[f"c2.{key}.coco.vtw_loss"] = _negated(relative(study, each["vtw"], each["original"]))
        out[f"c3.{key}.coco.flops_ratio"] = mean_with_interval(
            per_picture(row_by_key(rows, "dyrate"), "flops", "paper"), *options
        )
        matched = cider(study, row_by_key(rows, "random-matched"), role)
        out[f"c3.{key}.coco.dyrate_minus_random"] = difference_with_interval(each["dyrate"], matched, *options)
    return out


def _negated(quantity: Quantity) -> Quantity:
    out = {**quantity, "mean": -quantity["mean"]}
    if "lo" in quantity:
        out |= {"lo": -quantity["hi"], "hi": -quantity["lo"]}
    return out


def _question_quantities(study: Study, key: str) -> dict[str, Any]:
    rows, options = question_rows(study, key), (study.scale.bootstrap, study.seed)
    points = {name: answers(study, row_by_key(rows, name))[0] for name in ("original", "fastv-2", "dyrate")}
    kinds = np.array(answers(study, row_by_key(rows, "original"))[1])
    out = {
        f"c10.{key}.accuracy_drop": difference_with_interval(points["original"], points["dyrate"], *options),
        f"c10.{key}.dyrate_minus_fastv2": difference_with_interval(points["dyrate"], points["fastv-2"], *options),
    }
    for kind in dict.fromkeys(kinds.tolist()):
        some = kinds == kind
        out[f"c10.{key}.{kind}.accuracy_drop"] = difference_with_interval(
            points["original"][some], points["dyrate"][some], *options
        )
    return out


def findings(study: Study) -> str:
    """Stable lines: which methods' intervals stay at the unpruned model, set by set."""
    lines = []
    for key in study.keys:
        for role in study.roles:
            rows = table_rows(study, key, role)
            base = cider(study, row_by_key(rows, "original"), role)
            even: list[str] = []
            below: list[str] = []
            above: list[str] = []
            for row in rows[1:]:
                gap = difference_with_interval(cider(study, row, role), base, study.scale.bootstrap, study.seed)
                (below if gap["hi"] < 0 else above if gap["lo"] > 0 else even).append(row.label)
            named = [
                f"{word}: {', '.join(names)}"
                for word, names in (("above", above), ("even", even), ("below", below))
                if names
            ]
            lines.append(f"{study.label(key)}, {ROLE_LABELS.get(role, role)}, against unpruned: {'; '.join(named)}")
    return "\n".join(lines)
