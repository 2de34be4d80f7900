"""Notebook 00's view of the world: pictures by split, captions with their needs, questions, what the splits hold."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..plotting import BLUE, GREY, VERMILION, WIDTH_COLUMN, WIDTH_PAGE
from .captions import FAMILIES, N_REFERENCES, NEEDS, PROMPTS, annotated_reference, references
from .questions import QUESTION_KINDS, questions
from .render import render
from .world import HELD_OUT, MAX_OBJECTS, SPLITS, Scene, make_scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEED_COLORS = {"image": VERMILION, "response": BLUE, "none": GREY}
SPLIT_LABELS = {"train": "train", "val": "val", "test": "test", "novel": "novel\n(unseen pairs)"}


def draw_splits(columns: int = 7) -> Figure:
    """Scenes 0, 1, ... of every split, a row each."""
    fig, axes = plt.subplots(len(SPLITS), columns, figsize=(WIDTH_PAGE, WIDTH_PAGE * len(SPLITS) / (columns + 0.6)))
    for row, split in zip(axes, SPLITS, strict=True):
        for seed, ax in enumerate(row):
            ax.imshow(np.asarray(render(make_scene(seed, split))))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(SPLIT_LABELS[split])
    return fig


def example(split: str = "test", n_objects: int = 4) -> Scene:
    """The first scene of a split with so many objects."""
    seeds = itertools.count()
    return next(s for s in (make_scene(seed, split) for seed in seeds) if len(s.objects) == n_objects)


def _write_words(ax, words: list[tuple[str, str]], x: float, y: float, right: float, line: float) -> float:
    """Words left to right in the colour of their need, wrapped at `right`; returns the y of the next free line."""
    renderer = ax.figure.canvas.get_renderer()
    start = x
    for word, need in words:
        glued = word in ",.:"
        weight = "normal" if need == "none" else "bold"
        shown = ax.text(x, y, word, color=NEED_COLORS[need], fontsize=7.5, fontweight=weight, va="top")
        width = shown.get_window_extent(renderer).transformed(ax.transData.inverted()).width
        if x + width > right and not glued:
            x, y = start, y - line
            shown.set_position((x, y))
        elif glued:
            x -= 0.006
            shown.set_position((x, y))
        x += width + 0.008
    return y - line


def draw_captions(scene: Scene, wording: int = 0) -> Figure:
    """A picture and one caption of every family, each word in the colour of what it needs."""
    fig = plt.figure(figsize=(WIDTH_PAGE, 2.35))
    fig.set_layout_engine("none")
    picture = fig.add_axes((0.0, 0.08, 0.27, 0.82))
    picture.imshow(np.asarray(render(scene)))
    picture.set_axis_off()
    ax = fig.add_axes((0.285, 0.0, 0.715, 1.0))
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_axis_off()
    y = 0.98
    for family in FAMILIES:
        ax.text(0, y, family, fontsize=7.5, style="italic", va="top")
        y = _write_words(ax, annotated_reference(scene, family, wording), 0.105, y, 0.995, 0.083) - 0.035
    key = [("needs the picture", "image"), ("needs the response so far", "response"), ("needs neither", "none")]
    for (text, need), x in zip(key, (0.105, 0.36, 0.7), strict=True):
        ax.text(x, 0.03, f"■ {text}", color=NEED_COLORS[need], fontsize=7)
    return fig


def need_profile(n: int = 300, split: str = "train", bins: int = 10) -> pd.DataFrame:
    """Where in a caption which need lies: share of tokens by family, tenth of the caption and need, over n scenes."""
    counts = {f: np.zeros((bins, len(NEEDS))) for f in FAMILIES}
    for scene, family, i in itertools.product(
        [make_scene(s, split) for s in range(n)], FAMILIES, range(N_REFERENCES)
    ):
        words = annotated_reference(scene, family, i)
        for at, (_, need) in enumerate(words):
            counts[family][at * bins // len(words), NEEDS.index(need)] += 1
    rows = [
        {"family": f, "part": (b + 0.5) / bins, "need": need, "share": c[b, k] / c[b].sum()}
        for f, c in counts.items() for b in range(bins) for k, need in enumerate(NEEDS)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def draw_need(profile: pd.DataFrame) -> Figure:
    """Stacked shares of need along the caption, one panel a family."""
    fig, axes = plt.subplots(1, len(FAMILIES), figsize=(WIDTH_PAGE, 1.75), sharey=True)
    for ax, family in zip(axes, FAMILIES, strict=True):
        table = profile[profile.family == family].pivot(index="part", columns="need", values="share")
        ax.stackplot(table.index, *[table[n] for n in NEEDS], colors=[NEED_COLORS[n] for n in NEEDS], alpha=0.85)
        ax.set(title=family, xlim=(0.05, 0.95), ylim=(0, 1), xlabel="place in the caption")
    axes[0].set_ylabel("share of tokens")
    handles = [plt.Rectangle((0, 0), 1, 1, color=NEED_COLORS[n], alpha=0.85) for n in NEEDS]
    fig.legend(handles, ["image", "response", "neither"], loc="outside right center", title="needs", title_fontsize=7)
    return fig


def family_table(n: int = 300) -> pd.DataFrame:
    """Length and need of each family over n scenes of train, with its prompt."""
    rows = []
    for family in FAMILIES:
        all_words = [annotated_reference(make_scene(s, "train"), family, i) for s in range(n) for i in range(N_REFERENCES)]
        lengths = [len(w) + 1 for w in all_words]  # the end-of-sequence token counts
        needs = [need for words in all_words for _, need in words]
        rows.append({
            "family": family,
            "prompt": PROMPTS[family],
            "tokens": f"{min(lengths)}-{max(lengths)}, mean {np.mean(lengths):.1f}",
            **{f"{need} %": round(100 * needs.count(need) / len(needs), 1) for need in NEEDS},
        })  # fmt: skip
    return pd.DataFrame(rows)


def split_table(n: int = 1000) -> pd.DataFrame:
    """What n scenes of each split hold; the last two columns are what makes the splits what they are."""
    rows = []
    for split in SPLITS:
        scenes = [make_scene(s, split) for s in range(n)]
        pairs = [{o.pair for o in s.objects} for s in scenes]
        rows.append({
            "split": split,
            "scenes": n,
            "objects, mean": round(float(np.mean([len(s.objects) for s in scenes])), 2),
            "objects, range": f"{min(len(s.objects) for s in scenes)}-{max(len(s.objects) for s in scenes)} of 1-{MAX_OBJECTS}",
            "(shape, colour) pairs seen": len(set.union(*pairs)),
            "scenes with a held-out pair": sum(bool(p & HELD_OUT) for p in pairs),
            "ground seeds shared with other splits": _shared(split, scenes),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _shared(split: str, scenes: list[Scene]) -> int:
    own = {s.ground.seed for s in scenes}
    return sum(make_scene(seed, other).ground.seed in own for other in SPLITS if other != split for seed in range(200))


def question_table(scene: Scene) -> pd.DataFrame:
    """The questions of one scene."""
    rows = [{"kind": q.kind, "question": q.prompt.split("\n")[0], "answer": q.answer} for q in questions(scene)]
    return pd.DataFrame(rows)


def question_shares(n: int = 1000) -> pd.DataFrame:
    """How often each kind of question gets its most frequent answer, over n test scenes: what guessing would score."""
    answers: dict[str, list[str]] = {k: [] for k in QUESTION_KINDS}
    for seed in range(n):
        for q in questions(make_scene(seed, "test")):
            answers[q.kind].append(q.answer)
    rows = []
    for kind, given in answers.items():
        top = max(sorted(set(given)), key=given.count)
        rows.append({"kind": kind, "questions": len(given), "answers": len(set(given)), "most frequent": top,
                     "its share %": round(100 * given.count(top) / len(given), 1)})  # fmt: skip
    return pd.DataFrame(rows)


def reference_lines(scene: Scene, family: str) -> str:
    """The five references of a family, one a line."""
    return "\n".join(f"{i + 1}. {text}" for i, text in enumerate(references(scene, family)))


__all__ = [
    "NEED_COLORS", "WIDTH_COLUMN", "draw_captions", "draw_need", "draw_splits", "example", "family_table", "need_profile",
    "question_shares", "question_table", "reference_lines", "split_table",
]  # fmt: skip
