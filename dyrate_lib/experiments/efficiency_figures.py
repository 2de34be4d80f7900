"""Notebook 04, figures: bars against floors, speed-up over batch, image and new tokens, and over budgets. Points are measured,
lines are what the floors (roofline) predict."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plotting import BLACK, BLUE, GREY, METHODS, ORANGE, VERMILION, WIDTH_PAGE
from .context import Study
from .efficiency import latency_records
from .efficiency_cells import info_of
from .efficiency_course import course_ratio
from .efficiency_floors import floor_ms
from .efficiency_rows import headline, kept_table, label, samples, size_of, speed_up, time_records, whole_floor
from .efficiency_targets import predicted

BAR_BATCHES = (1, 16, 64)
SHADES = (ORANGE, BLUE, BLACK)


def bar_figure(study: Study) -> Figure | None:
    """Prefill (top) and a decode step (bottom) of the graph engine by method, one column a model and batch; ticks are floors."""
    rows = headline(study)
    if not len(rows):
        return None
    rows = rows[(rows.loop == "graph") & (rows.n > 0) & (rows["image tokens"] == rows["image tokens"].min())]
    there = set(zip(rows["key"], rows["batch"], strict=True))
    places = [(key, batch) for key in dict.fromkeys(rows["key"]) for batch in BAR_BATCHES if (key, batch) in there]
    if not places:
        return None
    fig, axes = plt.subplots(2, len(places), figsize=(WIDTH_PAGE, 3.6), squeeze=False, sharex="col")
    for column, (key, batch) in enumerate(places):
        some = rows[(rows.key == key) & (rows.batch == batch)].set_index("method")
        for ax, title, floor in zip(
            axes[:, column], ("prefill ms", "ms a token"), ("prefill floor ms", "decode floor ms")
        ):
            _bars(ax, some, title, floor)
        axes[0, column].set_title(f"{label(study, key)}\nbatch {batch}")
        names = [
            METHODS[method][0].split(" (")[0] + {"fastv-3": " 3", "fastv-2": " 2"}.get(method, "")
            for method in some.index
        ]
        axes[1, column].set_xticks(range(len(some)), names, rotation=60, ha="right")
    axes[0, 0].set_ylabel("prefill, ms")
    axes[1, 0].set_ylabel("decode, ms a token")
    return fig


def _bars(ax: Axes, some: pd.DataFrame, title: str, floor: str) -> None:
    for at, (method, row) in enumerate(some.iterrows()):
        error = [[row[title] - row[f"{title}, q1"]], [row[f"{title}, q3"] - row[title]]]
        color = METHODS[str(method)][1]
        ax.bar(
            at,
            row[title],
            color=color,
            width=0.7,
            yerr=error,
            error_kw={"elinewidth": 0.8, "capsize": 2, "ecolor": GREY},
        )
        ax.plot(
            [at - 0.45, at + 0.45], [row[floor]] * 2, color=GREY if method == "original" else "black", linewidth=1.2
        )


def speed_data(study: Study) -> pd.DataFrame:
    """Speed-up of DyRate over the same engine unpruned, end to end: measured with its interval, and by floors."""
    rows = []
    for cell, record in time_records(study).items():
        for new in record["config"]["new_tokens"]:
            found = speed_up(record, "graph original", "graph dyrate", new)
            if found is not None:
                rows.append(
                    {
                        "key": cell.model, "model": label(study, cell.model), "image tokens": record["config"]["image_tokens"],
                        "batch": cell.batch, "new tokens": new, "measured": found["mean"], "lo": found["lo"], "hi": found["hi"],
                        "by floors": predicted(study, cell, record, new, cell.batch),
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def speed_figure(study: Study) -> Figure | None:
    """Speed-up over batch; a panel a model and number of image tokens, a colour a number of new tokens."""
    data = speed_data(study)
    if not len(data):
        return None
    panels = list(data.groupby(["key", "image tokens"], sort=False).groups)
    fig, axes = plt.subplots(1, len(panels), figsize=(WIDTH_PAGE, 2.5), squeeze=False, sharey=True)
    by_place = {
        (cell.model, record["config"]["image_tokens"]): (cell, record) for cell, record in time_records(study).items()
    }
    for ax, place in zip(axes[0], panels):
        some = data[(data.key == place[0]) & (data["image tokens"] == place[1])]
        cell, record = by_place[place]
        batches = np.geomspace(1, max(2, some.batch.max()), 25)
        for color, new in zip(SHADES, sorted(some["new tokens"].unique())):
            points = some[some["new tokens"] == new]
            spread = [points.measured - points.lo, points.hi - points.measured]
            ax.plot(batches, predicted(study, cell, record, int(new), batches), color=color, linewidth=1.0)
            ax.errorbar(
                points.batch, points.measured, spread, color=color, fmt="o", capsize=2, label=f"{new} new tokens"
            )
        ax.axhline(1, color=GREY, linewidth=0.6, linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(some.batch.unique()), [str(b) for b in sorted(some.batch.unique())])
        ax.set_title(f"{label(study, place[0])}\n{place[1]} image tokens")
        ax.set_xlabel("batch")
    axes[0, 0].set_ylabel("times faster than unpruned")
    axes[0, 0].legend(loc="upper left")
    return fig


def budget_data(study: Study) -> pd.DataFrame:
    """DyRate's course scaled to budgets: FLOPs in the paper's convention, measured and predicted speed-up, by batch."""
    rows: list[dict[str, Any]] = []
    for cell, record in latency_records(study).items():
        if cell.kind != "sweep":
            continue
        info, new, limits = info_of(study, cell.model), record["config"]["new_tokens"][1], record["payload"]["ceilings"]
        whole = {}
        for name in record["payload"]["reads"]:
            table = kept_table(info, record, name, new)
            found = floor_ms(info, table, record["config"]["image_tokens"], cell.batch, limits, size_of(study, cell))
            whole[name] = whole_floor(found, new)
        for name, reads in record["payload"]["reads"].items():
            ratio = speed_up(record, "graph original", f"graph {name}")
            times = samples(record, f"graph {name}")
            if ratio is not None and times is not None:
                rows.append(
                    {
                        "key": cell.model, "model": label(study, cell.model), "batch": cell.batch, "budget": name,
                        "FLOPs %, paper": 100 * course_ratio(info, reads["layer"], tuple(reads["kept"])),
                        "end to end ms": float(np.median(times["whole"])), "measured": ratio["mean"], "lo": ratio["lo"],
                        "hi": ratio["hi"], "by floors": whole["original"] / whole[name],
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def budget_figure(study: Study) -> Figure | None:
    """Speed-up over FLOPs in the paper's convention, a colour a batch."""
    data = budget_data(study)
    if not len(data):
        return None
    fig, ax = plt.subplots(figsize=(WIDTH_PAGE / 2, 2.5))
    for color, batch in zip((VERMILION, BLUE, BLACK), sorted(data.batch.unique())):
        some = data[data.batch == batch].sort_values("FLOPs %, paper")
        ax.plot(some["FLOPs %, paper"], some["by floors"], color=color, linewidth=1.0)
        spread = [some.measured - some.lo, some.hi - some.measured]
        ax.errorbar(
            some["FLOPs %, paper"], some.measured, spread, color=color, fmt="o", capsize=2, label=f"batch {batch}"
        )
    ax.axhline(1, color=GREY, linewidth=0.6, linestyle=":")
    ax.set_xlabel("FLOPs, % of unpruned (the paper's convention)")
    ax.set_ylabel("times faster than unpruned")
    ax.legend()
    return fig
