"""Notebook 04: what predictor, features and bookkeeping take of a decode step, and the kernels a step's time goes to (C6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from .context import Record, Study
from .efficiency import latency_records
from .efficiency_cells import Cell
from .efficiency_course import LAYER
from .efficiency_rows import PAPER_MODELS, label, ratio_of_medians, samples
from .summaries import Quantity

BOOKKEEPING = ("_advance", "_emit")  # our kernels: predictor, lengths and trace; choice of the token
KINDS = {
    "matrix products": ("_one", "_few", "gemm", "gemv", "cutlass", "nvjet", "splitk", "cublas", "xmma", "::mm", "addmm", "bmm"),
    "attention": ("_attend", "_combine", "flash", "fmha", "attention"),
    "predictor, ranking, bookkeeping": ("_advance",), "choice of the token": ("_emit",),
    "norms, activations, rotation": ("_rms_norm", "_swiglu", "_rope", "silu", "layer_norm"),
}  # fmt: skip


def share_records(study: Study) -> dict[Cell, Record]:
    """Records of "share" cells."""
    return {cell: record for cell, record in latency_records(study).items() if cell.kind == "share"}


def feature_us(record: Record) -> float | None:
    """Microseconds a step that the features cost: the feature layer's attention less that of the other layers below P, which
    read as many tokens (below nothing by noise at times); None where the profile does not tell, as on a CPU."""
    durations = record["payload"]["attention_us"]
    others = [us for layer, us in enumerate(durations[:LAYER]) if layer != LAYER - 1]
    return durations[LAYER - 1] - float(np.mean(others)) if others else None


def kernels_of(record: Record, part: str) -> tuple[list[tuple[str, float, float]], float]:
    """[(name, calls, microseconds)] a step of a profile, largest first, and the microseconds of all.

    On a GPU without the operators (aten::) that records of version 0.3.0 hold beside the kernels that they launched: they
    repeat these kernels' time.
    """
    found, gpu = record["payload"]["profile"][part], record["config"]["where"] == "gpu"
    steps, rows, total = found["steps"], [], found["total_us"]
    for name, calls, us in found["kernels"]:
        if gpu and name.startswith("aten::"):
            total -= us
        else:
            rows.append((name, calls / steps, us / steps))
    return rows, total / steps


def bookkeeping_us(record: Record, names: tuple[str, ...] = ("_advance",)) -> float | None:
    """Microseconds a step in our bookkeeping kernels, from the profile; None where it holds none (on a CPU)."""
    spent = [us for name, _, us in kernels_of(record, "decode")[0] if name.startswith(names)]
    return sum(spent) if spent else None


def shares(record: Record, n: int = 1000, seed: int = 0) -> dict[str, Quantity]:
    """{predictor, all} as shares of a decode step, with intervals over rounds: the predictor alone (course with and without it);
    predictor, lengths and features together (one count with all of it, and without any)."""
    found = {name: samples(record, name) for name in record["payload"]["contenders"]}
    if any(
        found.get(name) is None for name in ("course", "course with predictor", "one count", "one count with predictor")
    ):
        return {}
    token = {name: one["token"] for name, one in found.items() if one is not None}
    extra = token["one count with predictor"] - token["one count"] + (feature_us(record) or 0.0) / 1000
    alone = token["course with predictor"] - token["course"]
    return {
        "predictor": ratio_of_medians(alone, token["course with predictor"], n, seed),
        "all": ratio_of_medians(extra, token["one count with predictor"], n, seed),
    }


def share_quantities(study: Study) -> dict[str, Any]:
    """c6.{model}.time_share: predictor, lengths and features together, of a decode step at batch 1."""
    out = {}
    for cell, record in share_records(study).items():
        if cell.model in PAPER_MODELS and cell.batch == 1 and feature_us(record) is not None:
            found = shares(record, study.scale.bootstrap, study.seed)
            if found:
                out[f"c6.{cell.model}.time_share"] = found["all"]
    return out


def overhead_table(study: Study) -> pd.DataFrame:
    """What looking, predicting and lowering lengths takes of a decode step, by model and batch."""
    rows = []
    for cell, record in share_records(study).items():
        found = shares(record, study.scale.bootstrap, study.seed)
        one = samples(record, "one count with predictor")
        if not found or one is None:
            continue
        step, features = float(np.median(one["token"])), feature_us(record)
        kernel, whole = bookkeeping_us(record), kernels_of(record, "decode")[1]
        rows.append(
            {
                "model": label(study, cell.model), "batch": cell.batch, "step ms": step,
                "predictor %": 100 * found["predictor"]["mean"],
                "predictor, lengths, features %": 100 * found["all"]["mean"],
                "its 95 % interval": f"{100 * found['all']['lo']:.2f} to {100 * found['all']['hi']:.2f}",
                "features, us a step": np.nan if features is None else features,
                "bookkeeping kernel, us a step": np.nan if kernel is None else kernel,
                "bookkeeping kernel, % of kernels' time": np.nan if kernel is None else 100 * kernel / whole,
                "rounds": found["all"]["n"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def kind_of(name: str) -> str:
    """What a kernel (or operator) does, by its name."""
    low = name.lower()
    for kind, parts in KINDS.items():
        if any(low.startswith(part) if part.startswith("_") else part in low for part in parts):
            return kind
    return "other"


def kernel_table(study: Study, part: str = "decode", top: int = 8) -> pd.DataFrame:
    """The kernels that take most of a decode step ("decode") or of a prompt's pass ("prefill"), DyRate, by model and batch."""
    rows = []
    for cell, record in share_records(study).items():
        kernels, total = kernels_of(record, part)
        for name, calls, us in kernels[:top]:
            rows.append(
                {
                    "model": label(study, cell.model), "batch": cell.batch, "kernel": name[:48], "what": kind_of(name),
                    "calls": calls, "us": us, "% of the time": 100 * us / total,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def agreement_table(study: Study) -> pd.DataFrame:
    """How many greedy replies are the same in two loops, and where the others first differ."""
    rows = []
    for cell, record in latency_records(study).items():
        if cell.kind != "agreement":
            continue
        payload = record["payload"]
        sets = {f"{payload['n']} pictures of scenes": payload["real"], "random weights": payload["random"]}
        for where, pairs in sets.items():
            for pair, first in pairs.items():
                differ = sorted(at + 1 for at in first if at >= 0)
                loops, _, method = pair.partition(": ")
                rows.append(
                    {
                        "replies": where, "loops": loops, "method": method, "n": len(first),
                        "the same %": 100 * sum(at < 0 for at in first) / len(first),
                        "first difference at token, median": float(np.median(differ)) if differ else np.nan,
                        "earliest": differ[0] if differ else np.nan,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)
