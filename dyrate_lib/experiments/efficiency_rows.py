"""Notebook 04: records of timings as rows: medians, spread, floors and counts of every loop and method, by tokens generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..accounting import flops, kv_bytes
from ..models import ModelInfo
from .benchmarks import remembered
from .context import Record, Study
from .efficiency import latency_records
from .efficiency_cells import METHODS, ROLES, Cell, info_of
from .efficiency_course import TEXT_TOKENS, kept_by_layer
from .efficiency_floors import floor_ms
from .summaries import Quantity

PAPER_MODELS = {"7b": "LLaVA-1.5-7B", "13b": "LLaVA-1.5-13B"}
LOOPS = {
    "graph": "graph engine", "reference": "reference loop", "stock": "stock generate", "static": "stock, static cache + compile",
}  # fmt: skip


def ratio_of_medians(a: np.ndarray, b: np.ndarray, n: int = 1000, seed: int = 0) -> Quantity:
    """median(a) / median(b) with a bootstrap interval over rounds; resampled in pairs where there are as many of both."""
    random = np.random.default_rng(seed)
    draws = random.integers(0, a.size, size=(n, a.size))
    others = draws if a.size == b.size else random.integers(0, b.size, size=(n, b.size))
    lo, hi = np.quantile(np.median(a[draws], axis=1) / np.median(b[others], axis=1), [0.025, 0.975])
    mean = float(np.median(a) / np.median(b))
    # with few rounds the estimate may lie outside the percentile interval by rounding; the interval must hold it
    return {"mean": mean, "lo": min(float(lo), mean), "hi": max(float(hi), mean), "n": int(min(a.size, b.size))}


def samples(record: Record, name: str, new: int | None = None) -> dict[str, np.ndarray] | None:
    """Milliseconds of each sample of a contender for `new` tokens (None: the headline): prefill, token, whole.

    The whole is by the wall clock where the run ended there, and the moment at which the last token was there where it went on.
    None where there is no sample.
    """
    lengths = record["config"]["new_tokens"]
    new = lengths[1] if new is None else new
    found = record["payload"]["contenders"].get(name, {})
    rows = found.get("long" if new == lengths[2] else "samples")
    if not rows or f"ms_{new}" not in rows:
        return None
    first, last = np.asarray(rows["ms_1"]), np.asarray(rows[f"ms_{new}"])
    whole = last if new == lengths[0] else np.asarray(rows["wall_ms"])
    return {"prefill": first, "token": (last - first) / (new - 1), "whole": whole}


def speed_up(record: Record, slow: str, fast: str, new: int | None = None) -> Quantity | None:
    """How many times faster contender `fast` is than `slow`, end to end, with its interval; None where one was not sampled."""
    a, b = samples(record, slow, new), samples(record, fast, new)
    return None if a is None or b is None else ratio_of_medians(a["whole"], b["whole"])


def time_records(study: Study) -> dict[Cell, Record]:
    """Records of "time" cells, in the order of the cells."""
    return {cell: record for cell, record in latency_records(study).items() if cell.kind == "time"}


def size_of(study: Study, cell: Cell) -> int:
    """Bytes of a number: 2 on a GPU (bfloat16), 4 elsewhere."""
    return 2 if latency_records(study)[cell]["config"]["where"] == "gpu" else 4


def label(study: Study, key: str) -> str:
    """The timed model's name for a table."""
    return PAPER_MODELS.get(key) or study.label(key)


def kept_table(info: ModelInfo, record: Record, method: str, new: int) -> np.ndarray:
    """[new, L] image tokens that a method reads, as its record says."""
    reads = record["payload"]["reads"][method]
    return kept_by_layer(info, reads["layer"], tuple(reads["kept"]), new, record["config"]["image_tokens"])


def floors(study: Study, cell: Cell, record: Record, method: str, new: int) -> dict[str, float]:
    """ms that no run can beat: prefill, prefill_bytes, decode (a step), and whole: the prompt's pass and all steps."""
    info, n_image = info_of(study, cell.model), record["config"]["image_tokens"]
    table = kept_table(info, record, method, new)
    found = floor_ms(info, table, n_image, cell.batch, record["payload"]["ceilings"], size_of(study, cell))
    return found | {"whole": float(whole_floor(found, new))}


def whole_floor(found: Mapping[str, Any], new: int) -> Any:
    """The floor of a prompt's pass, of whichever of FLOPs and bytes takes longer, and of `new - 1` steps; numbers or arrays."""
    return np.maximum(found["prefill"], found["prefill_bytes"]) + (new - 1) * found["decode"]


def all_rows(study: Study) -> pd.DataFrame:
    """Every contender of every cell by new tokens; see `_row` for the columns. Empty where nothing was timed."""
    return remembered(study, ("latency rows",), lambda: pd.DataFrame(_rows(study)))


def _rows(study: Study) -> Iterator[dict[str, Any]]:
    for cell, record in time_records(study).items():
        for new in record["config"]["new_tokens"]:
            for name in record["config"]["contenders"]:
                loop, method = name.split()
                found = samples(record, name, new)
                if found is not None:
                    yield _row(study, cell, record, loop, method, new, found)
                elif name in record["payload"]["failed"] and new == record["config"]["new_tokens"][1]:
                    why, fits = (record["payload"][what][name] for what in ("failed", "would_fit"))
                    yield _place(cell, record, loop, method, new) | {"failed": why, "samples that would fit": fits}


def _place(cell: Cell, record: Record, loop: str, method: str, new: int) -> dict[str, Any]:
    config = record["config"]
    return {
        "key": cell.model, "batch": cell.batch, "image tokens": config["image_tokens"], "new tokens": new, "loop": loop,
        "method": method, "n": 0, "failed": "",
    }  # fmt: skip


def _row(
    study: Study, cell: Cell, record: Record, loop: str, method: str, new: int, found: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Times in ms: medians, and 25 and 75 % as columns "..., q1" and "..., q3"; GB are 1e9 bytes of the whole batch."""
    info, n_image = info_of(study, cell.model), record["config"]["image_tokens"]
    read = method if loop in ("graph", "reference", "stock") else "original"
    table, least = kept_table(info, record, read, new), floors(study, cell, record, read, new)
    row = _place(cell, record, loop, method, new) | {"n": len(found["whole"])}
    for name, title in (("prefill", "prefill ms"), ("token", "ms a token"), ("whole", "end to end ms")):
        low, middle, high = np.percentile(found[name], [25, 50, 75])
        row |= {title: middle, f"{title}, q1": low, f"{title}, q3": high}
    first = samples(record, "graph original", new)
    if first is not None:
        row["x unpruned graph"] = float(np.median(first["whole"])) / row["end to end ms"]
    row |= {
        "tokens a second": 1000 * cell.batch * new / row["end to end ms"],
        "prefill floor ms": least["prefill"], "decode floor ms": least["decode"], "end to end floor ms": least["whole"],
        "prefill x floor": row["prefill ms"] / max(least["prefill"], least["prefill_bytes"]),
        "decode x floor": row["ms a token"] / least["decode"],
    }  # fmt: skip
    alone = record["payload"]["contenders"][f"{loop} {method}"]
    size = size_of(study, cell)
    last = table[-1] + TEXT_TOKENS + new - 1
    row |= {
        "peak GB": alone["peak_bytes"] / 1e9 if "peak_bytes" in alone else np.nan,
        "KV held GB": alone["kv_held_bytes"] / 1e9 if "kv_held_bytes" in alone else np.nan,
        "KV read GB": cell.batch * kv_bytes(info, last, size) / 1e9,
    }  # fmt: skip
    for convention in ("cached", "paper"):
        count = flops(info, TEXT_TOKENS + n_image, n_image, table, convention)
        row |= {
            f"TFLOPs, {convention}": cell.batch * float(count) / 1e12,
            f"% of unpruned, {convention}": 100 * count.ratio,
        }
    if "intake_ms" in alone.get("samples", {}):
        row["host intake ms"] = float(np.median(alone["samples"]["intake_ms"]))
    return row


def headline(study: Study) -> pd.DataFrame:
    """Rows at the headline number of new tokens (64 at full scale)."""
    rows = all_rows(study)
    if not len(rows):
        return rows
    middle = {cell.model: record["config"]["new_tokens"][1] for cell, record in time_records(study).items()}
    return rows[rows["new tokens"] == rows["key"].map(middle)]


__all__ = [
    "LOOPS", "METHODS", "PAPER_MODELS", "ROLES", "all_rows", "floors", "headline", "label", "ratio_of_medians", "samples",
    "speed_up", "time_records", "whole_floor",
]  # fmt: skip
