"""The controls' figures: differences at equal cost, rate and need over steps, what there is to see, and the ratio in training."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..plotting import BLACK, GREY, INPUTS, PURPLE, VERMILION, WIDTH_COLUMN, WIDTH_PAGE, input_style, method_style
from ..scenes import image_need
from . import better, constraints, controls
from .attention import FAMILIES
from .context import Study
from .controls_needs import in_force, needs
from .controls_numbers import cells, difference, fed, relative
from .controls_tables import seen_data
from .summaries import mean_course, percent
from .training_runs import BUDGET

_SHORT = {
    "step": "step number", "none": "nothing", "hidden": "hidden state", "foreign": "another picture's\nshares",
    "oracle": "the need\n(oracle)",
}  # fmt: skip
SIZE_MARKS = {"small": ("o", "none"), "base": ("D", "full")}


def family(study: Study, role: str) -> str:
    """A set's family of captions for a title."""
    return FAMILIES.get(role, "unseen pairs" if role == "nocaps" else role) if study.on_scenes else study.dataset(role).name


def difference_data(study: Study) -> pd.DataFrame:
    """What `figure_differences` draws: each control minus the shares, at equal cost and as run, in CIDEr."""
    rows = []
    for key, role in cells(study):
        shares = fed(study, key, role, "shares")
        for kind in controls.inputs(study)[1:]:
            row = fed(study, key, role, kind)
            for cost, pair in (("equal", (row.equal, shares.equal)), ("as run", (row.raw, shares.raw))):
                rows.append({"model": key, "role": role, "fed with": kind, "cost": cost, **difference(study, *pair)})
    return pd.DataFrame(rows)


def figure_differences(study: Study) -> Figure:
    """CIDEr of a predictor fed with something else, minus that of the shares, at equal cost; one panel a family, both sizes."""
    table = difference_data(study)
    table = table[table.cost == "equal"]
    roles, kinds = controls.roles(study), controls.inputs(study)[1:]
    fig, axes = plt.subplots(1, len(roles), figsize=(WIDTH_PAGE, 2.3), sharey=True, squeeze=False)
    keys = controls.models(study)
    for ax, role in zip(axes[0], roles, strict=True):
        ax.axvline(0, color=VERMILION, lw=0.8)
        for i, kind in enumerate(kinds):
            for key in keys:
                found = table[(table.model == key) & (table.role == role) & (table["fed with"] == kind)].iloc[0]
                at = i + (0.17 if key == keys[-1] else -0.17) * (len(keys) > 1)
                _whisker(ax, found, at, INPUTS[kind][1], SIZE_MARKS[key])
        ax.set_title(f"{family(study, role)} (n = {int(table.n.max())})")
        ax.set_xlabel("CIDEr against attention shares")
        ax.set_yticks(np.arange(len(kinds)), [_SHORT[kind] for kind in kinds])
        ax.set_ylim(len(kinds) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
    fig.legend(handles=_sizes(study, keys), loc="outside lower center", ncols=len(keys))
    return fig


def _whisker(ax: Any, found: Any, at: float, color: str, mark: tuple[str, Any]) -> None:
    ends = np.clip([[found["mean"] - found["lo"]], [found["hi"] - found["mean"]]], 0, None)
    inside = {"markerfacecolor": "white"} if mark[1] == "none" else {}
    style = {"color": color, "marker": mark[0], "ls": "", "capsize": 2, "elinewidth": 0.8, **inside}
    ax.errorbar([found["mean"]], [at], xerr=ends, **style)


def _sizes(study: Study, keys: Any) -> list[Line2D]:
    def handle(key: str) -> Line2D:
        marker, fill = SIZE_MARKS[key]
        return Line2D([], [], color=BLACK, marker=marker, fillstyle=fill, ls="", label=_model(study, key))  # type: ignore[arg-type]

    return [handle(key) for key in keys]


def _model(study: Study, key: str) -> str:
    """A model's name without its role."""
    return study.label(key).split(" (")[0]


def course_data(study: Study) -> pd.DataFrame:
    """What `figure_courses` draws: the share removed by each control, and the share of tokens that need the image, by step."""
    parts = []
    for key, role in cells(study):
        for kind in controls.inputs(study):
            course = mean_course([c for record in controls.controls(study, key, role, kind) for c in in_force(record)])
            parts.append(pd.DataFrame(course).assign(model=key, role=role, what=kind))
        if study.on_scenes:
            told = needs(study, controls.unpruned(study, key, role), role)
            course = mean_course([np.nan_to_num(image_need(reply)) for reply in told])
            parts.append(pd.DataFrame(course).assign(model=key, role=role, what="need"))
    return pd.concat(parts, ignore_index=True)


def figure_courses(study: Study) -> Figure:
    """Share of image tokens removed over steps by each control; grey: share of unpruned replies' tokens that need the image."""
    table, keys, roles = course_data(study), controls.models(study), controls.roles(study)
    fig, axes = plt.subplots(
        len(keys), len(roles), figsize=(WIDTH_PAGE, 1.65 * len(keys) + 0.75), sharex="col", sharey=True, squeeze=False
    )
    for row, key in zip(axes, keys, strict=True):
        for ax, role in zip(row, roles, strict=True):
            part = table[(table.model == key) & (table.role == role)]
            need = part[part.what == "need"]
            ax.fill_between(need.step, need["mean"], color=GREY, alpha=0.3, lw=0, step="mid")
            for kind in controls.inputs(study):
                found, style = part[part.what == kind], input_style(kind)
                every = max(1, len(found) // 6)
                ax.plot(found.step, found["mean"], **{**style, "markevery": every, "markersize": 3, "linewidth": 1.0})  # type: ignore[arg-type]
            ax.set_ylim(0, 1.02)
        row[0].set_ylabel(f"{_model(study, key)}\nshare")
    for ax, role in zip(axes[0], roles, strict=True):
        ax.set_title(family(study, role))
    for ax in axes[-1]:
        ax.set_xlabel("generation step")
    handles = [Line2D([], [], **input_style(kind)) for kind in controls.inputs(study)]  # type: ignore[arg-type]
    if study.on_scenes:
        handles.append(Patch(color=GREY, alpha=0.3, lw=0, label="Tokens that need the image"))  # type: ignore[arg-type]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.0)
    return fig


def figure_seen(study: Study) -> Figure | None:
    """Share removed at mid-reply by number of objects and by quarter of clutter; None without scenes."""
    table = seen_data(study)
    if not len(table):
        return None
    kinds = ("objects", "clutter, quarter")
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH_COLUMN, 2.1), sharey=True)
    roles, keys = list(dict.fromkeys(table.role)), controls.models(study)
    lines = dict(zip(roles, ("-", "--", ":"), strict=False))
    for ax, by in zip(axes, kinds, strict=True):
        for role in roles:
            for key in keys:
                found = table[(table.by == by) & (table.role == role) & (table.model == key)]
                ends = np.clip([found["mean"] - found["lo"], found["hi"] - found["mean"]], 0, None)
                ax.errorbar(
                    found.group, found["mean"], yerr=ends, color=VERMILION if key == "small" else BLACK, ls=lines[role],
                    marker=SIZE_MARKS[key][0], fillstyle=SIZE_MARKS[key][1], capsize=1.5, elinewidth=0.7,
                )  # fmt: skip
        ax.set_xlabel("objects in the picture" if by == "objects" else "clutter, quarter")
        ax.set_xticks(sorted(table[table.by == by].group.unique()))
    axes[0].set_ylabel("removed at mid-reply")
    handles = [*_sizes(study, keys), *(Line2D([], [], color=BLACK, ls=lines[r], label=family(study, r)) for r in roles)]
    for handle, key in zip(handles, keys, strict=False):
        handle.set_color(VERMILION if key == "small" else BLACK)
    fig.legend(handles=handles, loc="outside lower center", ncols=2, columnspacing=1.0)
    return fig


def figure_constraint(study: Study) -> Figure:
    """Expected FLOPs ratio over training, penalty and Lagrangian, and the Lagrangian's multiplier; every seed, running means."""
    table, keys = constraints.courses(study), controls.models(study)
    colors = {"penalty": BLACK, "lagrangian": PURPLE}
    shape: dict[str, Any] = {"figsize": (WIDTH_COLUMN, 2.9), "sharex": True, "sharey": "row", "height_ratios": (2, 1)}
    fig, axes = plt.subplots(2, len(keys), squeeze=False, **shape)
    for (top, bottom), key in zip(axes.T, keys, strict=True):
        top.axhline(BUDGET, color=GREY, lw=0.6)
        for (kind, _), curve in table[table.model == key].groupby(["constraint", "seed"]):
            width = max(1, len(curve) // 20)
            top.plot(curve.step, curve.flops_ratio.rolling(width, min_periods=1).mean(), color=colors[kind], lw=0.8)
            if "mu" in curve and curve.mu.notna().any():
                bottom.plot(curve.step, curve.mu, color=colors[kind], lw=0.8)
        bottom.axhline(0, color=GREY, lw=0.6)
        top.set_title(_model(study, key))
        bottom.set_xlabel("training step")
    axes[0, 0].set_ylabel("expected FLOPs ratio")
    axes[1, 0].set_ylabel("multiplier")
    handles = [Line2D([], [], color=color, label=kind.capitalize()) for kind, color in colors.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=2)
    return fig


BETTER_ROWS = {
    "fixed": "FastV, one rate", "dyrate": "DyRate", "relook": "RelookRate", "unweighed": "MergeRate,\nno weights",
    "by attention": "MergeRate,\nFastV's choice", "merge": "MergeRate", "merge, predictor": "MergeRate,\nshares",
}  # fmt: skip


def better_data(study: Study) -> pd.DataFrame:
    """What `figure_better` draws: CIDEr of each row relative to the unpruned model, in per cent."""
    rows = []
    for key in controls.models(study):
        for role in better.roles(study):
            original = better.scores(study, key, role, "original")
            for name in better.ROWS[1:]:
                found = relative(study, better.scores(study, key, role, name), original)
                unknown = {"mean": np.nan, "lo": np.nan, "hi": np.nan, "n": original.size}
                rows.append({"model": key, "role": role, "row": name, **(percent(found) if found else unknown)})
    return pd.DataFrame(rows)


def figure_better(study: Study) -> Figure:
    """CIDEr against the unpruned model at a quarter of the FLOPs, one panel a set; the band is the margin of equivalence."""
    table, keys, roles = better_data(study), controls.models(study), better.roles(study)
    fig, axes = plt.subplots(1, len(roles), figsize=(WIDTH_PAGE, 2.9), sharey=True, squeeze=False)
    for ax, role in zip(axes[0], roles, strict=True):
        ax.axvspan(-100 * better.MARGIN, 100 * better.MARGIN, color=GREY, alpha=0.3, lw=0)
        for i, name in enumerate(better.ROWS[1:]):
            for key in keys:
                found = table[(table.model == key) & (table.role == role) & (table.row == name)].iloc[0]
                at = i + (0.17 if key == keys[-1] else -0.17) * (len(keys) > 1)
                _whisker(ax, found, at, method_style(better.STYLES.get(name, name))["color"], SIZE_MARKS[key])
        ax.set_title(family(study, role))
        ax.set_xlabel("CIDEr: difference, %")
        ax.grid(axis="y", visible=False)
        ax.set_yticks(np.arange(len(better.ROWS) - 1), [BETTER_ROWS[name] for name in better.ROWS[1:]])
        ax.set_ylim(len(better.ROWS) - 1.5, -0.5)
    fig.legend(handles=_sizes(study, keys), loc="outside lower center", ncols=len(keys))
    return fig
