"""The figures of notebook 05: CIDEr by decoding strategy, and CIDEr over FLOPs by the way the FLOPs are spent."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..compare import load_paper
from ..plotting import COLORS, WIDTH_COLUMN, WIDTH_PAGE, method_style
from . import ablations
from .context import ROLE_LABELS, Study
from .summaries import mean_with_interval

_KEYS = {"fixed, matched": "fixed", "depth, matched": "depth"}


def figure_decoding(study: Study) -> Figure:
    """CIDEr by decoding strategy, unpruned and under DyRate, with 95 % intervals; the paper's values beside them."""
    paper = load_paper("table4a").set_index("method")["nocaps"]
    role, place = ablations.main_role(study), np.arange(len(ablations.STRATEGIES))
    fig, ax = plt.subplots(figsize=(WIDTH_COLUMN, 2.5))
    for kind, shift in (("original", -0.15), ("dyrate", 0.15)):
        found = [
            mean_with_interval(
                ablations.cider(study, ablations.decoded(study, kind, strategy), role), study.scale.bootstrap, study.seed
            )
            for strategy in ablations.STRATEGIES
        ]
        style = {**method_style(kind), "linestyle": ""}
        style["label"] = {"original": "unpruned (scenes)", "dyrate": "DyRate (scenes)"}[kind]
        _errors(ax, place + shift, found, style)
    known = [(x, paper[s]) for x, s in zip(place, ablations.STRATEGIES, strict=True) if s in paper.index]
    ax.plot(*zip(*known, strict=True), "D", color="none", markeredgecolor=COLORS["random"], label="paper (LLaVA-1.5-7B)")
    labels = [ablations.STRATEGY_LABELS[s].replace(" = ", "\n= ") for s in ablations.STRATEGIES]
    ax.set_xticks(place, labels)
    ax.set_ylabel("CIDEr")
    fig.legend(loc="outside upper center", ncol=3, columnspacing=0.8, handletextpad=0.2)
    return fig


def figure_pruning(study: Study) -> Figure:
    """CIDEr over FLOPs (paper's convention) with 95 % intervals, one panel a set; hollow: at DyRate's FLOPs."""
    roles = ablations.roles(study)
    fig, axes = plt.subplots(1, len(roles), figsize=(WIDTH_PAGE * len(roles) / 2, 2.6), squeeze=False)
    for ax, role in zip(axes[0], roles, strict=True):
        for row in ablations.PRUNING:
            records = ablations.pruned(study, role, row)
            ratio = 100 * float(np.mean([ablations.flops_ratio(record) for record in records]))
            values = mean_with_interval(ablations.cider(study, records, role), study.scale.bootstrap, study.seed)
            style = {**method_style(_KEYS.get(row, row)), "linestyle": "", "label": ablations.PRUNING_LABELS[row]}
            if row in _KEYS:
                style["markerfacecolor"] = "none"
            _errors(ax, [ratio], [values], style)
        ax.set_title(ROLE_LABELS[role] if study.on_scenes else "COCO folder", fontsize=7)
        ax.set(xlabel="FLOPs, % of unpruned (paper's convention)", xlim=(20, 105))
    axes[0, 0].set_ylabel("CIDEr")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncol=4, columnspacing=1.0)
    return fig


def _errors(ax, x, values: list[dict[str, float]], style: dict) -> None:
    means = np.array([value["mean"] for value in values])
    low = means - np.array([value["lo"] for value in values])
    high = np.array([value["hi"] for value in values]) - means
    ax.errorbar(x, means, yerr=np.clip([low, high], 0, None), capsize=2, elinewidth=0.8, **style)
