"""Notebook 07: the verdict on every claim from the records of notebooks 01 to 06, and where the paper contradicts itself."""

from __future__ import annotations

import importlib
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..compare import CANNOT_JUDGE, VERDICTS, Verdict, claims, judge_all, load_quantities, scoreboard, summary_line
from ..errors import RecordError
from ..plotting import BLUE, GREEN, GREY, ORANGE, VERMILION, WIDTH_PAGE
from .context import Record, Study
from .contradictions import contradiction_table, table3_text_lengths

# notebook -> the module whose quantities(study) says what it measured
SOURCES = {
    "01_attention_analysis": "attention", "02_training": "training_runs", "03_benchmarks": "benchmarks",
    "04_efficiency": "efficiency", "05_ablations": "ablations", "06_visualization": "visualization",
}  # fmt: skip
_COLORS = dict(zip(VERDICTS, (GREEN, ORANGE, VERMILION, GREY), strict=True))


def collect(study: Study) -> dict[str, Any]:
    """All measured quantities, computed from the records by the functions that notebooks 01 to 06 use themselves.

    Records that are missing are computed (or refused, from a frozen store), so this notebook can also be run alone.

    Raises:
        RecordError: notebooks 01 to 06 left quantities in this study's output folder that differ from the records.
    """
    measured: dict[str, Any] = {}
    for module in study.each(SOURCES.values(), "quantities"):
        measured.update(importlib.import_module(f"{__package__}.{module}").quantities(study))
    return measured


def check_saved(study: Study, measured: dict[str, Any]) -> str:
    """Compare with what notebooks 01 to 06 wrote beside their tables, if they did in this folder; one line for the reader.

    Raises:
        RecordError: a number differs, so tables and verdict would not tell the same story.
    """
    saved = load_quantities(study.tables) if study.tables.is_dir() else {}
    for name, entry in saved.items():
        if name not in measured:
            raise RecordError(
                f"{name} was saved by a notebook but is not in the records: run the notebooks again, in order"
            )
        mean = measured[name]["mean"] if isinstance(measured[name], dict) else float(measured[name])
        if abs(mean - entry["mean"]) > 1e-9 * max(1.0, abs(mean)):
            raise RecordError(
                f"{name}: a notebook saved {entry['mean']}, the records give {mean}: run the notebooks again, in order"
            )
    # not how many were saved: that depends on which notebooks ran in this folder before
    return f"{len(measured)} quantities from the records; none that notebooks 01 to 06 saved here differs"


def compute(study: Study) -> list[Record]:
    """Nothing of its own: this notebook judges what the others recorded."""
    return []


def quantities(study: Study) -> dict[str, Any]:
    """Everything that the claims are judged by."""
    return collect(study)


def verdict_table(measured: dict[str, Any]) -> pd.DataFrame:
    """One row a claim: what the paper says, the verdict by the checks of claims.yaml, and the evidence."""
    verdicts, known = judge_all(measured), claims()
    return pd.DataFrame(
        [
            {
                "claim": key, "title": known[key].title, "paper": known[key].paper, "notebook": known[key].notebook,
                "verdict": verdict.verdict, "evidence": verdict.evidence,
            }
            for key, verdict in verdicts.items()
        ]
    )  # fmt: skip


def check_table(measured: dict[str, Any]) -> pd.DataFrame:
    """One row a check: claim, check, whether it is core, whether it held, and its line of evidence."""
    words = {True: "holds", False: "fails", None: "cannot be judged"}
    rows = []
    for key, verdict in judge_all(measured).items():
        rows += [
            {
                "claim": key,
                "check": name,
                "core": "core" if core else "",
                "outcome": words[held],
                "evidence": line.removeprefix(f"{name}: "),
            }
            for name, core, held, line in verdict.checks
        ]
    return pd.DataFrame(rows)


def verdict_figure(measured: dict[str, Any]) -> Figure:
    """How many checks of each claim hold, fail, or cannot be judged; the claim's verdict in words beside it."""
    verdicts = judge_all(measured)
    fig, ax = plt.subplots(figsize=(WIDTH_PAGE, 0.24 * len(verdicts) + 0.7))
    for row, verdict in enumerate(verdicts.values()):
        _draw_checks(ax, row, verdict)
    ax.set_yticks(range(len(verdicts)), [f"{key}  {claims()[key].title}" for key in verdicts])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.75)
    ax.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
    ax.set_xlabel("share of checks that hold (blue), fail (red), cannot be judged (grey)", x=0.29)
    ax.grid(False)
    return fig


def _draw_checks(ax: plt.Axes, row: int, verdict: Verdict) -> None:
    outcomes = [held for _, _, held, _ in verdict.checks]
    start = 0.0
    for wanted, color in ((True, BLUE), (False, VERMILION), (None, GREY)):
        share = sum(held is wanted for held in outcomes) / len(outcomes)
        ax.barh(row, share, left=start, color=color, height=0.62)
        start += share
    held = sum(held is True for held in outcomes)
    ax.text(1.06, row, f"{verdict.verdict} ({held} of {len(outcomes)})", va="center", fontsize=7, color="black")
    ax.plot(1.03, row, "s", color=_COLORS[verdict.verdict], markersize=3.5, clip_on=False)


def beyond_table() -> pd.DataFrame:
    """What cannot be judged without the original weights and data, claim by claim."""
    return pd.DataFrame(
        [{"claim": key, "title": c.title, "not judged here": c.beyond} for key, c in claims().items() if c.beyond]
    )


def board(measured: dict[str, Any]) -> pd.DataFrame:
    """The scoreboard: one row for each figure and table of the paper (see compare.scoreboard)."""
    return scoreboard(measured)


def verdict_line(measured: dict[str, Any]) -> str:
    """One stable line for all claims."""
    return summary_line(judge_all(measured))


def missing_line(measured: dict[str, Any]) -> str:
    """Which claims could not be judged, and why the first of them could not."""
    found = [verdict for verdict in judge_all(measured).values() if verdict.verdict == CANNOT_JUDGE]
    if not found:
        return "every claim could be judged"
    names = ", ".join(verdict.claim for verdict in found)
    return f"cannot be judged from these records: {names}; {found[0].claim}: {found[0].evidence}"


__all__ = [
    "beyond_table", "board", "check_saved", "check_table", "collect", "contradiction_table", "missing_line",
    "table3_text_lengths",
    "verdict_figure", "verdict_line", "verdict_table",
]  # fmt: skip
