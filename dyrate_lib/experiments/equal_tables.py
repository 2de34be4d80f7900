"""Notebook 03, the cheap half of `equal_budget`: tables at one budget, nominal against actual tokens, the curves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..budgets import Fit
from ..compare import load_paper
from ..metrics import exact_match
from ..plotting import METHODS, WIDTH_PAGE
from .benchmark_tables import cider, per_picture
from .benchmarks import Row, remembered, row_by_key
from .context import ROLE_LABELS, Study
from .equal_budget import (
    BY_KEY,
    Point,
    curve,
    curve_n,
    curve_roles,
    equal_rows,
    fit,
    models,
    position_rows,
    released_rows,
    roles,
    unreached,
)
from .summaries import difference_with_interval, mean_with_interval, show_interval

TITLES = {"coco": "short captions", "flickr30k": "narrative captions", "late": "late captions", "questions": "questions"}
MISSED = ["model", "method", "asked for, %", "from %", "to %"]


def quality(study: Study, row: Row, role: str) -> np.ndarray:
    """CIDEr (x 100) of each caption, or points (0 or 100) of each answer, averaged over the row's seeds: [n]."""
    if role != "questions":
        return cider(study, row, role)
    return remembered(study, ("points", id(row)), lambda: _points(study, row))


def _points(study: Study, row: Row) -> np.ndarray:
    references = study.dataset("questions").references()
    points = []
    for cell in row.cells:
        said = {entry["id"]: entry["text"] for entry in cell["payload"]}
        right = exact_match(said, {name: references[name] for name in said})
        points.append([100.0 * right[entry["id"]] for entry in cell["payload"]])
    return np.mean(points, axis=0)


def show_counts(counts: np.ndarray) -> str:
    """Image tokens by layer in short: '576 x 2, 103 x 14'."""
    return ", ".join(f"{value} x {len(list(run))}" for value, run in groupby(int(count) for count in counts))


def _seen(study: Study, key: str, role: str, row: Row) -> tuple[str, float]:
    """Image tokens by layer of a rival's prefill, and their mean; unknown beforehand for DyRate."""
    if row.key == "original":
        info = study.info(key)
        return show_counts(np.full(info.n_layers, info.n_image_tokens)), float(info.n_image_tokens)
    if row.key not in BY_KEY:
        return "by content", float("nan")
    found = fit(study, key, role, BY_KEY[row.key], study.scale.equal_level)
    plan = found.method.plan(study.info(key).n_image_tokens, study.info(key).n_layers, 1)
    return show_counts(plan[0]), float(plan[0].mean())


def equal_table(study: Study, key: str, role: str) -> pd.DataFrame:
    """One set at the common budget: quality with interval, paired differences to unpruned and to random, real cost."""
    rows, options = equal_rows(study, key, role), (study.scale.bootstrap, study.seed)
    base = quality(study, rows[0], role)
    control = quality(study, row_by_key(rows, "random"), role)
    score, out = "exact match %" if role == "questions" else "CIDEr", []
    for row in rows:
        each = quality(study, row, role)
        counts, mean = _seen(study, key, role, row)
        gap = show_interval(difference_with_interval(each, base, *options), 1)
        over = show_interval(difference_with_interval(each, control, *options), 1)
        out.append(
            {
                "model": study.label(key), "set": role, "method": row.label,
                f"{score} [95%]": show_interval(mean_with_interval(each, *options), 1),
                "minus original [95%]": "" if row.key == "original" else gap,
                "minus random [95%]": "" if row.key in ("original", "random") else over,
                "FLOPs % (paper)": 100 * per_picture(row, "flops", "paper").mean(),
                "FLOPs % (cached)": 100 * per_picture(row, "flops", "cached").mean(),
                "tokens a layer": mean, "image tokens by layer": counts, "n": each.size,
            }
        )  # fmt: skip
    return pd.DataFrame(out)


def equal_captions(study: Study) -> pd.DataFrame:
    """`equal_table` of every model and caption set, one below the other."""
    return pd.concat([equal_table(study, key, role) for key in models(study) for role in roles(study)], ignore_index=True)


def equal_summary(study: Study) -> pd.DataFrame:
    """Table II's form: one line a method, CIDEr by set, for each model."""
    out = []
    for key in models(study):
        by_role = {role: equal_rows(study, key, role) for role in roles(study)}
        labels = {row.key: row.label for rows in by_role.values() for row in rows}
        for name, label in labels.items():
            line: dict[str, Any] = {"model": study.label(key), "method": label}
            for role, rows in by_role.items():
                found = [row for row in rows if row.key == name]
                line[role] = cider(study, found[0], role).mean() if found else float("nan")
            out.append(line)
    return pd.DataFrame(out)


def equal_questions(study: Study) -> pd.DataFrame:
    """The questions at the common budget, exact match."""
    return pd.concat([equal_table(study, key, "questions") for key in models(study)], ignore_index=True)


def released_table(study: Study) -> pd.DataFrame:
    """The rivals at the settings that their code is released with, on the short captions."""
    out = []
    for key in models(study):
        rows, options = released_rows(study, key), (study.scale.bootstrap, study.seed)
        for row in rows:
            each, base = cider(study, row, "coco"), cider(study, rows[0], "coco")
            gap = show_interval(difference_with_interval(each, base, *options), 1)
            out.append(
                {
                    "model": study.label(key), "method": row.label,
                    "CIDEr [95%]": show_interval(mean_with_interval(each, *options), 1),
                    "minus original [95%]": "" if row.key == "original" else gap,
                    "image tokens read": float(np.mean([r["kept"][0] for c in row.cells for r in c["payload"]])),
                    "FLOPs % (paper)": 100 * per_picture(row, "flops", "paper").mean(),
                    "FLOPs % (cached)": 100 * per_picture(row, "flops", "cached").mean(),
                }
            )  # fmt: skip
    return pd.DataFrame(out)


def position_table(study: Study) -> pd.DataFrame:
    """Renumbered against kept positions, same tokens and budget; differences are paired."""
    out = []
    for key in models(study):
        for role in curve_roles(study):
            rows, options = position_rows(study, key, role), (study.scale.bootstrap, study.seed)
            for renumbered, kept in zip(rows[::2], rows[1::2], strict=True):
                a, b = quality(study, renumbered, role), quality(study, kept, role)
                control = quality(study, row_by_key(equal_rows(study, key, role), "random"), role)
                out.append(
                    {
                        "model": study.label(key), "set": role, "method": renumbered.label,
                        "renumbered (as released)": a.mean(), "positions kept": b.mean(),
                        "gain [95%]": show_interval(difference_with_interval(b, a, *options), 1),
                        "kept, minus random [95%]": show_interval(difference_with_interval(b, control, *options), 1),
                    }
                )  # fmt: skip
    return pd.DataFrame(out)


def paper_rows() -> pd.DataFrame:
    """The rows of the paper's Table I whose methods are built here, as printed."""
    table = load_paper("table1")
    built = ("PruMerge", "LLaVAv1.5", "FastV", "VTW", "SparseVLM", "VisionZip", "DyRate(ours)")
    return table[table.model.isin(built)].drop(columns=["bold", "quoted", "llm", "resolution"]).reset_index(drop=True)


def released_code() -> pd.DataFrame:
    """What each method's released code does and what became of it here, from data/paper/released_code.csv."""
    table = load_paper("released_code")
    names = {"released_code": "released code", "consequence": "what follows"}
    return table.rename(columns=names)


# --------------------------------------------------------------------------------------------------------- the curves


def curve_table(study: Study) -> pd.DataFrame:
    """What the curves are drawn from: quality with interval at each budget that a method reaches."""
    return remembered(study, ("curve table",), lambda: pd.DataFrame(_curve_lines(study)))


def _curve_lines(study: Study) -> list[dict[str, Any]]:
    out = []
    for key in models(study):
        for role in curve_roles(study):
            whole = Row("original", "Original", "original", (study.captions(key, role, study.method("original", key)),))
            first = {**whole.cells[0], "payload": whole.cells[0]["payload"][: curve_n(study, role)]}
            points = [Point("original", 1.0, Row("original", "Original", "original", (first,))), *curve(study, key, role)]
            for point in points:
                each = quality(study, point.row, role)
                found = mean_with_interval(each, study.scale.bootstrap, study.seed)
                out.append(
                    {
                        "model": study.label(key), "set": role, "method": point.row.label, "key": point.key,
                        "budget %": 100 * point.level, "FLOPs % (paper)": 100 * per_picture(point.row, "flops", "paper").mean(),
                        "FLOPs % (cached)": 100 * per_picture(point.row, "flops", "cached").mean(),
                        "quality": found["mean"], "lo": found["lo"], "hi": found["hi"], "n": found["n"],
                    }
                )  # fmt: skip
    return out


def curve_figure(study: Study) -> Figure:
    """Quality over FLOPs (paper's convention): one row a model, one column a kind of reply; bars are 95 % intervals."""
    table, keys, columns = curve_table(study), models(study), curve_roles(study)
    fig, axes = plt.subplots(
        len(keys), len(columns), figsize=(WIDTH_PAGE, 2.1 * len(keys) + 0.8), squeeze=False, sharex=True
    )
    handles: dict[str, Any] = {}
    for i, key in enumerate(keys):
        for j, role in enumerate(columns):
            ax, some = axes[i, j], table[(table.model == study.label(key)) & (table.set == role)]
            base = some[some.key == "original"].iloc[0]
            ax.axhspan(base.lo, base.hi, color="#000000", alpha=0.08, linewidth=0)
            handles.setdefault("Original", ax.axhline(base.quality, color="#000000", linewidth=0.8))
            for name, lines in some[some.key != "original"].groupby("key", sort=False):
                style = BY_KEY[name].style if name in BY_KEY else name
                label = BY_KEY[name].label.split(" (")[0] if name in BY_KEY else METHODS[style][0]
                handle = _draw(ax, lines.sort_values("FLOPs % (paper)"), style)
                handles.setdefault(label, handle)
            for row in position_rows(study, key, role)[1::2]:  # hollow: positions kept
                at = 100 * per_picture(row, "flops", "paper").mean(), quality(study, row, role).mean()
                ax.plot(*at, METHODS[row.style][2], color=METHODS[row.style][1], markersize=3.5, markerfacecolor="none")
            ax.set_xlim(10, 90)
            if i == 0:
                ax.set_title(TITLES[role])
            if i == len(keys) - 1:
                ax.set_xlabel("FLOPs %")
            if j == 0:
                ax.set_ylabel(f"{study.label(key).split(' (')[0]}\nCIDEr")
            if role == "questions":
                ax.set_ylabel("exact match %")
    fig.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=7, columnspacing=1.2)
    return fig


def _draw(ax: Any, lines: pd.DataFrame, style: str) -> Any:
    _, color, marker, linestyle = METHODS[style]
    x, y = lines["FLOPs % (paper)"], lines["quality"]
    ax.vlines(x, lines["lo"], lines["hi"], color=color, linewidth=0.5, alpha=0.6)
    bold = style == "dyrate"
    (handle,) = ax.plot(
        x, y, color=color, marker=marker, linestyle=linestyle, markersize=4.5 if bold else 3, linewidth=1.4 if bold else 0.8,
        zorder=4 if bold else 2,
    )  # fmt: skip
    return handle


def unreached_table(study: Study) -> pd.DataFrame:
    """Which budgets of the curves are out of a method's reach, and what its settings reach on that model."""
    return pd.DataFrame(missed_rows(study, unreached(study)), columns=MISSED)


def missed_rows(study: Study, missed: Sequence[tuple[str, str, str, Fit]]) -> list[dict[str, Any]]:
    """A row of `MISSED` for each model and method of what `equal_budget.missed` found."""
    found: dict[tuple[str, str], list[Fit]] = {}
    for name, key, _, asked in missed:
        found.setdefault((key, name), []).append(asked)
    return [
        {
            "model": study.label(key), "method": BY_KEY[name].label,
            "asked for, %": ", ".join(f"{value:g}" for value in sorted({100 * fit.wanted for fit in fits})),
            "from %": 100 * min(fit.lowest for fit in fits), "to %": 100 * max(fit.highest for fit in fits),
        }
        for (key, name), fits in found.items()
    ]  # fmt: skip


def equal_findings(study: Study) -> str:
    """Stable lines: at the common budget, which methods' intervals lie above random removal's, and which at the unpruned."""
    lines = []
    sets = [*roles(study), *(["questions"] if study.on_scenes else [])]
    for key in models(study):
        for role in sets:
            rows, options = equal_rows(study, key, role), (study.scale.bootstrap, study.seed)
            base, control = (quality(study, row_by_key(rows, name), role) for name in ("original", "random"))
            above: list[str] = []
            below: list[str] = []
            even: list[str] = []
            for row in rows[1:]:
                each = quality(study, row, role)
                if row.key != "random":
                    gap = difference_with_interval(each, control, *options)
                    (above if gap["lo"] > 0 else below if gap["hi"] < 0 else []).append(row.label)
                if difference_with_interval(each, base, *options)["hi"] >= 0:
                    even.append(row.label)
            said = f"above random: {', '.join(above) or 'none'}; below random: {', '.join(below) or 'none'}"
            said += f"; not below unpruned: {', '.join(even) or 'none'}"
            lines.append(f"{study.label(key)}, {ROLE_LABELS.get(role, role)}: {said}")
    return "\n".join(lines)
