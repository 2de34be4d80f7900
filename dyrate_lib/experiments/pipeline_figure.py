"""Fig. 3: the pipeline of one step, drawn by matplotlib (no run behind it; rates and shares shown are made up)."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from ..plotting import BLACK, BLUE, GREEN, GREY, TOKEN_COLORS, TOKEN_TYPES, VERMILION, WIDTH_PAGE

_LIGHT = "#F2F2F2"
_SHARES = np.array(
    [[0.25, 0.45, 0.20, 0.10], [0.40, 0.20, 0.25, 0.15], [0.10, 0.60, 0.10, 0.20], [0.30, 0.15, 0.15, 0.40]]
)
_PROBABILITIES = np.array([0.02, 0.03, 0.04, 0.06, 0.10, 0.17, 0.33, 0.15, 0.07, 0.03])


def _box(
    ax: Axes,
    x: float,
    y: float,
    w: float,
    h: float,
    text: str,
    face: str = _LIGHT,
    edge: str = BLACK,
    size: float = 6.5,
) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y), w, h, boxstyle="round,pad=0,rounding_size=0.6", facecolor=face, edgecolor=edge, linewidth=0.8
        )
    )
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, linespacing=1.25)


def _arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = BLACK,
    dashed: bool = False,
    bend: float = 0.0,
) -> None:
    style = f"arc3,rad={bend}"
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=7, color=color, linewidth=0.9, linestyle="--" if dashed else "-",
            connectionstyle=style, shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def _tokens(ax: Axes, x: float, y: float, faded: int = 0, size: float = 1.75) -> float:
    """A row of tokens: 2 system, 8 image (the last `faded` of them dropped), 2 instruction, 3 response; returns its end."""
    kinds = ["sys"] * 2 + ["img"] * 8 + ["ins"] * 2 + ["res"] * 3
    for i, kind in enumerate(kinds):
        dropped = kind == "img" and i >= 10 - faded
        ax.add_patch(
            Rectangle(
                (x + i * size, y), size * 0.82, 2.6, facecolor="none" if dropped else TOKEN_COLORS[kind],
                edgecolor=GREY if dropped else "none", linewidth=0.5, linestyle=":" if dropped else "-",
            )
        )  # fmt: skip
    return x + len(kinds) * size


def draw_pipeline() -> Figure:
    """The pipeline of one step: features at layer P - 1, classifier, rate, nested mask; training above, inference below.

    The caller closes the figure (or hands it to save_figure).
    """
    fig, ax = plt.subplots(figsize=(WIDTH_PAGE, 3.25), layout="none")
    ax.set_position((0.0, 0.0, 1.0, 1.0))
    ax.set_xlim(0, 143.2)
    ax.set_ylim(0, 65)
    ax.set_axis_off()
    _left(ax)
    _middle(ax)
    _training(ax)
    _inference(ax)
    return fig


def _left(ax: Axes) -> None:
    """Tokens, the layers below P, and the newest row's attention at layer P - 1."""
    ax.text(15.5, 61.0, "prompt and response so far", ha="center", fontsize=7)
    end = _tokens(ax, 2.5, 56.5)
    ax.text(end - 1.1, 53.6, "newest", fontsize=6, ha="center", color=TOKEN_COLORS["res"])
    for i, kind in enumerate(TOKEN_TYPES):
        ax.add_patch(Rectangle((3.2 + 6.6 * i, 49.6), 1.5, 1.9, facecolor=TOKEN_COLORS[kind]))
        ax.text(5.1 + 6.6 * i, 50.5, kind, fontsize=6.5, va="center")
    _arrow(ax, (15.5, 48.6), (15.5, 44.4))
    _box(ax, 3, 36.4, 25, 8, "layers 0 … P−1\nsee every token")
    _arrow(ax, (15.5, 36.4), (15.5, 32.2))
    _box(ax, 3, 21.2, 25, 11, "layer P−1: attention of\nthe newest row, summed\nover the four types")
    _arrow(ax, (15.5, 21.2), (15.5, 18.6))
    ax.text(15.5, 16.0, r"$v_t$: 4 shares for each head", ha="center", fontsize=6.5)
    left, width = 6.5, 20.0
    for head, shares in enumerate(_SHARES):
        x = left
        for kind, share in zip(TOKEN_TYPES, shares, strict=True):
            ax.add_patch(
                Rectangle(
                    (x, 12.4 - 2.5 * head),
                    width * share,
                    1.9,
                    facecolor=TOKEN_COLORS[kind],
                    edgecolor="white",
                    linewidth=0.4,
                )
            )
            x += width * share
    ax.text(left - 0.7, 13.3, "1", fontsize=6, ha="right", va="center")
    ax.text(left - 0.7, 9.6, "head", fontsize=6, ha="right", va="center")
    ax.text(left - 0.7, 5.8, "H", fontsize=6, ha="right", va="center")
    ax.text(16.5, 1.6, "again at every step t", ha="center", fontsize=6, color=GREY)


def _middle(ax: Axes) -> None:
    """The ranking, the classifier, and its distribution over rates."""
    ax.plot([28, 31.5, 31.5], [28.0, 28.0, 56.5], color=BLACK, linewidth=0.9)
    _arrow(ax, (31.5, 56.5), (34.5, 56.5))
    _box(ax, 34, 51.4, 23, 10.2, "image tokens ranked once:\nhead-mean attention\nof the last prompt row", size=5.6)
    ax.text(45.5, 47.3, r"$\pi_t$ over rates $r_k=(k-1)/n$", ha="center", fontsize=6.5)
    for k, p in enumerate(_PROBABILITIES):
        ax.add_patch(Rectangle((36.7 + 1.8 * k, 34.2), 1.3, 34 * p, facecolor=VERMILION if k == 6 else GREY))
    ax.plot([36.2, 55.0], [34.1, 34.1], color=BLACK, linewidth=0.6)
    ax.text(36.5, 33.3, "0", fontsize=5.5, ha="left", va="top")
    ax.text(54.9, 33.3, "0.9", fontsize=5.5, ha="right", va="top")
    _arrow(ax, (45.5, 26.2), (45.5, 33.0))
    _box(
        ax,
        34.5,
        15.2,
        22,
        11,
        "linear classifier $C_\\theta$\n4H inputs, n rates\n(all that is trained)",
        face="#FBE6D8",
        edge=VERMILION,
    )
    _arrow(ax, (26.9, 9.6), (34.5, 17.0))


def _panel(ax: Axes, y: float, h: float, title: str, color: str) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (62.5, y), 79.6, h, boxstyle="round,pad=0,rounding_size=1", facecolor="none", edgecolor=color, linewidth=0.9
        )
    )
    ax.text(64.0, y + h - 2.2, title, fontsize=7, color=color, weight="bold", va="center")


def _training(ax: Axes) -> None:
    _panel(ax, 34.5, 29.3, "training: one teacher-forced pass, masks", BLUE)
    ax.plot([56.5, 96.5, 96.5], [57.6, 57.6, 56.0], color=BLACK, linewidth=0.9)
    _arrow(ax, (96.5, 56.6), (96.5, 54.5))
    _arrow(ax, (55.8, 44.6), (64.5, 47.2))
    _box(ax, 64.5, 43.5, 18.5, 11, "Gumbel-softmax,\nstraight through:\none-hot $y_t$", face="#E1EDF6")
    _arrow(ax, (83, 49.0), (86, 49.0))
    _box(
        ax,
        86,
        43.5,
        22.5,
        11,
        "$m_t=m_{t-1}\\,\\Sigma_k\\, y_{t,k}m^k$,\ndiagonal always 1,\nwith the causal mask",
        face="#E1EDF6",
    )
    _arrow(ax, (108.5, 49.0), (111.5, 49.0))
    _box(ax, 111.5, 43.5, 15.5, 11, "layers P … L−1\nunder masks\n(VLM frozen)", size=6)
    _arrow(ax, (127, 49.0), (129.8, 49.0))
    _box(ax, 129.8, 43.5, 11.2, 11, "CE +\n$\\lambda$ (FLOPs\n$-$ target)²", face="#E1EDF6", size=6)
    ax.plot([135.4, 135.4, 58.0], [43.5, 38.6, 38.6], color=VERMILION, linewidth=0.9, linestyle="--")
    _arrow(ax, (58.5, 38.6), (55.6, 38.6), VERMILION)
    ax.text(
        99,
        40.2,
        "gradient, through the soft sample and the expected FLOPs, to the classifier alone",
        fontsize=6,
        color=VERMILION,
        ha="center",
    )


def _inference(ax: Axes) -> None:
    _panel(ax, 3.0, 28.3, "inference: discarding, no masks", GREEN)
    _arrow(ax, (55.8, 35.6), (64.5, 24.6), bend=-0.12)
    _box(ax, 64.5, 16.0, 18.5, 10, "argmax: rate $r_{k_t}$;\nkept never rises", face="#DDF1EB")
    _arrow(ax, (83, 21.0), (86, 21.0))
    _box(
        ax,
        86,
        16.0,
        22.5,
        10,
        "keep the ranking's first\n$N-\\lfloor r_{k_t}N\\rfloor$ image tokens",
        face="#DDF1EB",
        size=6,
    )
    _arrow(ax, (108.5, 21.0), (111.5, 21.0))
    _box(ax, 111.5, 16.0, 15.5, 10, "layers P … L−1\nread what is left", size=6)
    _arrow(ax, (127, 21.0), (129.8, 21.0))
    _box(ax, 129.8, 16.0, 11.2, 10, "next\ntoken", face="#DDF1EB")
    for i, faded in enumerate((2, 4, 6)):
        x = 65.5 + 26.0 * i
        _tokens(ax, x, 8.6, faded, 1.5)
        ax.text(x + 11.2, 5.6, ("prefill", "a later step", "later still")[i], fontsize=6, ha="center", color=GREY)
