"""Notebook 03: tables of what captions say right and wrong beside CIDEr, and the figure of what CIDEr hides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..plotting import BLACK, GREY, METHODS, WIDTH_PAGE
from ..stats_tests import holm
from .benchmark_tables import per_picture
from .benchmarks import Row, remembered
from .caption_facts import ATTRIBUTES, FACTS, MEASURES, WORDS, change, level, models, p_value, rows
from .context import Study
from .summaries import Quantity, show_interval

ALPHA = 0.05
SHOWN = ("fastv-3", "fastv-2", "vtw", "random", "dyrate", "fixed")  # of the figure
LINEAR = 5.0  # %, points: up to there the figure's axes are linear, beyond logarithmic
SHORT = {"flickr30k": "flickr30k (narrative)", "coco": "coco (short)", "nocaps": "nocaps (short)", "late": "late"}


def cells(study: Study, key: str) -> pd.DataFrame:
    """One line a set, row and measure of a model's table: value, lo, hi, change, change lo, change hi, p, p Holm, n.

    Holm's correction is over this table: all its measures by words and facts, methods and sets. Attributes are not tested.
    """
    return remembered(study, ("fact cells", key), lambda: _cells(study, key))


def _cells(study: Study, key: str) -> pd.DataFrame:
    lines = []
    for role in study.roles:
        base = rows(study, key, role)[0]
        for row in rows(study, key, role):
            for measure in MEASURES:
                found, nothing = level(study, row, role, measure), float("nan")
                gap: Quantity = {name: nothing for name in ("mean", "lo", "hi")}
                if row is not base:
                    gap = change(study, row, base, role, measure)
                tested = row is not base and measure not in ATTRIBUTES
                lines.append(
                    {
                        "set": role, "key": row.key, "method": row.label, "measure": measure, "value": found["mean"],
                        "lo": found["lo"], "hi": found["hi"], "change": gap["mean"], "change lo": gap["lo"],
                        "change hi": gap["hi"], "p": p_value(study, row, base, role, measure) if tested else nothing,
                        "p Holm": nothing, "n": found["n"],
                    }
                )  # fmt: skip
    table = pd.DataFrame(lines)
    known = table["p"].notna()
    if known.any():
        table.loc[known, "p Holm"] = holm(table.loc[known, "p"].to_numpy())
    return table


def facts_table(study: Study, key: str) -> pd.DataFrame:
    """One model's table: n-gram scores and facts of each set and method, with intervals and paired changes.

    A star marks a change that is left after Holm's correction over the table.
    """
    return _wide(study, key, {**WORDS, **FACTS})


def attributes_table(study: Study, key: str) -> pd.DataFrame:
    """One model's table of what is said wrong of objects that are there (and of the background), and repetitions."""
    return _wide(study, key, ATTRIBUTES)


def _wide(study: Study, key: str, measures: Iterable[str]) -> pd.DataFrame:
    if key not in models(study):
        return pd.DataFrame()
    found = {(line["set"], line["key"], line["measure"]): line for line in cells(study, key).to_dict("records")}
    out = []
    for role in study.roles:
        for row in rows(study, key, role):
            line: dict[str, Any] = {"set": role, "method": row.label}
            for measure in measures:
                cell = found[role, row.key, measure]
                line[MEASURES[measure].label] = _shown(cell, "value", "lo", "hi")
                line[f"change, {MEASURES[measure].label}"] = _change(cell) if row.key != "original" else ""
            out.append(line | {"FLOPs %": 100 * per_picture(row, "flops", "paper").mean(), "n": cell["n"]})
    return pd.DataFrame(out)


def _shown(cell: dict[str, Any], *names: str) -> str:
    if not np.isfinite(cell[names[0]]):
        return ""
    return show_interval(dict(zip(("mean", "lo", "hi"), (cell[name] for name in names), strict=True)), 1)


def _change(cell: dict[str, Any]) -> str:
    if not np.isfinite(cell["change"]):
        return ""
    shown = f"{cell['change']:+.1f} [{cell['change lo']:+.1f}, {cell['change hi']:+.1f}]"
    return shown + ("*" if cell["p Holm"] < ALPHA else "")


def hidden(study: Study) -> pd.DataFrame:
    """What the figure is drawn from: change of CIDEr, %, against changes of hallucination and omission, points."""
    return remembered(study, ("hidden",), lambda: pd.DataFrame(_hidden(study)))


def _hidden(study: Study) -> list[dict[str, Any]]:
    out = []
    for key in models(study):
        for role in study.roles:
            base, *others = rows(study, key, role)
            for row in others:
                if row.key in SHOWN:
                    out.append(
                        {"model": study.label(key), "set": role, "key": row.key, "method": row.label,
                         **_named("CIDEr %", change(study, row, base, role, "cider", relative=True)),
                         **{k: v for name in FACTS for k, v in _named(name, change(study, row, base, role, name)).items()}}
                    )  # fmt: skip
    return out


def _named(name: str, found: Quantity) -> dict[str, float]:
    return {name: found["mean"], f"{name} lo": found["lo"], f"{name} hi": found["hi"]}


def hidden_figure(study: Study) -> Figure | None:
    """Change of hallucination (filled) and of omission (hollow) over the change of CIDEr: rows are models, columns sets.

    None where the truth of the pictures is not known.
    """
    table, keys = hidden(study), models(study)
    if not len(table):
        return None
    fig, axes = plt.subplots(
        len(keys), len(study.roles), figsize=(WIDTH_PAGE, 1.75 * len(keys) + 0.6), squeeze=False, sharey=True
    )
    styles: dict[str, Row] = {}
    for i, key in enumerate(keys):
        for j, role in enumerate(study.roles):
            ax = axes[i, j]
            ax.axhline(0, color=GREY, linewidth=0.6)
            ax.axvline(0, color=GREY, linewidth=0.6)
            for row in rows(study, key, role):
                some = table[(table.model == study.label(key)) & (table.set == role) & (table.key == row.key)]
                for line in some.to_dict("records"):
                    styles.setdefault(row.key, row)
                    for name in FACTS:
                        _point(ax, line, name, row.style, hollow=name == "omission")
            ax.set_xscale("symlog", linthresh=LINEAR)
            ax.set_yscale("symlog", linthresh=LINEAR)
            ax.set_xticks(*_ticks(*ax.get_xlim()))
            ax.set_yticks(*_ticks(*ax.get_ylim()))
            ax.minorticks_off()
            if i == 0:
                ax.set_title(SHORT[role])
            if i == len(keys) - 1:
                ax.set_xlabel("CIDEr, change in %")
        axes[i, 0].set_ylabel(f"{study.label(key).split(' (')[0]}\nchange, points")
    handles = [
        Line2D(
            [],
            [],
            color=METHODS[row.style][1],
            marker=METHODS[row.style][2],
            linestyle="none",
            label=METHODS[row.style][0],
        )
        for row in styles.values()
    ]
    for face, label in ((BLACK, "hallucinated objects"), ("white", "omitted objects")):
        handles.append(Line2D([], [], color=BLACK, marker="o", markerfacecolor=face, linestyle="none", label=label))
    fig.legend(handles=handles, loc="outside lower center", ncols=4)
    return fig


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Places and labels of ticks of an axis that is linear around 0 and logarithmic beyond."""
    places = [float(sign * x) for sign in (-1, 1) for x in (LINEAR, 20, 100) if low <= sign * x <= high]
    return sorted([0.0, *places]), [f"{x:g}" for x in sorted([0.0, *places])]


def _point(ax: Any, line: dict[str, Any], name: str, style: str, hollow: bool) -> None:
    x, y = line["CIDEr %"], line[name]
    if not np.isfinite([x, y]).all():
        return
    _, color, marker, _ = METHODS[style]
    ax.hlines(y, line["CIDEr % lo"], line["CIDEr % hi"], color=color, linewidth=0.6, alpha=0.7)
    ax.vlines(x, line[f"{name} lo"], line[f"{name} hi"], color=color, linewidth=0.6, alpha=0.7)
    face = "white" if hollow else color
    ax.plot(x, y, marker, color=color, markerfacecolor=face, markersize=3.8, markeredgewidth=0.8, zorder=3)


def hidden_findings(study: Study) -> str:
    """Stable lines: where facts get worse beyond doubt (Holm) though CIDEr does not, and the other way round."""
    lines = []
    for key in models(study):
        table = cells(study, key)
        wide = table[table["p"].notna()].pivot(index=["set", "method"], columns="measure", values=["p Holm", "change"])
        for name in FACTS:
            quiet = [_at(i) for i, w in wide.iterrows() if _worse(w, name) and not _worse(w, "cider")]
            loud = [_at(i) for i, w in wide.iterrows() if _worse(w, "cider") and not _worse(w, name)]
            lines.append(
                f"{study.label(key)}: {MEASURES[name].label} rise and CIDEr does not fall: {'; '.join(quiet) or 'nowhere'}. "
                f"CIDEr falls and they do not rise: {len(loud)} of {len(wide)} cells"
            )
    return "\n".join(lines)


def _at(place: Any) -> str:
    return f"{place[1]} on {place[0]}"


def _worse(cell: Any, measure: str) -> bool:
    """Whether a measure changed for the worse after Holm's correction."""
    return bool(cell["p Holm", measure] < ALPHA and MEASURES[measure].better * cell["change", measure] < 0)
