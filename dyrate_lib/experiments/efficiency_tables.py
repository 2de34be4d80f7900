"""Notebook 04, FLOPs: Table III's shares on LLaVA-1.5's dimensions, on scenes, and what the predictor costs (C6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..accounting import CONVENTIONS, flop_steps, flops, kv_bytes, llm_parameters
from ..compare import load_paper
from ..plotting import METHODS
from ..predictor import RatePredictor
from .context import Study
from .contradictions import llava_info
from .efficiency_cells import ROLES, info_of
from .efficiency_course import (
    LAYER,
    PAPER_VTW,
    TEXT_TOKENS,
    course,
    course_ratio,
    kept_by_layer,
    scaled_course,
    scene_cells,
    stretched,
)
from .efficiency_overhead import share_quantities
from .efficiency_rows import PAPER_MODELS, label, ratio_of_medians, samples, time_records
from .summaries import mean_with_interval
from .training_runs import N_RATES

C4 = {
    "original": "dyrate_end_to_end_ratio", "fastv-2": "dyrate_over_fastv2", "fastv-3": "dyrate_over_fastv3",
    "vtw": "dyrate_over_vtw",
}  # fmt: skip


def settings(study: Study, size: str) -> dict[str, tuple[int, tuple[int, ...], str]]:
    """What is counted for a LLaVA-1.5 size: method -> (layer, kept course, label)."""
    info = llava_info(size)
    half, all_tokens = info.n_image_tokens // 2, info.n_image_tokens
    role = ROLES[size] if ROLES[size] in study.keys else study.keys[0]
    learned = stretched(course(study, role), study.info(role).n_image_tokens, all_tokens)
    out = {
        "original": (1, (all_tokens,), "Original"), "fastv-3": (3, (half,), "FastV (P=3, R=0.5)"),
        "fastv-2": (2, (half,), "FastV (P=2, R=0.5)"),
        "vtw": (PAPER_VTW, (0,), f"VTW (layer {PAPER_VTW})"), "dyrate": (LAYER, learned, "DyRate (course learned on scenes)"),
        "dyrate-third": (LAYER, scaled_course(info, learned), "DyRate (course scaled to 33.3 %)"),
    }  # fmt: skip
    if info.n_layers // 2 != PAPER_VTW:
        out["vtw-half"] = (info.n_layers // 2, (0,), f"VTW (layer {info.n_layers // 2}, half depth)")
    return out


def llava_flops_table(study: Study) -> pd.DataFrame:
    """FLOPs as a share of the unpruned model's, %, on LLaVA-1.5's dimensions, every convention, beside Table III."""
    printed = load_paper("table3").set_index(["model", "method"]).tflops_percent
    rows = []
    for size, name in PAPER_MODELS.items():
        info = llava_info(size)
        for key, (layer, kept, title) in settings(study, size).items():
            line = {"model": name, "method": title, "paper's Table III": printed.get((name, key), np.nan)}
            for convention in CONVENTIONS:
                line[convention] = 100 * course_ratio(info, layer, kept, convention)
            cached = flops(
                info, TEXT_TOKENS + info.n_image_tokens, info.n_image_tokens, kept_by_layer(info, layer, kept), "cached"
            )
            line["cached, language model"] = 100 * cached.part_ratio("prefill", "decode")
            line["decode alone"] = 100 * cached.part_ratio("decode")
            rows.append(line)
    return pd.DataFrame(rows)


def scenes_flops_table(study: Study) -> pd.DataFrame:
    """FLOPs as a share of the unpruned model's, %, on scenes (short captions), mean over pictures."""
    rows = []
    for key in study.keys:
        for kind, cell in scene_cells(study, key).items():
            shares = {
                f"{c}": 100 * np.mean([row["flops"][c] for row in cell["payload"]])
                for c in (*CONVENTIONS, "cached-llm")
            }
            rows.append(
                {
                    "model": study.label(key),
                    "method": METHODS[kind][0],
                    **shares,
                    "tokens": np.mean([row["steps"] for row in cell["payload"]]),
                }
            )
    return pd.DataFrame(rows)


def bound_table() -> pd.DataFrame:
    """The most that dropping all image tokens can save of a decode step's traffic in 16 bits, by batch (arithmetic)."""
    rows = []
    for size, name in PAPER_MODELS.items():
        info = llava_info(size)
        weights = 2.0 * sum(llm_parameters(info).values())
        image = float(kv_bytes(info, info.n_image_tokens, 2))
        for batch in (1, 4, 16, 64):
            saving = batch * image / (weights + batch * image)
            rows.append(
                {
                    "model": name,
                    "weights GB": weights / 1e9,
                    "image KV GB a sample": image / 1e9,
                    "batch": batch,
                    "most that can be saved %": 100 * saving,
                }
            )
    return pd.DataFrame(rows)


def predictor_table(study: Study) -> pd.DataFrame:
    """The predictor's cost: FLOPs against a decode step and against what is saved, time against a decode step."""
    rows = []
    measured = predictor_quantities(study)
    for key in (*study.keys, *PAPER_MODELS):
        info = info_of(study, key)
        shares = f"c6.{key}.flops_share", f"c6.{key}.share_of_saving", f"c6.{key}.time_share"
        row_flops = 2 * info.n_heads * info.head_dim * (info.n_image_tokens + TEXT_TOKENS)
        rows.append(
            {
                "model": label(study, key),
                "FLOPs a call": float(RatePredictor(info.n_heads, N_RATES).flops()),
                "of a decode step": _scientific(measured.get(shares[0])),
                "of what it saves": _scientific(measured.get(shares[1])),
                "of a decode step's time %": 100 * measured[shares[2]]["mean"] if shares[2] in measured else np.nan,
                "features made apart, FLOPs": float(row_flops),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _scientific(quantity: Mapping[str, float] | None) -> str:
    return "–" if quantity is None else f"{quantity['mean']:.1e}"


def predictor_quantities(study: Study) -> dict[str, Any]:
    """c6.* as claims.yaml names them."""
    out: dict[str, Any] = {}
    for key in (*study.keys, *PAPER_MODELS):
        info = info_of(study, key)
        length = TEXT_TOKENS + info.n_image_tokens
        # the cheapest decode step there is, no image token read from layer P on, so that the share is not flattered
        steps = flop_steps(info, length, info.n_image_tokens, kept_by_layer(info, LAYER, (0,), 2), "cached")
        out[f"c6.{key}.flops_share"] = {"mean": RatePredictor(info.n_heads, N_RATES).flops() / float(steps[1])}
    for key in study.keys:
        call = RatePredictor(study.info(key).n_heads, N_RATES).flops()
        rows = scene_cells(study, key)["dyrate"]["payload"]
        saved = [row["unpruned"]["cached"] * (1 - row["flops"]["cached"]) for row in rows]
        if min(saved) > 0:
            shares = [call * row["steps"] / s for row, s in zip(rows, saved, strict=True)]
            out[f"c6.{key}.share_of_saving"] = mean_with_interval(shares, study.scale.bootstrap, study.seed)
    out |= share_quantities(study)
    return out


def quantities(study: Study) -> dict[str, Any]:
    """c4.* and c6.* as claims.yaml names them; of C4 only what was timed: the graph engine at batch 1, one picture."""
    out = predictor_quantities(study)
    options = (study.scale.bootstrap, study.seed)
    for cell, record in time_records(study).items():
        if cell.model not in PAPER_MODELS or cell.batch != 1 or cell.pictures != 1:
            continue
        found = {method: samples(record, f"graph {method}") for method in ("dyrate", *C4)}
        whole = {method: one["whole"] for method, one in found.items() if one is not None}
        for method, name in C4.items():
            if method in whole and "dyrate" in whole:
                out[f"c4.{cell.model}.{name}"] = ratio_of_medians(whole["dyrate"], whole[method], *options)
    return out
