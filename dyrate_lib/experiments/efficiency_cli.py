"""Cells of notebook 04 from the command line, so that several machines take different ones.

    python -m dyrate_lib.experiments.efficiency --list
    python -m dyrate_lib.experiments.efficiency --cells 7b:1:576,7b:16:2880 --out build/gpu0

A finished cell is written at once, to OUT/records/latency; one that is there already is not timed again.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence

import torch

from ..errors import DyRateError
from .context import open_study
from .efficiency_cells import Cell, cells, estimate_seconds, forget, info_of, parse_cell, record_of

LOAD_SECONDS = 25
MARGIN = 60  # between the last sample and the end of a run with a limit: long samples, writing


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if any cell failed (the others are made all the same), 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m dyrate_lib.experiments.efficiency", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show every cell and its estimated seconds")
    parser.add_argument(
        "--cells", default="", help="cells by name, separated by commas, or 'all'; those that are there are only read"
    )
    parser.add_argument("--scale", default="auto", help="smoke, full, or auto: full with a GPU (default)")
    parser.add_argument("--records", default="committed", help="committed (default: what is there is read) or fresh")
    parser.add_argument("--out", default="", help="folder for new records (default: build)")
    parser.add_argument("--seconds", type=float, default=450.0, help="stop sampling a cell after these (default 450)")
    parser.add_argument(
        "--until", type=float, default=0.0, help="seconds that all may take: start no cell that would end later"
    )
    parser.add_argument(
        "--skip", default="", help="what to leave out, by commas: static, stock, reference (loops), long (runs)"
    )
    parser.add_argument("--model-small", default="scenes-small")
    parser.add_argument("--model-base", default="scenes-base")
    args = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        study = open_study(
            "04_efficiency", scale=args.scale, records=args.records, out=args.out, model_small=args.model_small,
            model_base=args.model_base, progress=False,
        )  # fmt: skip
        wanted = (
            cells(study) if args.cells in ("", "all") else [parse_cell(study, name) for name in args.cells.split(",")]
        )
        if args.list or not args.cells:
            for cell in wanted:
                print(f"{_name(study, cell):14s} about {estimate_seconds(study, cell):5.0f} s")
            print(
                f"and about {LOAD_SECONDS} s to load a model; in all {sum(estimate_seconds(study, c) for c in wanted):.0f} s"
            )
            return 0
    except DyRateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = 0
    skip = tuple(name for name in args.skip.split(",") if name)
    for cell in wanted:
        name, about = _name(study, cell), estimate_seconds(study, cell)
        spent = time.monotonic() - begin
        if args.until and spent + about > args.until:
            print(f"{name}: left out, {about:.0f} s would not end before {args.until:.0f} s", flush=True)
            continue
        print(f"{name}: about {about:.0f} s", flush=True)
        start = time.monotonic()
        seconds = min(args.seconds, max(60.0, args.until - spent - MARGIN)) if args.until else args.seconds
        try:
            record = record_of(study, cell, seconds, skip)
        except Exception as error:  # noqa: BLE001  the other cells are not to be lost
            failed += 1
            print(f"{name}: failed, {type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}", flush=True)
            if isinstance(error, torch.AcceleratorError):  # the device answers no more
                break
            continue
        if record is None:
            print(f"{name}: cannot be made here", flush=True)
            continue
        print(f"{name}: done in {time.monotonic() - start:.0f} s; {summary(record)}", flush=True)
    forget(study)
    return 1 if failed else 0


def _name(study, cell: Cell) -> str:  # type: ignore[no-untyped-def]
    return cell.name(info_of(study, cell.model).n_image_tokens)


def summary(record: dict) -> str:
    """A record's medians in a line, to watch a run by."""
    import numpy as np

    payload, parts = record["payload"], []
    for name, found in payload.get("contenders", {}).items():
        rows = found["samples"]
        if rows:
            first, wall = np.median(rows["ms_1"]), np.median(rows["wall_ms"])
            parts.append(f"{name}: prefill {first:.2f}, end to end {wall:.2f} ms (n={len(rows['wall_ms'])})")
    for pair, first in {**payload.get("real", {}), **payload.get("random", {})}.items():
        parts.append(f"{pair}: {sum(f < 0 for f in first)}/{len(first)} the same")
    parts += [f"{name} FAILED: {why}" for name, why in payload.get("failed", {}).items()]
    return "\n    " + "\n    ".join(parts)
