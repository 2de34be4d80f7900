"""Notebook 02, the cheap half: from training records and schedules to curves, tables and what the claims are judged by."""

from __future__ import annotations

from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..compare import load_paper
from ..plotting import BLACK, BLUE, GREY, ORANGE, PURPLE, VERMILION, WIDTH_PAGE
from . import training_runs as runs
from .context import Record, Study
from .summaries import difference_with_interval, largest, mean_course, mean_with_interval, show_interval

TARGET_COLORS = {0.5: BLUE, 0.333: VERMILION, 0.2: PURPLE}
_LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
Cells = dict[tuple[str, float, int], Record]


def target_color(target: float) -> str:
    """One colour a budget, the same in every figure."""
    return TARGET_COLORS.get(target, BLACK)


# -------------------------------------------------------------------------------------------------------- learning


def history(record: Record) -> pd.DataFrame:
    """The training curve: step, loss, ce, flops_ratio (expected), hard_ratio (the path that inference takes), tau."""
    return pd.DataFrame(record["payload"]["history"])


def learning_data(cells: Cells) -> pd.DataFrame:
    """All curves, one row a step: model, target, seed and the columns of `history`."""
    return pd.concat(
        [history(record).assign(model=key, target=target, seed=seed) for (key, target, seed), record in cells.items()],
        ignore_index=True,
    )


def learning_figure(study: Study, cells: Cells) -> Figure:
    """Cross-entropy and FLOPs ratio over training steps; one column a model, one colour a budget, one line style a seed."""
    keys = [key for key in study.keys if any(cell[0] == key for cell in cells)]
    fig, axes = plt.subplots(2, len(keys), figsize=(WIDTH_PAGE, 3.7), sharex=True, squeeze=False)
    for column, key in enumerate(keys):
        top, bottom = axes[:, column]
        for (_, target, seed), record in ((cell, r) for cell, r in cells.items() if cell[0] == key):
            curve, line = (
                history(record),
                {"color": target_color(target), "linestyle": _LINES[seed % len(_LINES)], "linewidth": 0.9},
            )
            width = max(1, len(curve) // 30)
            top.plot(curve.step, curve.ce.rolling(width, min_periods=1).mean(), **line)
            bottom.plot(curve.step, curve.hard_ratio.rolling(width, min_periods=1).mean(), **line)
        for target in sorted({cell[1] for cell in cells if cell[0] == key}):
            bottom.axhline(target, color=GREY, linewidth=0.6, zorder=0)
        top.set_title(study.label(key))
        bottom.set_xlabel("training step")
        bottom.set_ylim(0, 1.02)
    axes[0, 0].set_ylabel("cross-entropy")
    axes[1, 0].set_ylabel("FLOPs ratio,\nhard choices")
    targets = sorted({cell[1] for cell in cells}, reverse=True)
    handles = [Line2D([], [], color=target_color(t), label=f"target {t:g}") for t in targets]
    handles += [
        Line2D([], [], color=BLACK, linestyle=_LINES[s % 3], label=f"seed {s}")
        for s in sorted({cell[2] for cell in cells})
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


def objective_drop(record: Record) -> float:
    """Mean loss over the first tenth of the steps minus that over the last tenth."""
    loss = history(record).loss.to_numpy()
    tenth = max(1, len(loss) // 10)
    return float(loss[:tenth].mean() - loss[-tenth:].mean())


def objective_line(cells: Cells) -> str:
    """One stable line about whether the loss fell."""
    fell = sum(objective_drop(record) > 0 for record in cells.values())
    return f"the training objective fell from the first to the last tenth of the steps for {fell} of {len(cells)} predictors"


# ------------------------------------------------------------------------------------------------- budgets (C5)


def ratios(record: Record, convention: str = "paper") -> np.ndarray:
    """FLOPs ratio of each picture, [n]."""
    return np.array([row["flops"][convention] for row in record["payload"]])


def budget_table(study: Study, cells: Cells) -> pd.DataFrame:
    """Asked and reached FLOPs ratio of each predictor on held-out pictures, as inference chooses (argmax)."""
    rows = []
    for (key, target, seed), record in cells.items():
        payload = record["payload"]
        reached = mean_with_interval(ratios(record), study.scale.bootstrap, study.seed)
        kept = np.array([row["kept"][0] for row in payload]), np.array([row["kept"][-1] for row in payload])
        families = {f: ratios({"payload": [r for r in payload if r["family"] == f]}).mean() for f in _families(record)}  # type: ignore[dict-item]
        rows.append(
            {"model": study.label(key), "seed": seed, "asked": target, "reached (paper) [95%]": show_interval(reached),
             "error": reached["mean"] - target,
             **{f"{family} (paper)": value for family, value in families.items()},
             "cached": ratios(record, "cached").mean(), "kept at prefill": kept[0].mean(), "kept at the end": kept[1].mean()}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _families(record: Record) -> list[str]:
    return list(dict.fromkeys(row["family"] for row in record["payload"]))


def budget_quantities(study: Study, cells: Cells) -> dict[str, Any]:
    """c5.*: the worst seed's distance between the ratio asked for and the one reached, by model and target."""
    out: dict[str, Any] = {}
    for key, target, _ in cells:
        seeds = [record for (k, t, _), record in cells.items() if (k, t) == (key, target)]
        errors = [abs(float(ratios(record).mean()) - target) for record in seeds]
        out[f"c5.{key}.t{target:g}.abs_error_max"] = {"mean": largest(errors), "n": len(seeds[0]["payload"])}
    return out


# ------------------------------------------------------------------------------------------------------- schedules


def kept_courses(record: Record, family: str) -> list[list[float]]:
    """Share of image tokens kept at each step, one list a picture of that family."""
    return [[k / row["n_image"] for k in row["kept"]] for row in record["payload"] if row["family"] == family]


def schedule_figure(study: Study, cells: Cells) -> Figure:
    """Share of image tokens kept over steps: rows are models, columns caption families, colours budgets, line styles seeds.

    The band is the middle 80 % of pictures for the first seed. Lines end where fewer than half of the pictures still generate.
    """
    keys = [key for key in study.keys if any(cell[0] == key for cell in cells)]
    families = _families(next(iter(cells.values())))
    fig, axes = plt.subplots(
        len(keys), len(families), figsize=(WIDTH_PAGE, 1.6 * len(keys) + 0.6), sharex="col", sharey=True, squeeze=False
    )
    first = min(cell[2] for cell in cells)
    for (key, target, seed), record in cells.items():
        for column, family in enumerate(families):
            course, ax = mean_course(kept_courses(record, family)), axes[keys.index(key), column]
            ax.plot(
                course["step"],
                course["mean"],
                color=target_color(target),
                linestyle=_LINES[seed % len(_LINES)],
                linewidth=1.0,
            )
            if seed == first:
                ax.fill_between(
                    course["step"], course["p10"], course["p90"], color=target_color(target), alpha=0.15, linewidth=0
                )
    for row, key in enumerate(keys):
        axes[row, 0].set_ylabel(f"{study.label(key).split(' (')[0]}\nkept share")
        axes[row, 0].set_ylim(0, 1.02)
    for column, family in enumerate(families):
        axes[0, column].set_title(family)
        axes[-1, column].set_xlabel("generation step")
    handles = [
        Line2D([], [], color=target_color(t), label=f"target {t:g}")
        for t in sorted({cell[1] for cell in cells}, reverse=True)
    ]
    handles += [
        Line2D([], [], color=BLACK, linestyle=_LINES[s % 3], label=f"seed {s}")
        for s in sorted({cell[2] for cell in cells})
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


def schedule_data(cells: Cells) -> pd.DataFrame:
    """What `schedule_figure` draws: model, target, seed, family, step, mean, p10, p90, n."""
    parts = []
    for (key, target, seed), record in cells.items():
        for family in _families(record):
            course = pd.DataFrame(mean_course(kept_courses(record, family)))
            parts.append(course.assign(model=key, target=target, seed=seed, family=family))
    return pd.concat(parts, ignore_index=True)


def schedule_line(cells: Cells) -> str:
    """One stable line: in how many schedules the kept share falls after prefill, and by how much it falls on average."""
    falls = [
        np.mean([course[0] - course[-1] for course in kept_courses(record, family)])
        for record in cells.values()
        for family in _families(record)
    ]
    falling = sum(fall > 0 for fall in falls)
    return (
        f"the kept share falls after prefill in {falling} of {len(falls)} schedules (predictor x family), "
        f"by {np.mean(falls):.3f} on average"
    )


# ------------------------------------------------------------------------------------------------------------- F3


def masked_table(record: Record) -> pd.DataFrame:
    """Masked against discarded: paths, steps, the largest difference of logits and how large logits are."""
    payload = record["payload"]
    return pd.DataFrame(
        [{"rate paths": len(payload["differences"]), "steps": sum(payload["steps"]),
         "largest difference of logits": f"{max(payload['differences']):.1e}",
          "largest logit": payload["largest_logit"]}]
    )  # fmt: skip


def gradient_table(record: Record) -> pd.DataFrame:
    """Straight-through gradient of the toy beside the exact one, by temperature."""
    return pd.DataFrame(
        [
            {
                "temperature of the distribution": case["sharpening"], "of the soft sample": case["sample"],
                "cosine to exact": case["cosine"], "length / exact": case["length_ratio"],
                "entries of equal sign": case["same_sign"],
            }
            for case in record["payload"]["cases"]
        ]
    )  # fmt: skip


def gradient_figure(record: Record) -> Figure:
    """Every entry of the toy's gradient: straight-through mean against the exact value, at training's temperatures."""
    cases = record["payload"]["cases"][:3]
    fig, axes = plt.subplots(1, len(cases), figsize=(WIDTH_PAGE, 2.1), sharex=True, sharey=True)
    limit = 1.15 * max(np.abs(case[name]).max() for case in cases for name in ("exact", "gradient"))
    for ax, case in zip(axes, cases, strict=True):
        ax.plot([-limit, limit], [-limit, limit], color=GREY, linewidth=0.7)
        points = np.array(case["exact"]).ravel(), np.array(case["gradient"]).ravel()
        ax.plot(*points, "o", color=ORANGE, markeredgecolor=BLACK, markeredgewidth=0.4)
        ax.set_title(f"temperature {case['sharpening']:g}: cosine {case['cosine']:.2f}")
        ax.set_xlabel("exact gradient")
    axes[0].set_ylabel("straight-through,\nmean of samples")
    return fig


def fixed_table(study: Study) -> pd.DataFrame:
    """DyRate (mean over seeds) beside one fixed rate of the same cost, on the short captions."""
    rows = []
    for key in study.keys:
        dyrate, fixed = _dyrate_and_fixed(study, key)
        cells = runs.dyrate_cells(study, key)
        difference = difference_with_interval(dyrate, fixed[0], study.scale.bootstrap, study.seed)
        rows.append(
            {"model": study.label(key), "DyRate CIDEr": dyrate.mean(), "fixed-rate CIDEr": fixed[0].mean(),
             "difference [95%]": show_interval(difference, 2),
             "DyRate FLOPs (paper)": np.mean([ratios(cell).mean() for cell in cells]),
             "fixed FLOPs (paper)": ratios(fixed[1]).mean()}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _dyrate_and_fixed(study: Study, key: str) -> tuple[np.ndarray, tuple[np.ndarray, Record]]:
    """CIDEr of each picture: DyRate averaged over seeds, and the fixed rate with its record."""
    seeds = [study.scores(cell, "coco").per_image_cider for cell in runs.dyrate_cells(study, key)]
    fixed = runs.fixed_cell(study, key)
    return np.mean(seeds, axis=0), (study.scores(fixed, "coco").per_image_cider, fixed)


def quantities(study: Study) -> dict[str, Any]:
    """c5.* and f3.*, as claims.yaml names them."""
    trained = runs.trained_cells(study)
    out = budget_quantities(study, runs.schedules(study))
    masked = runs.masked_against_discarded(study)["payload"]["differences"]
    out["f3.masked_minus_discarded"] = {"mean": largest(masked), "n": len(masked)}
    for key in study.keys:
        seeds = [record for (k, target, _), record in trained.items() if k == key and target == runs.BUDGET]
        if seeds:
            worst = -largest(-objective_drop(record) for record in seeds)
            out[f"f3.{key}.objective_drop"] = {"mean": worst, "n": len(history(seeds[0]))}
        dyrate, fixed = _dyrate_and_fixed(study, key)
        out[f"f3.{key}.dyrate_minus_fixed"] = difference_with_interval(
            dyrate, fixed[0], study.scale.bootstrap, study.seed
        )
    return out


def paper_savings() -> pd.DataFrame:
    """What the paper prints about budgets: the savings asked for (Sec. IV-C) and the FLOPs shown (Table III)."""
    text = load_paper("text").set_index("id")
    table = load_paper("table3")
    shown = table[table.method == "dyrate"][["model", "tflops_percent"]]
    rows = [
        {"paper": f"saving asked for, Sec. IV-C ({name})", "value": f"{text.value[name]:g} % of the FLOPs"}
        for name in ("savings_low", "savings_high")
    ]
    rows += [
        {"paper": f"Table III, {model}", "value": f"{percent:.2f} % of the FLOPs"}
        for model, percent in shown.itertuples(index=False)
    ]
    return pd.DataFrame(rows)


def gradient_lines(record: Record) -> str:
    """Three stable lines on what the toy shows."""
    payload = record["payload"]
    term, worst = payload["flops_term"], min(case["cosine"] for case in payload["cases"])
    return (
        f"exact gradient against finite differences: differs by {payload['exact_minus_differences']:.0e} at most\n"
        f"expected FLOPs in closed form against all paths listed: value differs by {term['value_difference']:.0e}, gradient by "
        f"{term['gradient_difference']:.0e} (its length is {term['gradient_norm']:.3f}, so it is not zero)\n"
        f"straight-through against exact: cosine {worst:.2f} or more at the temperatures tried"
    )
