"""The figures of notebook 05: CIDEr by decoding strategy, and CIDEr over FLOPs by the way the FLOPs are spent."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ..compare import load_paper
from ..plotting import COLORS, WIDTH_COLUMN, WIDTH_PAGE, method_style
from . import ablations
from .context import ROLE_LABELS, Study
from .summaries import difference_with_interval, mean_with_interval

_KEYS = {"fixed, matched": "fixed", "depth, matched": "depth"}
_ASIDE = {"fixed, matched": -1.0, "depth, matched": 1.0}  # points of FLOPs, so that equal costs do not lie on each other


def figure_decoding(study: Study) -> Figure:
    """CIDEr relative to greedy decoding by strategy, unpruned and under DyRate, paired 95 % intervals, and the paper's."""
    paper = load_paper("table4a").set_index("method")["nocaps"]
    role, shown = ablations.main_role(study), ablations.STRATEGIES[1:]
    fig, ax = plt.subplots(figsize=(WIDTH_COLUMN, 2.6))
    ax.axhline(0, color="black", lw=0.6)
    for kind, shift, label in (("original", -0.12, "unpruned (scenes)"), ("dyrate", 0.12, "DyRate (scenes)")):
        greedy = ablations.cider(study, ablations.decoded(study, kind, "greedy"), role)
        unit = 100 / max(float(greedy.mean()), 1e-9)
        found = [
            difference_with_interval(
                unit * ablations.cider(study, ablations.decoded(study, kind, strategy), role), unit * greedy,
                study.scale.bootstrap, study.seed,
            )
            for strategy in shown
        ]  # fmt: skip
        _errors(ax, np.arange(len(shown)) + shift, found, {**method_style(kind), "linestyle": "", "label": label})
    known = [(x, 100 * (paper[s] / paper["greedy"] - 1)) for x, s in enumerate(shown) if s in paper.index]
    x, y = zip(*known, strict=True)
    ax.plot(x, y, "D", color="none", markeredgecolor=COLORS["random"], label="paper (LLaVA-1.5-7B)")
    ax.set_xticks(np.arange(len(shown)), [ablations.STRATEGY_LABELS[s] for s in shown])
    ax.set(ylabel="CIDEr against greedy, %", xlim=(-0.5, len(shown) - 0.5))
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
            _errors(ax, [ratio + _ASIDE.get(row, 0.0)], [values], {**style, "markersize": 5.5})
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
