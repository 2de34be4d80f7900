"""Which way each product of a decode step is fastest, measured on the model's own weights: cuBLAS, or a skinny kernel's setting.

    python -m dyrate_lib.engine.tune --size 7b --rows 1,16,64

prints the table that `triton_ops.DEFAULT` holds. A product is timed over all layers in one graph, so that no matrix is found in
the cache, with the norm, SwiGLU or sum that belongs to it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .skinny_kernel import CANDIDATES, Config, skinny
from .triton_ops import TritonOps
from .weights import LayerWeights, Weights

KINDS = ("qkv", "out", "gate_up", "down", "head")


def product(ops: TritonOps, kind: str, x: Tensor, inner: Tensor, attended: Tensor, w: LayerWeights) -> Tensor:
    """One product of a layer with what belongs to it: x [M, D], inner [M, W], attended [M, H d]."""
    if kind == "qkv":
        return ops.norm_qkv(x, w)
    if kind == "out":
        return ops.attention_out(x, attended, w)
    config = ops.config(x.shape[0], kind)
    if kind == "gate_up":
        if config is None:
            return ops.swiglu(ops.linear(ops.rms_norm(x, w.post_norm, w.post_eps), w.gate_up))
        return skinny(x, w.gate_up, config, norm=w.post_norm, eps=w.post_eps, gated=True, early=ops.early)
    if config is None:
        return ops.add_linear(x, inner, w.down)
    return skinny(inner, w.down, config, residual=x, early=ops.early)


def graph_ms(work: Callable[[], Any], repeats: int = 5) -> float:
    """Milliseconds of `work` as a captured graph, median."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def tune(weights: Weights, rows: int, early: bool = False, kinds: tuple[str, ...] = KINDS) -> dict[str, dict[str, Any]]:
    """For every kind: microseconds a layer and GB/s of each way, at `rows` rows; "best" names the fastest.

    Returns {kind: {"best": "cublas" or str(Config), "config": Config or None, "us": {way: microseconds}, "gb_s": of the best}}.
    """
    first = weights.layers[0]
    device, dtype = first.qkv.device, first.qkv.dtype

    def random(width: int) -> Tensor:
        return torch.randn(rows, width, device=device).to(dtype)

    x, inner, attended = random(first.qkv.shape[1]), random(first.down.shape[1]), random(first.o.shape[1])
    limit = 1 if rows == 1 else 16 if rows <= 16 else 64
    ways: dict[str, Config | None] = {"cublas": None}
    ways |= {_name(config): config for config in CANDIDATES["one" if rows == 1 else "few"]}
    found: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        times: dict[str, float] = {}
        for name, config in ways.items():
            ops = TritonOps({} if config is None else {(limit, kind): config}, early)
            count = 4 if kind == "head" else len(weights.layers)
            if kind == "head":
                work = partial(_heads, ops, x, weights, count)
            else:
                work = partial(_layers, ops, kind, x, inner, attended, weights)
            try:
                times[name] = 1000 * graph_ms(work) / count
            except Exception as error:  # noqa: BLE001  a setting that the device has no room for
                times[name] = float("inf")
                print(f"# {kind} {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        best = min(times, key=times.__getitem__)
        matrix = weights.head if kind == "head" else getattr(first, "o" if kind == "out" else kind)
        found[kind] = {
            "best": best, "config": ways[best], "gb_s": matrix.nbytes / times[best] / 1e3,
            "us": {name: round(value, 2) for name, value in times.items()},
        }  # fmt: skip
    return found


def table_of(found: dict[int, dict[str, dict[str, Any]]]) -> dict[tuple[int, str], Config]:
    """Tunings at several row counts as `TritonOps`' table."""
    return {
        (1 if rows == 1 else 16 if rows <= 16 else 64, kind): entry["config"]
        for rows, kinds in found.items()
        for kind, entry in kinds.items()
        if entry["config"] is not None
    }


def _name(config: Config) -> str:
    return f"{config.rows}x{config.columns}w{config.warps}s{config.stages}"


def _layers(ops: TritonOps, kind: str, x: Tensor, inner: Tensor, attended: Tensor, weights: Weights) -> None:
    for w in weights.layers:
        product(ops, kind, x, inner, attended, w)


def _heads(ops: TritonOps, x: Tensor, weights: Weights, count: int) -> None:
    for _ in range(count):
        ops.head(x, weights.norm, weights.eps, weights.head)


def main(arguments: list[str] | None = None) -> int:
    """Time every way at LLaVA-1.5's dimensions; 2 without a CUDA device."""
    from .models_only import weights_of

    parser = argparse.ArgumentParser(prog="python -m dyrate_lib.engine.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("7b", "13b"), default="7b")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64])
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("dyrate: tuning needs a CUDA device, and there is none", file=sys.stderr)
        return 2
    weights = weights_of(args.size)
    found = {rows: tune(weights, rows, early=torch.cuda.get_device_capability() >= (9, 0)) for rows in args.rows}
    for rows, kinds in found.items():
        for kind, entry in kinds.items():
            print(f"{rows:3d} rows, {kind}: {entry['best']}, {entry['gb_s']:.0f} GB/s; microseconds {entry['us']}")
    for key, config in table_of(found).items():
        print(f"    {key}: {config},")
    return 0


if __name__ == "__main__":
    sys.exit(main())
