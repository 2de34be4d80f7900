"""Notebook 03, Table I on scenes as tables: the paper's form, the paper's rows beside ours, details by category."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..compare import load_paper
from .benchmark_tables import PAPER_MODELS
from .context import Study
from .roles import TABLE1
from .short_answer_scores import ALPHA, cells, mean_retained, scores
from .short_answers import models, rows, tasks, unreached
from .summaries import show_interval

MARK = "*"  # p < 0.05 after Holm's correction
# row of the paper's Table I -> our row; the paper prints no settings there
RUN_HERE = {
    "LLaVAv1.5": "original", "FastV": "fastv-2", "VTW": "vtw", "PruMerge": "equal:prumerge", "SparseVLM": "equal:sparsevlm",
    "VisionZip": "equal:visionzip", "DyRate(ours)": "dyrate",
}  # fmt: skip
MME_MOST = 2000.0  # of MME's perception part, which Table I prints
OTHER_MME = ("SparseVLM", "VisionZip")  # whose printed MME is no perception score (see notebook 07)


def _by_row(study: Study, key: str) -> dict[str, dict[str, Any]]:
    """Of each row key: its label and, by task, its line of `cells`; rows in the tasks' order."""
    table, found = cells(study), dict[str, dict[str, Any]]()
    for _, line in table[table.model == study.label(key)].iterrows() if len(table) else ():
        found.setdefault(line["key"], {"method": line["method"]})[line["task"]] = line
    return found


def table1(study: Study) -> pd.DataFrame:
    """Table I's form: one line a method and model, the headline score of each task with its 95 % interval.

    A star marks a score that differs from the unpruned model's after Holm's correction. Then the mean share of the unpruned
    score, and the FLOPs really spent, means over the tasks.
    """
    out = []
    for key in models(study):
        for name, found in _by_row(study, key).items():
            line: dict[str, Any] = {"model": study.label(key), "method": found["method"]}
            here = [found[task] for task in tasks(study) if task in found]
            for task in tasks(study):
                line[TABLE1[task][1]] = _score(found[task]) if task in found else ""
            middle, lo, hi = mean_retained(study, key, name)
            kept = show_interval({"mean": middle, "lo": lo, "hi": hi}, 1) if np.isfinite(middle) else ""
            line["retained, mean % [95%]"] = kept
            for convention in ("paper", "cached"):
                column = f"FLOPs % ({convention})"
                line[column] = sum(entry[column] for entry in here) / len(here)
            out.append(line | {"n": min(entry["n"] for entry in here), "seeds": max(entry["seeds"] for entry in here)})
    return pd.DataFrame(out)


def _score(line: Any) -> str:
    digits = 0 if line["task"] == "mme" else 1
    shown = show_interval({"mean": line["score"], "lo": line["lo"], "hi": line["hi"]}, digits)
    return shown + (MARK if line["p Holm"] < ALPHA else "")


def change_table(study: Study) -> pd.DataFrame:
    """Differences to the unpruned model, points of 100, paired, with intervals; a star as in `table1`."""
    out = []
    for key in models(study):
        for name, found in _by_row(study, key).items():
            if name != "original":
                line = {"model": study.label(key), "method": found["method"]}
                out.append(line | {TABLE1[t][1]: _change(found[t]) if t in found else "" for t in tasks(study)})
    return pd.DataFrame(out)


def _change(line: Any) -> str:
    shown = f"{line['change']:+.1f} [{line['change lo']:+.1f}, {line['change hi']:+.1f}]"
    return shown + (MARK if line["p Holm"] < ALPHA else "")


def cost_table(study: Study) -> pd.DataFrame:
    """The FLOPs really spent on each task, % of the unpruned model's: paper's convention / with a KV cache."""
    out = []
    for key in models(study):
        for found in _by_row(study, key).values():
            line = {"model": study.label(key), "method": found["method"]}
            for task in tasks(study):
                spent = [found[task][f"FLOPs % ({c})"] for c in ("paper", "cached")] if task in found else []
                line[TABLE1[task][1]] = " / ".join(f"{value:.1f}" for value in spent)
            out.append(line)
    return pd.DataFrame(out)


def unreached_table(study: Study) -> pd.DataFrame:
    """Rivals without a setting for the budget on a task, and what their settings reach."""
    return pd.DataFrame(unreached(study), columns=["model", "task", "method", "from %", "to %"])


# ------------------------------------------------------------------------------------------------ the paper's own rows


def beside_paper(study: Study) -> pd.DataFrame:
    """The paper's Table I as printed, each row of a system that runs here followed by ours on scenes; others are quoted.

    MME is in points, of 2000 in the paper and of 200 a category here.
    """
    printed, columns, out = load_paper("table1"), [column for column, _ in TABLE1.values()], []
    for _, row in printed.iterrows():
        ours = RUN_HERE.get(str(row["model"]))
        line = {"system": row["model"], "source": "quoted" if ours is None else "paper, LLaVA-1.5-7B on the benchmark"}
        out.append(line | dict(zip(_names(), row[columns].tolist(), strict=True)))
        for key in models(study) if ours else ():
            found = _by_row(study, key).get(str(ours))
            if found:
                line = {"system": found["method"], "source": f"ours, {study.label(key)}"}
                out.append(
                    line | {TABLE1[t][1]: found[t]["score"] if t in found else float("nan") for t in tasks(study)}
                )
    return pd.DataFrame(out)


def _names() -> list[str]:
    return [name for _, name in TABLE1.values()]


def changes_beside_paper(study: Study) -> pd.DataFrame:
    """What each method changes against its own unpruned model, points of 100: the paper's rows, and ours below each."""
    printed = load_paper("table1").set_index("model")
    columns, out = [column for column, _ in TABLE1.values()], []
    for system, ours in RUN_HERE.items():
        if ours == "original":
            continue
        change = printed.loc[system, columns].astype(float) - printed.loc["LLaVAv1.5", columns].astype(float)
        change["mme"] = float("nan") if system in OTHER_MME else 100 * change["mme"] / MME_MOST
        line = {"system": system, "source": f"paper, {PAPER_MODELS['small']}"}
        out.append(line | dict(zip(_names(), change.tolist(), strict=True)))
        for key in models(study):
            found = _by_row(study, key).get(ours)
            if found:
                line = {"system": found["method"], "source": f"ours, {study.label(key)}"}
                out.append(
                    line | {TABLE1[t][1]: found[t]["change"] if t in found else float("nan") for t in tasks(study)}
                )
    return pd.DataFrame(out)


# -------------------------------------------------------------------------------------------------------------- details


def detail_table(study: Study, task: str) -> pd.DataFrame:
    """Every figure of a task besides its headline, by method: categories, POPE's settings, MME's acc and acc+ and so on."""
    out = []
    for key in models(study) if study.on_scenes else ():
        for row in rows(study, key, task):
            out.append({"model": study.label(key), "method": row.label} | scores(study, row, task).parts)
    return pd.DataFrame(out)


def pope_table(study: Study) -> pd.DataFrame:
    """POPE in the form of its paper: one line a method and setting; `all` is the mean of the three."""
    out = []
    for key in models(study) if study.on_scenes else ():
        for row in rows(study, key, "pope"):
            parts = scores(study, row, "pope").parts
            for setting in ("all", "random", "popular", "adversarial"):
                at = "" if setting == "all" else f"{setting} "
                figures = {name: parts[at + name] for name in ("accuracy", "precision", "recall", "F1", "yes-rate")}
                out.append({"model": study.label(key), "method": row.label, "setting": setting} | figures)
    return pd.DataFrame(out)
