"""Figs. 1 and 2: to which tokens the newest row attends, iteration by iteration; and whether that follows the need.

Shares are of the unpruned model along its own greedy replies, averaged over heads and over a group of layers: `shallow`
is the first quarter of the layers, `deep` the last. On scenes the need of every word is known, so the share of attention
that goes to the image can be set beside whether the word had to be read off the picture.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..attention import attention_shares
from ..evaluate import batches
from ..masks import TYPE_NAMES
from ..plotting import GREY, TOKEN_COLORS, WIDTH_PAGE
from .context import Record, Study
from .summaries import (
    asked_for,
    change_between_thirds,
    difference_with_interval,
    mean_course,
    mean_with_interval,
    show_interval,
    step_rank_correlation,
    verdict_line,
)

FAMILIES = {"coco": "short", "flickr30k": "narrative", "late": "late"}
GROUPS = ("shallow", "deep")
_BATCH = 32
_SYS, _IMG, _INS, _RES = range(4)
_LONG = {"sys": "system prompt", "img": "image", "ins": "instruction", "res": "response"}


def layer_groups(n_layers: int) -> dict[str, list[int]]:
    """The layers of each group: the first and the last quarter (at least one layer)."""
    quarter = max(1, n_layers // 4)
    return {"shallow": list(range(quarter)), "deep": list(range(n_layers - quarter, n_layers))}


def roles(study: Study) -> tuple[str, ...]:
    """One set for each caption family; with a COCO folder the folder."""
    return tuple(FAMILIES) if study.on_scenes else ("coco",)


# --------------------------------------------------------------------------------------------------------- records


def compute(study: Study) -> list[Record]:
    """All records of this notebook: replies, shares along them, and shares along references of known need."""
    found: list[Record | None] = []
    for key, role in study.each([(key, role) for key in study.keys for role in roles(study)], "attention"):
        found += [study.captions(key, role), shares(study, key, role)]
        if study.on_scenes:
            found.append(need(study, key, role))
    return [record for record in found if record is not None]


def shares(study: Study, key: str, role: str) -> Record:
    """Shares along the model's own replies. Payload: {"pictures": [{id, words, shares [steps][group][type]}], "layers"}.

    "layers" is [L][steps][type], the mean over all pictures that still generate at that step.
    """
    replies = study.captions(key, role)
    dataset = study.dataset(role)
    n = min(study.scale.n_attention, len(dataset))
    replied = [entry["tokens"] for entry in replies["payload"][:n]]

    def fn() -> dict[str, Any]:
        model, processor = study.model(key)
        courses, layers = _follow(model, processor, dataset, replied)
        rows = [
            {"id": dataset[i].id, "words": [processor.tokenizer.decode([t]).strip() for t in tokens], "shares": course}
            for i, (tokens, course) in enumerate(zip(replied, courses, strict=True))
        ]
        return {"pictures": rows, "layers": layers}

    config = {"data": dataset.identity, "n": n, "replies": "greedy", "max_new_tokens": study.scale.max_new_tokens}
    return study.record("attention/shares", config, fn, models=[key])


def need(study: Study, key: str, role: str) -> Record | None:
    """Shares along a reference whose need is known word by word, or None where the model has not the scenes vocabulary.

    Payload: list of {id, need: one letter a token (i = image, r = response, n = neither), shares [steps][group][type]}.
    """
    from ..scenes.data import response_tokens

    dataset = study.dataset(role)
    n = min(study.scale.n_attention, len(dataset))
    config = {"data": dataset.identity, "n": n, "replies": "references"}

    def fn() -> list[dict[str, Any]]:
        model, processor = study.model(key)
        tokenizer = processor.tokenizer
        try:
            told = [response_tokens(dataset[i].meta["scene"], FAMILIES[role], i % 5, tokenizer) for i in range(n)]
        except KeyError:  # a word of the captions is no token of this model
            return []
        courses, _ = _follow(model, processor, dataset, [tokens for tokens, _ in told])
        return [
            {"id": dataset[i].id, "need": "".join("irn"[k] for k in told[i][1]), "shares": courses[i]} for i in range(n)
        ]

    record = study.record("attention/need", config, fn, models=[key])
    return record if record["payload"] else None


def _follow(model: Any, processor: Any, dataset: Any, replies: list[list[int]]) -> tuple[list, list]:
    """Head-mean shares along replies: per picture [steps][group][type], and per layer [L][steps][type] over pictures."""
    groups = None
    courses: list[list] = []
    total: np.ndarray | None = None
    count = np.zeros(max(map(len, replies)))
    for some, inputs in batches(model, processor, dataset, range(len(replies)), _BATCH):
        rows = [replies[i] for i in some]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
        measured = attention_shares(model, inputs, padded.to(inputs["input_ids"].device)).mean(3).cpu().double().numpy()
        if total is None:
            groups = layer_groups(measured.shape[1])
            total = np.zeros((measured.shape[1], count.size, 4))
        for row, layers in zip(rows, measured, strict=True):  # [L, steps, 4]
            valid = layers[:, : len(row)]
            total[:, : len(row)] += valid
            count[: len(row)] += 1
            grouped = np.stack([valid[groups[name]].mean(0) for name in GROUPS], axis=1)  # type: ignore[index]
            courses.append(grouped.round(4).tolist())
    return courses, (total / np.maximum(count, 1)[None, :, None]).round(5).tolist()  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------- numbers


def _courses(record: Record, depth: str, kind: int) -> list[np.ndarray]:
    group = GROUPS.index(depth)
    return [np.asarray(entry["shares"])[:, group, kind] for entry in record["payload"]["pictures"]]


def quantities(study: Study) -> dict[str, Any]:
    """What claim C1 is judged by: changes of share between the first and the last third of a response."""
    found = {}
    for key in study.keys:
        for role in roles(study):
            record = shares(study, key, role)
            for depth in GROUPS:
                for kind, name in ((_IMG, "img"), (_RES, "res")):
                    changes = [change_between_thirds(course) for course in _courses(record, depth, kind)]
                    value = mean_with_interval(changes, study.scale.bootstrap, study.seed)
                    found[f"c1.{key}.{FAMILIES[role]}.{depth}.{name}_change"] = value
    return asked_for("C1", found)


def change_table(study: Study) -> pd.DataFrame:
    """Image and response shares at the ends of a response, and their rank correlation with the step, with intervals."""
    rows = []
    n, seed = study.scale.bootstrap, study.seed
    for key in study.keys:
        for role in roles(study):
            record = shares(study, key, role)
            for depth in GROUPS:
                row: dict[str, Any] = {"model": study.label(key), "captions": FAMILIES[role], "layers": depth}
                row["pictures"] = len(record["payload"]["pictures"])
                for kind, name in ((_IMG, "image"), (_RES, "response")):
                    courses = _courses(record, depth, kind)
                    row[f"{name}, first step"] = float(np.mean([course[0] for course in courses]))
                    row[f"{name}, last step"] = float(np.mean([course[-1] for course in courses]))
                    change = mean_with_interval([change_between_thirds(course) for course in courses], n, seed)
                    row[f"{name}, last third - first"] = show_interval(change)
                    rank = mean_with_interval([step_rank_correlation(course) for course in courses], n, seed)
                    row[f"{name}, rank correlation"] = show_interval(rank, 2)
                rows.append(row)
    return pd.DataFrame(rows)


def need_table(study: Study) -> pd.DataFrame:
    """Image share at tokens that need the picture, the response, or neither; differences paired within pictures."""
    rows = []
    for key in study.keys:
        for role in roles(study):
            record = need(study, key, role) if study.on_scenes else None
            if record is None:
                continue
            for depth in GROUPS:
                rows.append(_need_row(study, record, study.label(key), FAMILIES[role], depth))
    return pd.DataFrame(rows)


def _need_row(study: Study, record: Record, model: str, family: str, depth: str) -> dict[str, Any]:
    group = GROUPS.index(depth)
    means: dict[str, list[float]] = {"i": [], "r": [], "n": []}
    for entry in record["payload"]:
        image = np.asarray(entry["shares"])[:, group, _IMG]
        letters = np.array(list(entry["need"]))
        for letter, found in means.items():
            found.append(float(image[letters == letter].mean()) if (letters == letter).any() else np.nan)
    row: dict[str, Any] = {"model": model, "captions": family, "layers": depth, "pictures": len(record["payload"])}
    for letter, name in (("i", "image"), ("r", "response"), ("n", "neither")):
        present = [value for value in means[letter] if not np.isnan(value)]
        row[f"need {name}"] = float(np.mean(present)) if present else np.nan
    for letter, name in (("r", "image - response"), ("n", "image - neither")):
        pairs = [(a, b) for a, b in zip(means["i"], means[letter], strict=True) if not (np.isnan(a) or np.isnan(b))]
        if pairs:
            a, b = zip(*pairs, strict=True)
            row[name] = show_interval(difference_with_interval(a, b, study.scale.bootstrap, study.seed))
        else:
            row[name] = None
    return row


def verdict(study: Study) -> str:
    """The stable last line of the notebook."""
    return verdict_line("C1", quantities(study))


# --------------------------------------------------------------------------------------------------------- figures


def step_table(study: Study) -> pd.DataFrame:
    """What Fig. 2 draws: mean share by model, family, depth, step and type, with its interval and n."""
    rows = []
    for key in study.keys:
        for role in roles(study):
            record = shares(study, key, role)
            for depth in GROUPS:
                for kind, name in enumerate(TYPE_NAMES):
                    course = mean_course(_courses(record, depth, kind))
                    frame = pd.DataFrame({k: course[k] for k in ("step", "mean", "lo", "hi", "n")})
                    head = {"model": study.label(key), "captions": FAMILIES[role], "layers": depth, "type": name}
                    rows.append(frame.assign(**head)[[*head, *frame.columns]])
    return pd.concat(rows, ignore_index=True)


def figure_stack(study: Study) -> Figure:
    """Fig. 2: attention by token type, stacked, iteration by iteration; shallow beside deep, a row a family."""
    table, families = step_table(study), [FAMILIES[role] for role in roles(study)]
    columns = [(key, depth) for key in study.keys for depth in GROUPS]
    size = (WIDTH_PAGE * max(len(columns), 2) / 4, 0.85 + 1.4 * len(families))
    fig, axes = plt.subplots(len(families), len(columns), figsize=size, sharey=True, squeeze=False)
    for row, (family, axes_row) in enumerate(zip(families, axes, strict=True)):
        for ax, (key, depth) in zip(axes_row, columns, strict=True):
            part = table[(table.model == study.label(key)) & (table.captions == family) & (table.layers == depth)]
            means = [part[part.type == name]["mean"].to_numpy() for name in TYPE_NAMES]
            ax.stackplot(np.arange(len(means[0])), *means, colors=[TOKEN_COLORS[name] for name in TYPE_NAMES], lw=0)
            ax.set_xlim(0, max(len(means[0]) - 1, 1))
            ax.set_ylim(0, 1)
            ax.grid(False)
            head = f"{study.label(key)}\n{depth} layers, " if row == 0 else ""
            ax.set_title(f"{head}n = {part.n.max()}", fontsize=7)
        axes_row[0].set_ylabel(f"{family}\nshare of attention")
    for ax in axes[-1]:
        ax.set_xlabel("iteration")
    handles = [plt.Rectangle((0, 0), 1, 1, color=TOKEN_COLORS[name]) for name in TYPE_NAMES]
    fig.legend(handles, [_LONG[name] for name in TYPE_NAMES], loc="outside lower center", ncol=4)
    return fig


def figure_example(study: Study, key: str = "small", index: int = 0) -> Figure:
    """Fig. 1: one picture, and the attention by token type for each word of its reply (shallow layers)."""
    role = roles(study)[min(1, len(roles(study)) - 1)]
    entry = shares(study, key, role)["payload"]["pictures"][index]
    values, words = np.asarray(entry["shares"])[:, 0], entry["words"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH_PAGE, 2.3), width_ratios=(1, 3.6))
    left.imshow(np.asarray(study.dataset(role)[index].image))
    left.set_axis_off()
    left.set_title("picture", fontsize=7)
    bottom = np.zeros(len(words))
    for kind, name in enumerate(TYPE_NAMES):
        right.bar(np.arange(len(words)), values[:, kind], 1.0, bottom, color=TOKEN_COLORS[name], label=_LONG[name], lw=0)
        bottom += values[:, kind]
    shown = [word.replace("$", r"\$") if word.isprintable() else "?" for word in words]
    right.set_xticks(np.arange(len(words)), shown, rotation=90, fontsize=5.5)
    right.set(xlim=(-0.5, len(words) - 0.5), ylim=(0, 1), ylabel="share of attention")
    right.grid(False)
    fig.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncol=4)
    return fig


def figure_need(study: Study) -> Figure | None:
    """Image share by iteration beside the fraction of pictures whose next word needs the image; None without scenes."""
    records = {(k, r): need(study, k, r) for k in study.keys for r in roles(study)} if study.on_scenes else {}
    if not records or any(record is None for record in records.values()):
        return None
    size = (WIDTH_PAGE, 1.7 * len(study.keys) + 0.45)
    fig, axes = plt.subplots(len(study.keys), len(roles(study)), figsize=size, sharey=True, squeeze=False)
    for row, key in zip(axes, study.keys, strict=True):
        for ax, role in zip(row, roles(study), strict=True):
            payload = records[key, role]["payload"]  # type: ignore[index]
            needed = mean_course([[letter == "i" for letter in entry["need"]] for entry in payload])
            filled = {"color": GREY, "alpha": 0.3, "lw": 0, "step": "mid", "label": "words that need the image"}
            ax.fill_between(needed["step"], needed["mean"], **filled)
            for group, (depth, style) in enumerate(zip(GROUPS, ("-", "--"), strict=True)):
                course = mean_course([np.asarray(entry["shares"])[:, group, _IMG] for entry in payload])
                color = TOKEN_COLORS["img"] if group == 0 else TOKEN_COLORS["res"]
                ax.plot(course["step"], course["mean"], style, color=color, label=f"attention to the image, {depth} layers")
                ax.fill_between(course["step"], course["lo"], course["hi"], color=color, alpha=0.25, lw=0)
            ax.set_ylim(0, 1)
            ax.set_title(f"{study.label(key)}, {FAMILIES[role]} (n = {len(payload)})", fontsize=7)
        row[0].set_ylabel("share")
    for ax in axes[-1]:
        ax.set_xlabel("iteration (reference caption)")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return fig


def figure_layers(study: Study) -> Figure:
    """Image share by layer and iteration, mean over pictures: where in depth the picture is looked at."""
    size = (WIDTH_PAGE, 1.75 * len(study.keys) + 0.2)
    fig, axes = plt.subplots(len(study.keys), len(roles(study)), figsize=size, squeeze=False)
    for row, key in zip(axes, study.keys, strict=True):
        for ax, role in zip(row, roles(study), strict=True):
            record = shares(study, key, role)
            steps = len(mean_course(_courses(record, "deep", _IMG))["step"])
            values = np.asarray(record["payload"]["layers"])[:, :steps, _IMG]
            shown = ax.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(f"{study.label(key)}, {FAMILIES[role]}", fontsize=7)
            ax.set_xlabel("iteration")
            ax.grid(False)
        row[0].set_ylabel("layer")
        fig.colorbar(shown, ax=list(row), label="image share", shrink=0.9)
    return fig

