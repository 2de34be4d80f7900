"""Notebook 04, the cheap half: FLOPs on LLaVA-1.5's dimensions and on scenes, latencies beside the paper's, C4 and C6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..accounting import CONVENTIONS, decode_traffic, flop_steps, flops, kv_bytes, llm_parameters
from ..compare import load_paper
from ..models import ModelInfo
from ..plotting import GREY, METHODS, WIDTH_PAGE
from ..predictor import RatePredictor
from .context import Record, Study
from .contradictions import llava_info
from .efficiency import PAPER_VTW, ROLES, TEXT_TOKENS, ceilings, course, latency_cells, scene_cells, subjects
from .summaries import Quantity, mean_with_interval
from .training_runs import LAYER, N_RATES

PAPER_MODELS = {"7b": "LLaVA-1.5-7B", "13b": "LLaVA-1.5-13B"}
STEPS = 64
ORDER = ("original", "fastv-3", "fastv-2", "vtw", "dyrate")


# ------------------------------------------------------------------------------------------- FLOPs on LLaVA-1.5


def kept_by_layer(
    info: ModelInfo, layer: int, kept: Mapping[int, int] | tuple[int, ...], steps: int = STEPS
) -> np.ndarray:
    """[steps, L] image tokens: all below `layer`, the course `kept` (its last value from its end on) from there on."""
    values = tuple(kept.values()) if isinstance(kept, Mapping) else kept
    counts = np.array([values[min(t, len(values) - 1)] for t in range(steps)])
    table = np.full((steps, info.n_layers), info.n_image_tokens)
    table[:, layer:] = counts[:, None]
    return table


def scaled_course(info: ModelInfo, kept: tuple[int, ...], ratio: float = 1 / 3) -> tuple[int, ...]:
    """The course multiplied by the factor that gives `ratio` in the paper's convention (or comes closest) on these dimensions."""
    low, high = 0.0, info.n_image_tokens / max(max(kept), 1)
    for _ in range(40):
        middle = (low + high) / 2
        tried = tuple(int(round(k * middle)) for k in kept)
        above = _ratio(info, LAYER, tried, "paper") > ratio
        low, high = (low, middle) if above else (middle, high)
    return tuple(int(round(k * low)) for k in kept)


def _ratio(info: ModelInfo, layer: int, kept: tuple[int, ...], convention: str) -> float:
    return flops(
        info, TEXT_TOKENS + info.n_image_tokens, info.n_image_tokens, kept_by_layer(info, layer, kept), convention
    ).ratio


def settings(study: Study, size: str) -> dict[str, tuple[int, tuple[int, ...], str]]:
    """What is counted for a LLaVA-1.5 size: method -> (layer, kept course, label)."""
    info = llava_info(size)
    half, all_tokens = info.n_image_tokens // 2, info.n_image_tokens
    learned = course(study, ROLES[size] if ROLES[size] in study.keys else study.keys[0])
    learned = tuple(int(round(k * all_tokens / study.info(study.keys[0]).n_image_tokens)) for k in learned)
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
        for key, (layer, kept, label) in settings(study, size).items():
            line = {"model": name, "method": label, "paper's Table III": printed.get((name, key), np.nan)}
            for convention in CONVENTIONS:
                line[convention] = 100 * _ratio(info, layer, kept, convention)
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


# ---------------------------------------------------------------------------------------------------------- latency


def samples(record: Record, method: str) -> tuple[np.ndarray, np.ndarray]:
    """(prefill, end to end) milliseconds of each round, [repeats]."""
    found = record["payload"]["samples"][method]
    return np.asarray(found["prefill_ms"]), np.asarray(found["end_to_end_ms"])


def per_token(record: Record, method: str) -> np.ndarray:
    """Milliseconds a decode step, round by round."""
    prefill, whole = samples(record, method)
    return (whole - prefill) / (record["config"]["new_tokens"] - 1)


def ratio_of_medians(a: np.ndarray, b: np.ndarray, n: int = 1000, seed: int = 0) -> Quantity:
    """median(a) / median(b) with a bootstrap interval over rounds; rounds are resampled in pairs."""
    if a.size != b.size:
        raise ValueError(f"paired rounds are needed, got {a.size} and {b.size}")
    draws = np.random.default_rng(seed).integers(0, a.size, size=(n, a.size))
    lo, hi = np.quantile(np.median(a[draws], axis=1) / np.median(b[draws], axis=1), [0.025, 0.975])
    mean = float(np.median(a) / np.median(b))
    # with few rounds the estimate may lie outside the percentile interval by rounding; the interval must hold it
    return {"mean": mean, "lo": min(float(lo), mean), "hi": max(float(hi), mean), "n": int(a.size)}


def subject_label(study: Study, key: str) -> str:
    """The timed model's name for a table."""
    return f"{PAPER_MODELS[key]} (random weights)" if key in PAPER_MODELS else study.label(key)


def latency_table(study: Study) -> pd.DataFrame:
    """Medians of prefill, decode a token and end to end, with the interquartile range, beside the paper's milliseconds."""
    printed = load_paper("table3").set_index(["model", "method"]).latency_ms
    rows = []
    for (key, engine, batch), record in latency_cells(study).items():
        methods = [m for m in ORDER if m in record["payload"]["samples"]]
        for method in methods:
            (prefill, whole), token = samples(record, method), per_token(record, method)
            ratio = ratio_of_medians(whole, samples(record, methods[0])[1], study.scale.bootstrap, study.seed)
            name = PAPER_MODELS.get(key, "")
            shown = printed.get((name, method), np.nan) if engine == "ours" and batch == 1 else np.nan
            first = printed.get((name, "original"), np.nan)
            peak = record["payload"]["peak_bytes"][method]
            rows.append(
                {
                    "model": subject_label(study, key), "loop": engine, "batch": batch, "method": METHODS[method][0],
                    "prefill ms": np.median(prefill),
                    "decode ms/token": np.median(token), "end to end ms": np.median(whole),
                    "IQR ms": np.subtract(*np.percentile(whole, [75, 25])),
                    "ratio": ratio["mean"], "prefill ratio": np.median(prefill) / np.median(samples(record, methods[0])[0]),
                    "decode ratio": np.median(token) / np.median(per_token(record, methods[0])), "paper ms": shown,
                    "paper ratio": shown / first,
                    "rounds": len(whole), "GPU GB": np.nan if peak is None else peak / 1e9,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _bars(ax: Axes, values: Mapping[str, np.ndarray]) -> None:
    """One bar a method: the median, with a whisker over the middle half; a dotted line at the unpruned model's."""
    for position, (method, times) in enumerate(values.items()):
        low, middle, high = np.percentile(times, [25, 50, 75])
        error = [[middle - low], [high - middle]]
        ax.bar(
            position,
            middle,
            color=METHODS[method][1],
            width=0.7,
            yerr=error,
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )
    ax.axhline(np.median(values["original"]), color=GREY, linewidth=0.6, linestyle=":")


def latency_figure(study: Study) -> Figure | None:
    """Prefill (top) and decode a token (bottom) of each method, our loop at batch 1; medians, range of the middle half."""
    cells = {
        key: record for (key, engine, batch), record in latency_cells(study).items() if engine == "ours" and batch == 1
    }
    if not cells:
        return None
    fig, axes = plt.subplots(2, len(cells), figsize=(WIDTH_PAGE, 3.4), squeeze=False, sharex="col")
    for column, (key, record) in enumerate(cells.items()):
        _bars(axes[0, column], {method: samples(record, method)[0] for method in ORDER})
        _bars(axes[1, column], {method: per_token(record, method) for method in ORDER})
        axes[0, column].set_title(subject_label(study, key))
        axes[1, column].set_xticks(range(len(ORDER)), ["Original", "FastV 3", "FastV 2", "VTW", "DyRate"], rotation=0)
        limit = decode_floor(study, key)
        if limit is not None:
            axes[1, column].axhline(limit, color="black", linewidth=0.9, linestyle="--", label="weights read once")
            axes[1, column].legend(loc="upper right")
    axes[0, 0].set_ylabel("prefill, ms")
    axes[1, 0].set_ylabel("decode, ms per token")
    return fig


# --------------------------------------------------------------------------------------------------------- ceilings


def _info(study: Study, key: str) -> ModelInfo:
    return llava_info(key) if key in PAPER_MODELS else study.info(key)


def decode_floor(study: Study, key: str) -> float | None:
    """Milliseconds that reading the weights once takes at the measured copy bandwidth: no decode step at batch 1 is faster."""
    gpu = next(s.gpu for s in subjects(study) if s.key == key)
    limits = ceilings(study, gpu)
    if limits is None:
        return None
    parameters, size = llm_parameters(_info(study, key)), 2 if gpu else 4
    return (parameters["layers"] + parameters["head"]) * size / limits["payload"]["copy_gb_s"] / 1e6


def ceiling_table(study: Study) -> pd.DataFrame:
    """Time measured against what the machine could do: bytes a decode step must read, FLOPs of the prefill."""
    rows = []
    for (key, engine, batch), record in latency_cells(study).items():
        gpu = next(s.gpu for s in subjects(study) if s.key == key)
        limits = ceilings(study, gpu)
        if engine != "ours" or limits is None:
            continue
        info, size = _info(study, key), 2 if gpu else 4
        peak = limits["payload"]["matmul_tflops"]["bfloat16" if gpu else "float32"]
        length = TEXT_TOKENS + info.n_image_tokens
        table = kept_by_layer(info, 1, (info.n_image_tokens,), record["config"]["new_tokens"])
        traffic = float(np.mean(decode_traffic(info, length, info.n_image_tokens, table, size, batch)))
        work = float(flop_steps(info, length, info.n_image_tokens, table[:1], "cached")[0]) * batch
        prefill, token = np.median(samples(record, "original")[0]), np.median(per_token(record, "original"))
        floors = traffic / limits["payload"]["copy_gb_s"] / 1e6, work / peak / 1e9
        rows.append(
            {
                "model": subject_label(study, key), "batch": batch, "decode reads GB": traffic / 1e9, "at best ms": floors[0],
                "measured ms": token, "decode: share of best %": 100 * floors[0] / token, "prefill TFLOPs": work / 1e12,
                "prefill at best ms": floors[1], "prefill measured ms": prefill,
                "prefill: share of best %": 100 * floors[1] / prefill,
            }
        )  # fmt: skip
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


# -------------------------------------------------------------------------------------------------------- predictor


def predictor_table(study: Study) -> pd.DataFrame:
    """The predictor's cost: FLOPs against a decode step and against what is saved, time against a decode step."""
    rows = []
    measured = predictor_quantities(study)
    for key in (*study.keys, *PAPER_MODELS):
        info = _info(study, key)
        shares = f"c6.{key}.flops_share", f"c6.{key}.share_of_saving", f"c6.{key}.time_share"
        row_flops = 2 * info.n_heads * info.head_dim * (info.n_image_tokens + TEXT_TOKENS)
        rows.append(
            {
                "model": PAPER_MODELS.get(key) or study.label(key),
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
        info = _info(study, key)
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
    for (key, engine, batch), record in latency_cells(study).items():
        if key in PAPER_MODELS and engine == "ours" and batch == 1:
            features = np.asarray(record["payload"]["features_ms"])
            out[f"c6.{key}.time_share"] = ratio_of_medians(
                features, per_token(record, "dyrate"), study.scale.bootstrap, study.seed
            )
    return out


def quantities(study: Study) -> dict[str, Any]:
    """c4.* and c6.* as claims.yaml names them; of C4 only what was timed."""
    out = predictor_quantities(study)
    for (key, engine, batch), record in latency_cells(study).items():
        if key not in PAPER_MODELS or engine != "ours" or batch != 1:
            continue
        whole = {method: samples(record, method)[1] for method in ORDER}
        options = (study.scale.bootstrap, study.seed)
        out[f"c4.{key}.dyrate_end_to_end_ratio"] = ratio_of_medians(whole["dyrate"], whole["original"], *options)
        for name, method in (("fastv2", "fastv-2"), ("fastv3", "fastv-3"), ("vtw", "vtw")):
            out[f"c4.{key}.dyrate_over_{name}"] = ratio_of_medians(whole["dyrate"], whole[method], *options)
    return out


def findings(study: Study) -> str:
    """Stable lines on where time goes, from the records."""
    lines = []
    for (key, engine, batch), record in latency_cells(study).items():
        first = "original"
        prefill, token = (
            np.median(f(record, "dyrate")) / np.median(f(record, first))
            for f in (lambda r, m: samples(r, m)[0], per_token)
        )
        share = np.median(samples(record, first)[0]) / np.median(samples(record, first)[1])
        whole = ratio_of_medians(
            samples(record, "dyrate")[1], samples(record, first)[1], study.scale.bootstrap, study.seed
        )
        lines.append(
            f"{subject_label(study, key)}, {engine} loop, batch {batch}: DyRate takes x{prefill:.2f} of the prefill "
            f"and x{token:.2f} of a decode step; "
            f"the prefill is {share:.0%} of {record['config']['new_tokens']} tokens, so x{whole['mean']:.3f} end to "
            f"end [{whole['lo']:.3f}, {whole['hi']:.3f}]"
        )
    if not lines:
        lines.append("no latency was measured: there is no record of it and this machine has no GPU")
    return "\n".join(lines)
