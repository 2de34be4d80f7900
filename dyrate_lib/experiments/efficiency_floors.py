"""Notebook 04: what no run can beat, from FLOPs, bytes and the machine's measured ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..accounting import decode_traffic, flop_parts, llm_parameters
from ..models import ModelInfo
from .efficiency_course import TEXT_TOKENS


def floor_ms(
    info: ModelInfo,
    table: Any,
    n_image: int,
    batch: int,
    limits: Mapping[str, Any],
    size: int = 2,
    text: int = TEXT_TOKENS,
) -> dict[str, float]:
    """What no run can beat, ms, for kept tokens `table` [steps, L] (row 0 the prompt's) and the machine's measured ceilings.

    prefill: its matrix products' FLOPs over the measured matrix rate; prefill_bytes: reading the weights; decode, where the
    table has steps: the mean over them of the bytes that must be read (weights once, keys and values that are left) over the
    copy bandwidth.
    """
    length, rate = text + n_image, limits["matmul_tflops"]["bfloat16" if size == 2 else "float32"]
    parts = flop_parts(info, length, n_image, table[:1], "cached")
    out = {"prefill": batch * float(sum(parts.values())) / rate / 1e9}
    weights = llm_parameters(info)
    out["prefill_bytes"] = size * (weights["layers"] + weights["head"]) / limits["copy_gb_s"] / 1e6
    if len(table) > 1:
        traffic = decode_traffic(info, length, n_image, table, size, batch)
        out["decode"] = float(traffic.mean()) / limits["copy_gb_s"] / 1e6
    return out
