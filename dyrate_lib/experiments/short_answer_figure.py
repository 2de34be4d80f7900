"""Notebook 03: what each method retains of the unpruned model's score, task by task, as one figure."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..plotting import BLACK, METHODS, WIDTH_PAGE
from .context import Study
from .roles import TABLE1
from .short_answer_scores import cells, mean_retained
from .short_answers import AT_BUDGET, models, tasks

COLUMNS = 4
LOW, HIGH = 0.0, 115.0  # the widest range of the axes, %; what lies outside is drawn as an arrow at the edge
MEAN = "mean of the seven"


def retained_table(study: Study) -> pd.DataFrame:
    """What the figure is drawn from: retained %, lo, hi, by model, task (and the mean of all) and method."""
    columns = ["model", "task", "key", "method", "retained %", "retained lo", "retained hi"]
    table = cells(study)
    if not len(table):
        return pd.DataFrame(columns=columns)
    means = [
        dict(zip(columns, (study.label(key), MEAN, name, label, *mean_retained(study, key, name)), strict=True))
        for key in models(study)
        for name, label in dict(table[["key", "method"]].drop_duplicates().itertuples(index=False)).items()
    ]
    return pd.concat([table[columns], pd.DataFrame(means)], ignore_index=True)


def retained_figure(study: Study) -> Figure | None:
    """One panel a task and one for their mean: methods down, the share of the unpruned score across, both sizes.

    None where the tasks are not asked.
    """
    table = retained_table(study)
    if not len(table):
        return None
    panels = [*tasks(study), MEAN]
    labels = dict(table[table.key != "original"][["key", "method"]].drop_duplicates().itertuples(index=False))
    height = -(-len(panels) // COLUMNS) * (0.125 * len(labels) + 0.42) + 0.3
    fig, axes = plt.subplots(
        -(-len(panels) // COLUMNS), COLUMNS, figsize=(WIDTH_PAGE, height), sharex=True, sharey=True
    )
    finite = table[np.isfinite(table["retained %"])]
    low = float(np.clip(finite["retained lo"].min() - 3, LOW, 95)) if len(finite) else LOW
    high = float(np.clip(finite["retained hi"].max() + 3, 103, HIGH)) if len(finite) else HIGH
    places = {name: i for i, name in enumerate(labels)}
    both = len(models(study)) > 1
    for ax, task in zip(axes.flat, panels, strict=True):
        ax.axvline(100, color=BLACK, linewidth=0.8, zorder=1)
        at = places.get("constant")
        if at is not None:  # above: as printed, and DyRate; below: rivals at equal budget
            ax.axhline(at + 0.5, color=BLACK, linewidth=0.5, linestyle=":", zorder=1)
        for i, key in enumerate(models(study)):
            some = table[(table.model == study.label(key)) & (table.task == task)]
            for line in some[some.key != "original"].to_dict("records"):
                y = places[line["key"]] + (0.4 * i - 0.2) * both
                _mark(ax, line, y, hollow=i > 0, at=(low, high))
        ax.set_title(TABLE1[task][1] if task in TABLE1 else task)
        ax.set_xlim(low, high)
        ax.set_ylim(len(labels) - 0.4, -0.6)
        ax.set_yticks(range(len(labels)), [_short(label) for label in labels.values()], fontsize=6)
    for ax in axes[-1]:
        ax.set_xlabel("% of unpruned")
    shown = [
        Line2D(
            [],
            [],
            color=BLACK,
            marker="o",
            linestyle="none",
            markerfacecolor="none" if i else BLACK,
            label=study.label(key),
        )
        for i, key in enumerate(models(study))
    ]
    fig.legend(handles=shown, loc="outside lower center", ncols=2)
    return fig


def _short(label: str) -> str:
    """A row's label without what every row of its kind has."""
    return label.replace(" (target 0.333)", "").replace(" (fixed count)", "")


def _mark(ax: Any, line: dict[str, Any], y: float, hollow: bool, at: tuple[float, float]) -> None:
    x, lo, hi = (line[name] for name in ("retained %", "retained lo", "retained hi"))
    if not np.isfinite([x, lo, hi]).all():  # the unpruned model scores nothing in some resample
        return
    style = {"fastv": "fastv-2", "constant": "fixed"}.get(name := line["key"].removeprefix(AT_BUDGET), name)
    _, color, marker, _ = METHODS[style]
    ax.hlines(y, max(lo, at[0]), min(hi, at[1]), color=color, linewidth=0.9, zorder=2)
    if x < at[0]:
        ax.plot(at[0], y, "<", color=color, markersize=3, clip_on=False)
    else:
        face = "white" if hollow else color
        ax.plot(
            min(x, at[1]), y, marker, color=color, markerfacecolor=face, markersize=3.2, markeredgewidth=0.7, zorder=3
        )
