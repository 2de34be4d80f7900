"""Notebook 03, the cheap half: scores with intervals, and the paper's tables beside ours."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..compare import load_paper
from ..metrics import CaptionScores, exact_match
from ..plotting import METHODS, WIDTH_PAGE
from ..stats import bootstrap_interval
from .benchmarks import (
    ROLE_COLUMNS,
    Row,
    question_rows,
    refreshed_fastv,
    refreshed_models,
    remembered,
    row_by_key,
    table_rows,
    vtw_layer,
    vtw_search,
)
from .context import Record, Study
from .summaries import Quantity, difference_with_interval, mean_with_interval, show_interval

PAPER_MODELS = {"small": "LLaVA-1.5-7B", "base": "LLaVA-1.5-13B"}


# ---------------------------------------------------------------------------------------------------------- numbers


def cider(study: Study, row: Row, role: str) -> np.ndarray:
    """CIDEr (x 100) of each picture, averaged over the row's seeds: [n], pictures in the order of their ids."""
    return remembered(
        study, ("cider", role, id(row)), lambda: np.mean([s.per_image_cider for s in scores(study, row, role)], axis=0)
    )


def scores(study: Study, row: Row, role: str) -> list[CaptionScores]:
    """The scores of each of the row's cells (seeds)."""
    return remembered(study, ("scores", role, id(row)), lambda: [study.scores(cell, role) for cell in row.cells])


def per_picture(row: Row, field: str, convention: str = "") -> np.ndarray:
    """A number of each picture's record (`steps`, or `flops` in a convention), averaged over seeds: [n]."""
    return np.mean(
        [[r[field][convention] if convention else r[field] for r in cell["payload"]] for cell in row.cells], axis=0
    )


def relative(study: Study, a: np.ndarray, b: np.ndarray) -> Quantity:
    """(a - b) / b of the means over the same pictures, with a bootstrap interval that resamples both together."""
    random = np.random.default_rng(study.seed)
    draws = random.integers(0, a.size, size=(study.scale.bootstrap, a.size))
    with np.errstate(divide="ignore", invalid="ignore"):
        means = a[draws].mean(1) / b[draws].mean(1) - 1
        mean = float(a.mean() / b.mean() - 1)
    if not np.isfinite(mean) or not np.isfinite(means).all():  # nothing to be relative to
        return {"mean": float("nan"), "n": int(a.size)}
    lo, hi = np.quantile(means, [0.025, 0.975])
    return {"mean": mean, "lo": float(lo), "hi": float(hi), "n": int(a.size)}


def caption_table(study: Study, key: str, role: str) -> pd.DataFrame:
    """One set's rows: CIDEr and its difference to the unpruned model with intervals, BLEU-4, ROUGE-L, FLOPs, tokens."""
    rows = table_rows(study, key, role)
    base = cider(study, row_by_key(rows, "original"), role)
    out = []
    for row in rows:
        seeds = scores(study, row, role)
        each = cider(study, row, role)
        score = mean_with_interval(each, study.scale.bootstrap, study.seed)
        gap = difference_with_interval(each, base, study.scale.bootstrap, study.seed)
        out.append(
            {
                "model": study.label(key), "set": role, "method": row.label, "CIDEr [95%]": show_interval(score, 2),
                "minus original [95%]": "" if row.key == "original" else show_interval(gap, 2),
                "BLEU-4": np.mean([s.bleu4 for s in seeds]), "ROUGE-L": np.mean([s.rouge_l for s in seeds]),
                "FLOPs % (paper)": 100 * per_picture(row, "flops", "paper").mean(),
                "FLOPs % (cached)": 100 * per_picture(row, "flops", "cached").mean(),
                "tokens": per_picture(row, "steps").mean(), "seeds": len(row.cells), "pictures": each.size,
            }
        )  # fmt: skip
    return pd.DataFrame(out)


def all_captions(study: Study) -> pd.DataFrame:
    """`caption_table` of every model and set, one below the other."""
    return pd.concat([caption_table(study, key, role) for key in study.keys for role in study.roles], ignore_index=True)


def seed_table(study: Study) -> pd.DataFrame:
    """DyRate at 0.333, each seed apart: CIDEr and FLOPs by model and set."""
    out = []
    for key in study.keys:
        for role in study.roles:
            for seed, cell in enumerate(row_by_key(table_rows(study, key, role), "dyrate").cells):
                flops = np.mean([row["flops"]["paper"] for row in cell["payload"]])
                score = study.scores(cell, role).cider
                out.append(
                    {
                        "model": study.label(key),
                        "set": role,
                        "seed": seed,
                        "CIDEr": score,
                        "FLOPs % (paper)": 100 * flops,
                    }
                )
    return pd.DataFrame(out)


def paper_table(study: Study) -> pd.DataFrame:
    """Table II as printed beside ours: for each role, the paper's CIDEr and ours, and each one's change against its original."""
    table = load_paper("table2")
    out = []
    for key in study.keys:
        rows = {role: table_rows(study, key, role) for role in study.roles if role in ROLE_COLUMNS}
        printed = table[table.model == PAPER_MODELS[key]].set_index("method")
        for method in printed.index:
            line: dict[str, Any] = {"model": f"{PAPER_MODELS[key]} / {study.label(key)}", "method": METHODS[method][0]}
            for role, column in ROLE_COLUMNS.items():
                line[f"{role} paper"] = printed.loc[method, column]
                line[f"{role} paper, change %"] = 100 * (
                    printed.loc[method, column] / printed.loc["original", column] - 1
                )
                if role in rows:
                    ours = cider(study, row_by_key(rows[role], method), role)
                    base = cider(study, row_by_key(rows[role], "original"), role)
                    line[f"{role} ours"] = ours.mean()
                    line[f"{role} ours, change %"] = 100 * relative(study, ours, base)["mean"]
            out.append(line)
    return pd.DataFrame(out)


def agreement_table(study: Study) -> pd.DataFrame:
    """How far the unpruned model is from what one reference scores against the others, by set."""
    out = []
    for key in study.keys:
        for role in study.roles:
            ours = cider(study, row_by_key(table_rows(study, key, role), "original"), role).mean()
            human = study.reference_scores(role).cider
            share = 100 * ours / human if human else float("nan")
            out.append({"model": study.label(key), "set": role, "unpruned": ours, "one reference": human, "%": share})
    return pd.DataFrame(out)


def search_table(study: Study) -> pd.DataFrame:
    """VTW's search: the layers where the next-token distribution changes least, and the layer its threshold gives."""
    out = []
    for key in study.keys:
        divergence = {int(k): v for k, v in vtw_search(study, key)["payload"]["divergence"].items()}
        half, best = study.info(key).n_layers // 2, min(divergence, key=lambda k: divergence[k])
        out.append(
            {
                "model": study.label(key), "layers": study.info(key).n_layers, "half depth": half,
                "KL at half depth": divergence.get(half, float("nan")), "layer found": str(vtw_layer(study, key) or "none"),
                "smallest KL": divergence[best], "at layer": best,
            }
        )  # fmt: skip
    return pd.DataFrame(out)


def refresh_table(study: Study) -> pd.DataFrame:
    """FastV with and without a cache on the same pictures."""
    out = []
    for key in refreshed_models(study):
        refreshed: Record = refreshed_fastv(study, key)
        n = len(refreshed["payload"])
        whole = study.captions(key, "coco", study.method("fastv-2", key))
        cached = {**whole, "payload": whole["payload"][:n]}  # the same pictures
        a, b = (study.scores(cell, "coco").per_image_cider for cell in (refreshed, cached))
        gap = difference_with_interval(a, b, study.scale.bootstrap, study.seed)
        flops = [100 * np.mean([row["flops"]["cached"] for row in cell["payload"]]) for cell in (refreshed, cached)]
        out.append(
            {
                "model": study.label(key), "pictures": n, "no cache, pruned anew": a.mean(), "cached": b.mean(),
                "difference [95%]": show_interval(gap, 2), "FLOPs % (cached), no cache": flops[0],
                "FLOPs % (cached), cached": flops[1],
            }
        )  # fmt: skip
    return pd.DataFrame(out)


# -------------------------------------------------------------------------------------------------------- questions


def answers(study: Study, row: Row) -> tuple[np.ndarray, list[str]]:
    """Points (0 to 100) of each question, averaged over seeds, and the questions' kinds."""
    data = study.dataset("questions")
    references = data.references()
    kinds = [item.meta["kind"] for item in data]
    points = []
    for cell in row.cells:
        right = exact_match({r["id"]: r["text"] for r in cell["payload"]}, references)
        points.append([100.0 * right[r["id"]] for r in cell["payload"]])
    return np.mean(points, axis=0), kinds


def question_table(study: Study) -> pd.DataFrame:
    """Exact match by method and kind of question, with the interval of the whole, and FLOPs."""
    out = []
    for key in study.keys:
        for row in question_rows(study, key):
            points, kinds = answers(study, row)
            whole = mean_with_interval(points, study.scale.bootstrap, study.seed)
            by_kind = {kind: points[[k == kind for k in kinds]].mean() for kind in dict.fromkeys(kinds)}
            flops = 100 * per_picture(row, "flops", "paper").mean()
            out.append(
                {
                    "model": study.label(key),
                    "method": row.label,
                    "all [95%]": show_interval(whole, 1),
                    **by_kind,
                    "FLOPs % (paper)": flops,
                }
            )
    return pd.DataFrame(out)


def paper_table_1() -> pd.DataFrame:
    """The rows of the paper's Table I that concern this study, as printed."""
    table = load_paper("table1")
    wanted = ("LLaVAv1.5", "FastV", "VTW", "DyRate(ours)")
    columns = ["model", "gqa", "vizwiz", "sqa", "vqa", "pope", "mmb", "mme"]
    return table[table.model.isin(wanted)][columns].reset_index(drop=True)


# ----------------------------------------------------------------------------------------------------------- figure


def tradeoff_figure(study: Study) -> Figure:
    """CIDEr over FLOPs (paper's convention) of every method: one row a model, one column a set."""
    shape = (len(study.keys), len(study.roles))
    fig, axes = plt.subplots(*shape, figsize=(WIDTH_PAGE, 1.75 * shape[0] + 0.55), squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for i, key in enumerate(study.keys):
        for j, role in enumerate(study.roles):
            ax = axes[i, j]
            dyrate: list[tuple[float, float]] = []
            for row in table_rows(study, key, role):
                each = cider(study, row, role)
                x, y = 100 * per_picture(row, "flops", "paper").mean(), each.mean()
                lo, hi = bootstrap_interval(each, study.scale.bootstrap, study.seed)
                _, color, marker, _ = METHODS[row.style]
                hollow = row.key in ("vtw-search", "random-matched")
                face = "none" if hollow else color
                handle = ax.errorbar(
                    x,
                    y,
                    yerr=[[max(0.0, y - lo)], [max(0.0, hi - y)]],
                    color=color,
                    marker=marker,
                    markerfacecolor=face,
                    linestyle="none",
                    elinewidth=0.7,
                )
                label = {"vtw-search": "VTW, its search", "random-matched": "Random, DyRate's cost"}.get(
                    row.key, METHODS[row.style][0]
                )
                handles.setdefault(label, handle)
                dyrate += [(x, y)] if row.style == "dyrate" else []
            ax.plot(*zip(*sorted(dyrate), strict=True), color=METHODS["dyrate"][1], linewidth=0.8, zorder=1)
            ax.set_xlim(0, 105)
            if i == 0:
                ax.set_title(role)
            if i == shape[0] - 1:
                ax.set_xlabel("FLOPs %")
        axes[i, 0].set_ylabel(f"{study.label(key).split(' (')[0]}\nCIDEr")
    fig.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5)
    return fig
