"""Notebook 00's view of attention: which heads look where while objects are named."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ..plotting import WIDTH_PAGE
from .probe import upsample
from .render import render
from .report import Record, shipped
from .world import Scene, make_scene

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..experiments import Study

PROBED = {"smoke": 2, "full": 60}
N_LISTED = 3  # objects of the picture whose attention maps are drawn


def probe_scenes(n: int) -> list[Scene]:
    """Test pictures with two objects or more; the first, which is drawn, with at least as many as maps are shown."""
    scenes = (make_scene(seed, "test") for seed in itertools.count())
    first = next(s for s in scenes if len(s.objects) > N_LISTED)
    return [first, *itertools.islice((s for s in scenes if len(s.objects) >= 2), n - 1)]


def heads(study: Study) -> dict[str, Record]:
    """Record by model key of where heads look while objects are named (:mod:`.probe`); scenes models only."""
    scenes = probe_scenes(PROBED[study.scale.name])

    def run(key: str) -> dict[str, Any]:
        from .probe import object_attention, summarise

        model, processor = study.model(key)
        return summarise(object_attention(model, processor, scenes), N_LISTED)

    config = {"scenes": [s.id for s in scenes], "family": "narrative", "wording": 0}
    return {k: study.record("00_scenes_vlm/heads", config, partial(run, k), models=[k]) for k in shipped(study)}


def draw_heads(study: Study, records: dict[str, Record]) -> Figure:
    """For each model: how much more each head looks at the named object than its area, and the best head's maps."""
    fig, axes = plt.subplots(
        len(records), N_LISTED + 2, figsize=(WIDTH_PAGE, 1.75 * len(records)), squeeze=False,
        gridspec_kw={"width_ratios": [1.25, *[1] * (N_LISTED + 1)]},
    )  # fmt: skip
    picture = np.asarray(render(probe_scenes(1)[0]))
    top = max(max(map(max, r["payload"]["enrichment"])) for r in records.values())
    for row, (key, record) in zip(axes, records.items(), strict=True):
        found = record["payload"]
        layer, head = found["best"]
        shown = row[0].imshow(np.array(found["enrichment"]), cmap="cividis", aspect="auto", vmin=0, vmax=top)
        row[0].add_patch(plt.Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, ec="white", lw=1.2))
        row[0].set(xlabel="head", ylabel="layer", title=Path(study.model_name(key)).name)
        row[0].grid(False)
        fig.colorbar(shown, ax=row[0], label="times its area")
        row[1].imshow(picture)
        row[1].set_title("picture", fontsize=7)
        grey = np.repeat(picture.mean(2, keepdims=True), 3, 2).astype(np.uint8)
        for ax, words, grid in zip(row[2:], found["words"], found["maps"], strict=False):
            shown_map = upsample(np.array(grid) / max(1e-12, float(np.max(grid))))
            ax.imshow(grey, alpha=0.6)
            ax.imshow(shown_map, cmap="autumn", alpha=0.85 * np.sqrt(shown_map), vmin=0, vmax=1)
            ax.set_title(f"“{words}”", fontsize=7)
        for ax in row[1:]:
            ax.set_axis_off()
    return fig


def heads_table(study: Study, records: dict[str, Record]) -> pd.DataFrame:
    """The best head of each model on objects it was not chosen by: share on the named object, on another, by chance."""
    from ..stats import bootstrap_interval

    rows = []
    for key, record in records.items():
        found = record["payload"]
        low, high = bootstrap_interval(found["inside"], study.scale.bootstrap)
        others = [v for v in found["others"] if v is not None]
        lifted = np.array(found["enrichment"])
        rows.append({
            "model": study.label(key),
            "layer": found["best"][0],
            "head": found["best"][1],
            "objects": len(found["inside"]),
            "on the named object %": 100 * float(np.mean(found["inside"])),
            "low": 100 * low,
            "high": 100 * high,
            "on another named one %": 100 * float(np.mean(others)) if others else None,
            "its area %": 100 * float(np.mean(found["area"])),
            "heads above 3 x area": int((lifted > 3).sum()),
            "of": lifted.size,
        })  # fmt: skip
    return pd.DataFrame(rows)


def heads_line(table: pd.DataFrame) -> str:
    """The stable verdict on heads that look at objects."""
    if table.empty:
        return "Heads that look at objects: no scenes model in this run"
    parts = []
    for record in table.to_dict("records"):
        clear = record["low"] > 2 * record["its area %"] and record["low"] > record["on another named one %"]
        parts.append(f"{record['model']}: {'yes' if clear else 'not shown'}, layer {record['layer']} head {record['head']}")
    return "Heads that look at the object they name: " + "; ".join(parts)
