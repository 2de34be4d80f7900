"""Notebook 04: what pruning saves, in FLOPs of two conventions and in measured time, prefill and decode apart.

What is measured is in `efficiency_cells`, how in `efficiency_clock`; the tables are in `efficiency_tables`. From the command line
this module times single cells (see `efficiency_cli`).
"""

from __future__ import annotations

import sys
from typing import Any

from .benchmarks import remembered
from .context import Record, Study
from .efficiency_cells import (
    ROLES,
    Cell,
    NeedsGPU,
    Subject,
    cells,
    forget,
    if_there,
    record_of,
    subjects,
    timed_model,
)
from .efficiency_clock import latency_inputs
from .efficiency_course import PAPER_VTW, TEXT_TOKENS, Replay, course, long_cell, scene_cells


def latency_records(study: Study) -> dict[Cell, Record]:
    """All records of timings there are or that this machine can make."""
    return remembered(study, ("latency",), lambda: _latency_records(study))


def _latency_records(study: Study) -> dict[Cell, Record]:
    chosen = [
        s.key for s in subjects(study) if study.keys_asked == study.keys or ROLES.get(s.key, s.key) in study.keys_asked
    ]
    found = {}
    for cell in study.each([cell for cell in cells(study) if cell.model in chosen], "latency"):
        record = record_of(study, cell)
        if record is not None:
            found[cell] = record
    forget(study)
    return found


def compute(study: Study) -> list[Record]:
    """Every record of notebook 04 that this machine can make."""
    found: list[Record] = []
    for key in study.keys_asked:
        found += [long_cell(study, key), *scene_cells(study, key).values()]
    return found + list(latency_records(study).values())


def quantities(study: Study) -> dict[str, Any]:
    """What claims C4 and C6 are judged by."""
    from .efficiency_tables import quantities

    return quantities(study)


__all__ = [
    "PAPER_VTW", "ROLES", "TEXT_TOKENS", "Cell", "NeedsGPU", "Replay", "Subject", "compute", "course", "if_there",
    "latency_inputs", "latency_records", "long_cell", "quantities", "scene_cells", "subjects", "timed_model",
]  # fmt: skip


if __name__ == "__main__":
    from dyrate_lib.experiments.efficiency_cli import main

    sys.exit(main())
