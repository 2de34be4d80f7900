"""Fig. 4: which image tokens DyRate keeps at each iteration, for several kinds of picture; and claim C9 in numbers.

The removed share of a step is 1 - kept / N. The predictor is the one trained for a third of the FLOPs; where several
seeds were trained, a picture's value is first averaged over them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..datasets import COCO_PROMPT
from ..evaluate import ENGINE, batches, describe
from ..generation import generate
from ..images import load_image
from ..loading import prepare_inputs
from ..methods import Method
from ..plotting import FAMILY_COLORS, WIDTH_PAGE, dim_dropped, seen_by_model
from ..prompts import chat_prompt
from .attention import FAMILIES, roles
from .context import Record, Study
from .summaries import (
    asked_for,
    difference_with_interval,
    mean_course,
    mean_with_interval,
    show_interval,
    spread_with_interval,
    step_rank_correlation,
    verdict_line,
)

TARGET = 0.333
_SEARCHED = 200  # scenes looked through for one of each kind
_CLUTTER = ("speckled", "checked", "dotted", "cloudy")
# kind -> (role, what the scene must be)
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "few objects": ("coco", lambda s: len(s.objects) <= 2 and s.ground.kind == "plain"),
    "many objects": ("coco", lambda s: len(s.objects) >= 8),
    "cluttered ground": ("coco", lambda s: s.ground.kind in _CLUTTER and 3 <= len(s.objects) <= 5),
    "unseen pairs": ("nocaps", lambda s: 3 <= len(s.objects) <= 6),
    "list, then sum up": ("flickr30k", lambda s: 3 <= len(s.objects) <= 5),
    "details last": ("late", lambda s: 3 <= len(s.objects) <= 5),
}


# --------------------------------------------------------------------------------------------------------- records


def compute(study: Study) -> list[Record]:
    """All records of this notebook: captions under DyRate by seed and family, and the masks of the pictures shown."""
    cells = [(key, role, seed) for key in study.keys for role in roles(study) for seed in study.scale.predictor_seeds]
    found = [captions(study, *cell) for cell in study.each(cells, "captions")]
    return found + [shown(study, key) for key in study.keys]


def captions(study: Study, key: str, role: str, seed: int) -> Record:
    """Captions under DyRate at a third of the FLOPs, predictor of that seed."""
    return study.captions(key, role, study.method("dyrate", key, target=TARGET, seed=seed))


def chosen(study: Study) -> list[tuple[str, str, int]]:
    """(kind, role, index in the first pictures of its set) of each picture that is shown; deterministic."""
    if not study.on_scenes:
        n = min(study.scale.n_visual, len(study.dataset("coco")))
        return [(study.dataset("coco")[i].id, "coco", i) for i in range(n)]
    found = []
    places = np.linspace(0, len(KINDS) - 1, min(study.scale.n_visual, len(KINDS))).round().astype(int)
    for kind, (role, wanted) in [list(KINDS.items())[place] for place in places]:
        dataset = study.dataset(role, _SEARCHED)
        fitting = [index for index in range(_SEARCHED) if wanted(dataset[index].meta["scene"])]
        found += [(kind, role, fitting[0])] if fitting else []
    return found


def shown(study: Study, key: str) -> Record:
    """Masks of the chosen pictures. Payload: list of {kind, role, index, id, prompt, text, words, kept, ranking}."""
    method = study.method("dyrate", key, target=TARGET)
    pictures = chosen(study)
    sets = {role: study.dataset(role, _SEARCHED if study.on_scenes else None) for _, role, _ in pictures}
    config = {
        "pictures": [{"data": sets[role].identity, "index": index} for _, role, index in pictures],
        "method": describe(method), "max_new_tokens": study.scale.max_new_tokens,
    }  # fmt: skip

    def fn() -> list[dict[str, Any]]:
        model, processor = study.model(key)
        rows = []
        for kind, role, index in pictures:
            for _, inputs in batches(model, processor, sets[role], [index], 1):
                item = sets[role][index]
                head = {"kind": kind, "role": role, "index": index, "id": item.id, "prompt": item.prompt}
                rows.append({**head, **_trace(model, processor, inputs, method, study.scale.max_new_tokens)})
        return rows

    return study.record("visualization/masks", config, fn, models=[key])


def own_picture(study: Study, key: str, image: str | Path, prompt: str = COCO_PROMPT) -> Record:
    """The same for a picture of one's own; computed where it is not yet recorded. Payload: one dict.

    Raises:
        InputError: not an image (before the model is loaded).
    """
    picture = load_image(image)
    method = study.method("dyrate", key, target=TARGET)

    def fn() -> dict[str, Any]:
        model, processor = study.model(key)
        inputs = prepare_inputs(processor, [picture], [chat_prompt(prompt)], next(model.parameters()).device)
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
        head = {"kind": "a picture of one's own", "prompt": prompt}
        return {**head, **_trace(model, processor, inputs, method, study.scale.max_new_tokens)}

    config = {"prompt": prompt, "method": describe(method), "max_new_tokens": study.scale.max_new_tokens}
    # not study.store: nobody has committed a record of it
    return study.record("visualization/own", config, fn, models=[key], inputs=[image], store=study.scores_store)


def _trace(model: Any, processor: Any, inputs: dict, method: Method, longest: int) -> dict[str, Any]:
    out = generate(model, inputs, method, longest, processor=processor, engine=ENGINE)
    steps = int(out.lengths[0])
    words = [processor.tokenizer.decode([token]).strip() for token in out.new_tokens[0, :steps].tolist()]
    return {
        "text": out.text[0], "words": words, "kept": out.trace.kept[0, :steps].tolist(),
        "ranking": out.trace.kept_indices[0].tolist(), "n_image": int(out.trace.n_image[0]),
    }  # fmt: skip


def kept_at(entry: dict[str, Any], step: int) -> list[int]:
    """Image tokens of a `shown` entry read at a step, in raster order."""
    return sorted(entry["ranking"][: entry["kept"][step]])


# --------------------------------------------------------------------------------------------------------- numbers


def removed(record: Record) -> list[np.ndarray]:
    """Removed share by step, one course a picture."""
    return [1 - np.asarray(entry["kept"], dtype=np.float64) / max(entry["n_image"], 1) for entry in record["payload"]]


def _per_picture(study: Study, key: str, role: str) -> dict[str, np.ndarray]:
    """[pictures] each, averaged over seeds: first, middle, last removed share, growth and rank correlation."""
    by_seed = []
    for seed in study.scale.predictor_seeds:
        courses = removed(captions(study, key, role, seed))
        by_seed.append(
            {
                "first": [course[0] for course in courses],
                "middle": [course[len(course) // 2] for course in courses],
                "last": [course[-1] for course in courses],
                "growth": [course[-1] - course[0] for course in courses],
                "rank": [step_rank_correlation(course) for course in courses],
            }
        )
    return {name: np.mean([values[name] for values in by_seed], axis=0) for name in by_seed[0]}


def quantities(study: Study) -> dict[str, Any]:
    """What claim C9 is judged by."""
    found: dict[str, Any] = {}
    n, seed = study.scale.bootstrap, study.seed
    for key in study.keys:
        values = _per_picture(study, key, "coco")
        found[f"c9.{key}.growth"] = mean_with_interval(values["growth"], n, seed)
        found[f"c9.{key}.sd_between_pictures"] = spread_with_interval(values["middle"], n, seed)
        found[f"c9.{key}.step_rank_correlation"] = mean_with_interval(values["rank"], n, seed)
        if study.on_scenes:  # the same scenes under both prompts, so the difference is paired
            narrative, late = (_per_picture(study, key, role)["growth"] for role in ("flickr30k", "late"))
            found[f"c9.{key}.narrative_minus_late_growth"] = difference_with_interval(narrative, late, n, seed)
    return asked_for("C9", found)


def growth_table(study: Study) -> pd.DataFrame:
    """Removed share at the first, middle and last step by model and caption family, its growth and spread, with intervals."""
    rows = []
    n, seed = study.scale.bootstrap, study.seed
    for key in study.keys:
        for role in roles(study):
            values = _per_picture(study, key, role)
            rows.append(
                {
                    "model": study.label(key), "captions": FAMILIES[role], "pictures": len(values["first"]),
                    "predictor seeds": len(study.scale.predictor_seeds),
                    **{f"removed, {name} step": float(values[name].mean()) for name in ("first", "middle", "last")},
                    "growth": show_interval(mean_with_interval(values["growth"], n, seed)),
                    "spread between pictures": show_interval(spread_with_interval(values["middle"], n, seed)),
                    "rank correlation with step": show_interval(mean_with_interval(values["rank"], n, seed), 2),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def objects_table(study: Study) -> pd.DataFrame:
    """Removed share at the middle step by how many objects a scene holds: do busier pictures keep more? Empty without scenes."""
    rows = []
    if not study.on_scenes:
        return pd.DataFrame()
    dataset = study.dataset("coco")
    counts = np.array([len(item.meta["scene"].objects) for item in dataset])
    for key in study.keys:
        middle = _per_picture(study, key, "coco")["middle"]
        for low, high in ((1, 2), (3, 4), (5, 6), (7, 9)):
            inside = (counts >= low) & (counts <= high)
            if inside.any():
                value = mean_with_interval(middle[inside], study.scale.bootstrap, study.seed)
                row = {"model": study.label(key), "objects": f"{low} to {high}", "pictures": int(inside.sum())}
                rows.append({**row, "removed, middle step": show_interval(value)})
    return pd.DataFrame(rows)


def verdict(study: Study) -> str:
    """The stable last line of the notebook."""
    return verdict_line("C9", quantities(study))


# --------------------------------------------------------------------------------------------------------- figures


def figure_masks(study: Study, key: str, long: bool = False, columns: int = 5) -> Figure | None:
    """Fig. 4: a row a picture, the picture and its mask at evenly spaced iterations.

    long: the pictures with longer captions (narrative, late) instead of the short ones. None where there are none.
    """
    if key not in study.keys:
        return None
    entries = [entry for entry in shown(study, key)["payload"] if (entry["role"] in ("flickr30k", "late")) == long]
    return draw_masks([(_picture(study, entry), entry) for entry in entries], columns) if entries else None


def figure_own(study: Study, image: str, prompt: str = COCO_PROMPT) -> Figure | None:
    """The masks of a picture of one's own, a row a model; None without a picture."""
    if not image:
        return None
    entries = [{**own_picture(study, key, image, prompt)["payload"], "kind": study.label(key)} for key in study.keys]
    return draw_masks([(load_image(image), entry) for entry in entries])


def _picture(study: Study, entry: dict[str, Any]) -> Any:
    return study.dataset(entry["role"], _SEARCHED if study.on_scenes else None)[entry["index"]].image


def draw_masks(rows: list[tuple[Any, dict[str, Any]]], columns: int = 5) -> Figure:
    """(picture, entry of `shown`) pairs as rows of masks, the word of the step and the kept count above each panel."""
    side = WIDTH_PAGE / (columns + 1)
    fig = plt.figure(figsize=(WIDTH_PAGE, len(rows) * (side + 0.62)))
    parts = fig.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (picture, entry) in zip(parts, rows, strict=True):
        axes = part.subplots(1, columns + 1)
        caption = "\n".join(textwrap.wrap(f"{entry['kind']}: “{entry['text']}”", 118)[:2])
        part.suptitle(_literal(caption), fontsize=6.5, x=0.01, ha="left")
        for ax in axes:
            ax.set_axis_off()
        axes[0].imshow(np.asarray(seen_by_model(picture)))
        axes[0].set_title("picture", fontsize=6.5)
        last = len(entry["kept"]) - 1
        steps = sorted(set(np.linspace(0, last, min(columns, last + 1)).round().astype(int).tolist()))
        for ax, step in zip(axes[1:], steps, strict=False):
            ax.imshow(dim_dropped(picture, kept_at(entry, step), entry["n_image"]))
            ax.set_title(_literal(f"{step}: “{entry['words'][step]}”\n{entry['kept'][step]} kept"), fontsize=6.5)
    return fig


def _literal(text: str) -> str:
    """Text as matplotlib prints it: a dollar sign would start its maths mode, control characters have no glyph."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text).replace("$", r"\$")


def figure_rates(study: Study, individuals: int = 25) -> Figure:
    """Removed share by iteration: mean and 10 to 90 % of pictures by family (above), single pictures (below); first seed."""
    fig, axes = plt.subplots(2, len(study.keys), figsize=(WIDTH_PAGE, 3.9), sharey=True, squeeze=False)
    seed = study.scale.predictor_seeds[0]
    for column, key in enumerate(study.keys):
        upper, lower = axes[:, column]
        for role in roles(study):
            family, courses = FAMILIES[role], removed(captions(study, key, role, seed))
            course = mean_course(courses)
            upper.plot(course["step"], course["mean"], color=FAMILY_COLORS[family], label=f"{family} (n = {len(courses)})")
            upper.fill_between(course["step"], course["p10"], course["p90"], color=FAMILY_COLORS[family], alpha=0.15, lw=0)
            for single in courses[:individuals]:
                lower.plot(np.arange(len(single)), single, color=FAMILY_COLORS[family], lw=0.5, alpha=0.5)
        upper.set_title(study.label(key), fontsize=7)
        lower.set_xlabel("iteration")
        upper.set_ylim(-0.02, 1.02)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    axes[0, 0].set_ylabel("removed share\nmean, 10 to 90 %")
    axes[1, 0].set_ylabel("removed share\nsingle pictures")
    return fig


def rates_data(study: Study) -> pd.DataFrame:
    """What the upper half of `figure_rates` draws."""
    frames = []
    seed = study.scale.predictor_seeds[0]
    for key in study.keys:
        for role in roles(study):
            course = mean_course(removed(captions(study, key, role, seed)))
            frames.append(pd.DataFrame(course).assign(model=study.label(key), captions=FAMILIES[role]))
    return pd.concat(frames, ignore_index=True)
