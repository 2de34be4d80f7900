"""The whole result in one figure: every claim with its verdict, and whether attention tells how much to prune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..compare import BORNE_OUT, CANNOT_JUDGE, NOT_BORNE_OUT, PARTLY, VERDICTS
from ..plotting import BLACK, BLUE, GREY, INPUTS, VERMILION, WIDTH_PAGE
from .claim_words import SHORT
from .context import Study
from .overview_data import MODELS, SETS, SHOWN, input_data, strip_data
from .paper_words import cells, estimates

HEIGHT = 4.0  # inches
SMALL = 6.0  # points, the smallest print
# hold, fail, cannot be judged; of the core checks, and paler of the others
_BARS = (("hold", BLUE, "#9CC8E3"), ("fail", VERMILION, "#F0BD97"), ("unknown", "#BDBDBD", "#DEDEDE"))
_VERDICT_COLORS = {BORNE_OUT: BLUE, PARTLY: "#8A5F00", NOT_BORNE_OUT: VERMILION, CANNOT_JUDGE: "#6E6E6E"}
_WORDS = {BORNE_OUT: "yes", PARTLY: "partly", NOT_BORNE_OUT: "no", CANNOT_JUDGE: "open"}
_NAMES = {"oracle": "need (oracle)", "shares": "attention", "foreign": "another\u2019s att.", "step": "step number"}
_MARKS: dict[str, tuple[str, Any, float]] = {"small": ("o", "none", -0.17), "base": ("D", "full", 0.17)}
_WORD, _NUMBER, _END = 1.13, 2.5, 8.8  # where a row's columns begin and end, in lengths of a bar


def overview(measured: Mapping[str, Any], study: Study | None = None) -> Figure:
    """The overview at page width, 4 in high.

    Left: each claim with the share of its checks that hold, its verdict, and the check that decides. Right: what a predictor's
    inputs gain over one constant rate at equal FLOPs, per family and size. What is missing is said where it would stand.
    study: to read the controls' records from, see `overview_data.input_data`.
    """
    with plt.rc_context({"figure.constrained_layout.use": False}):  # its columns of text stand where they are put
        fig = plt.figure(figsize=(WIDTH_PAGE, HEIGHT))
    strip = fig.add_axes((0.218, 0.075, 0.45, 0.825))
    _draw_strip(strip, strip_data(measured))
    data = input_data(measured, study)
    top, each, gap = 0.868, 0.236, 0.013
    panels = [fig.add_axes((0.80, top - (i + 1) * each - i * gap, 0.192, each)) for i in range(len(SETS))]
    _draw_inputs(panels, data)
    fig.text(0.672, 0.985, "Does attention tell how much to prune?", weight="bold", va="top", fontsize=7.2)
    fig.text(0.672, 0.943, recovered_line(measured), va="top", fontsize=SMALL + 0.5)
    return fig


def tally(data: pd.DataFrame) -> str:
    """'3 of 16 claims borne out, 9 partly, 4 not' of `strip_data`."""
    found = {verdict: int((data.verdict == verdict).sum()) for verdict in VERDICTS}
    words = {PARTLY: "partly", NOT_BORNE_OUT: "not", CANNOT_JUDGE: "not judged"}
    told = [f"{found[verdict]} {word}" for verdict, word in words.items() if found[verdict]]
    return ", ".join([f"{found[BORNE_OUT]} of {len(data)} claims borne out", *told])


def recovered_line(measured: Mapping[str, Any]) -> str:
    """How much of the oracle's gain the shares recover: the range of estimates over sets and models, from C11's quantities."""
    names = cells("c11.{model}.{set}.share_of_gap")
    known = estimates(measured, names)
    if not known:
        return "The oracle's gain and what attention recovers of\nit were not measured on enough pictures."
    low, high = (f"{100 * x:.0f}".replace("-", "\u2212") for x in (min(known), max(known)))
    part = f"{low} to {high} %" if low != high else f"{low} %"
    return f"It recovers {part} of what knowing the need\ngains ({len(known)} of {len(names)} cells measured)."


def _draw_strip(ax: Axes, data: pd.DataFrame) -> None:
    for y, row in enumerate(data.to_dict("records")):
        checks = [
            (row[f"{weight} {name}"], color)
            for name, *colors in _BARS
            for weight, color in zip(("core", "other"), colors, strict=True)
        ]
        left = 0.0
        for n, color in checks:
            width = n / sum(count for count, _ in checks)
            ax.barh(y, width, left=left, color=color, height=0.64)
            left += width
        color = _VERDICT_COLORS[row["verdict"]]
        ax.text(_WORD, y, _WORDS[row["verdict"]], fontsize=SMALL + 0.5, va="center", weight="bold", color=color)
        ax.text(_NUMBER, y, row["shown"], fontsize=SMALL, va="center", color=BLACK if row["held"] is not None else GREY)
    ax.set_yticks(range(len(data)), [f"{key}  {SHORT[key]}" for key in data.claim], fontsize=SMALL)
    ax.set_xlim(0, _END)
    ax.set_ylim(len(data) - 0.45, -0.55)
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0, pad=2)
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.figure.text(0.008, 0.985, tally(data), weight="bold", va="top", fontsize=7.2)
    ax.text(_WORD, -0.7, "borne out?", fontsize=SMALL, va="bottom", color="#555555")
    ax.text(_NUMBER, -0.7, "what decides, 95 % interval (what was asked)", fontsize=SMALL, va="bottom", color="#555555")
    words = {"hold": "hold", "fail": "fail", "unknown": "not judged"}
    handles = [Patch(color=color, label=words[name]) for name, color, _ in _BARS]
    ax.figure.legend(
        handles=handles, title="", loc="lower left", bbox_to_anchor=(0.0, -0.005), ncols=3, fontsize=SMALL + 0.5, handlelength=1,
        columnspacing=1.2,
    )  # fmt: skip
    ax.figure.text(0.30, 0.031, "share of a claim's checks; full colour: core checks", fontsize=SMALL + 0.5, va="center")


def _draw_inputs(axes: list[Axes], data: pd.DataFrame) -> None:
    ends = data[["mean", "lo", "hi"]].to_numpy(dtype=float)
    ends = ends[np.isfinite(ends)]
    low, high = (min(0.0, ends.min()), max(0.0, ends.max())) if ends.size else (-1.0, 1.0)
    room = 0.07 * (high - low)
    for ax, (role, family) in zip(axes, SETS.items(), strict=True):
        ax.axvline(0, color=BLACK, lw=0.8)
        lacking = [key for key in MODELS if not _draw_family(ax, data[(data["set"] == role) & (data.model == key)], key)]
        ax.set_xlim(low - room, high + room)
        ax.set_ylim(len(SHOWN) - 0.4, -0.6)
        ax.set_yticks(range(len(SHOWN)), [_NAMES[kind] for kind in SHOWN], fontsize=SMALL + 0.5)
        ax.tick_params(axis="y", length=0, pad=2)
        ax.tick_params(axis="x", labelsize=SMALL + 0.5)
        ax.grid(axis="y", visible=False)
        ax.set_ylabel(family, fontsize=7, weight="bold", labelpad=2)
        if lacking:
            where = "not measured" if len(lacking) == len(MODELS) else f"not all measured: {', '.join(lacking)}"
            ax.text(0.98, 0.05, where, transform=ax.transAxes, ha="right", fontsize=SMALL, color="#6E6E6E")
        if ax is not axes[-1]:
            ax.tick_params(axis="x", labelbottom=False)
        if not ends.size:
            ax.set_xticks([0])
    axes[-1].set_xlabel("CIDEr above one constant rate\nat equal FLOPs", fontsize=6.5, labelpad=1)
    handles = [Line2D([], [], color=BLACK, marker=m, fillstyle=f, ls="", ms=3.5, label=key) for key, (m, f, _) in _MARKS.items()]
    axes[0].figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.672, -0.005), fontsize=SMALL + 0.5, handletextpad=0.2,
        labelspacing=0.2,
    )  # fmt: skip


def _draw_family(ax: Axes, data: pd.DataFrame, key: str) -> bool:
    """Draws one model's rows; whether all inputs were measured. An estimate whose interval is unknown stands alone."""
    marker, fill, shift = _MARKS[key]
    for row in data.itertuples():
        kind = row._3
        y, color = SHOWN.index(kind) + shift, INPUTS[kind][1]
        if np.isfinite(row.lo):
            ax.plot([row.lo, row.hi], [y, y], color=color, lw=1.0, solid_capstyle="butt")
        ax.plot(row.mean, y, color=color, marker=marker, fillstyle=fill, ms=3.5, ls="", mew=0.8)
    return len(data) == len(SHOWN)
