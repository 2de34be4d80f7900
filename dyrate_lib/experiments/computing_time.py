"""What a full run costs: seconds of computing per notebook, from the provenance of the records, against an hour.

A record that several notebooks read counts for the first that asks for it. Seconds of processes at work side by side add up:
it is device time, not the time on the wall.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from .. import paths
from ..errors import ResourceError
from ..records import read_record, record_key
from .context import Record, Study
from .reading import is_shipped, part, reader

LIMIT = 60.0  # minutes on one GPU, for everything
# notebook -> the modules whose compute(study) makes its records; those that a version lacks are passed over
PARTS: dict[str, tuple[str, ...]] = {
    "01_attention_analysis": ("attention",), "02_training": ("training_runs",),
    "03_benchmarks": ("caption_cells", "short_answers", "fronts", "pruning_cost"), "04_efficiency": ("efficiency",),
    "05_ablations": ("ablations", "controls"), "06_visualization": ("visualization",),
}  # fmt: skip
HEADS = "00_scenes_vlm/heads"  # the records of notebook 00, which has no compute(study)
COLUMNS = ("notebook", "records", "device", "seconds", "complete")


def spent(study: Study) -> pd.DataFrame:
    """One row for each notebook and device: records, seconds, and whether all of the notebook's records are there.

    The training of the scenes models, for which there is no record, is notebook 00's, read from their metrics.
    """
    own = [record["provenance"] for record in study.store.records(HEADS)]
    rows = _rows("00_scenes_vlm", [*(_models() if is_shipped(study) else []), *own], True)
    with TemporaryDirectory() as folder:
        shared = reader(study, Path(folder))
        counted: set[str] = set()
        for notebook, modules in PARTS.items():
            there = dataclasses.replace(shared, notebook=notebook)  # what one has read, the next need not
            complete = all([_looked(there, name) for name in modules])
            found = [record for key, record in there._read.items() if key not in counted]
            counted |= set(there._read)
            rows += _rows(notebook, [r["provenance"] for r in [*found, *_scores(there, found)]], complete)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _looked(study: Study, name: str) -> bool:
    """Reads the records of a module as far as they are there; whether all are."""
    module = part(name)
    if module is None:
        return True
    try:
        module.compute(study)
    except ResourceError:
        return False
    return True


def _scores(study: Study, records: Iterable[Record]) -> list[Record]:
    """The scores of records of captions, where they are in the store."""
    out = []
    for record in records:
        payload = record["payload"]
        if not (isinstance(payload, list) and payload and isinstance(payload[0], dict) and {"id", "text"} <= set(payload[0])):
            continue
        said = sorted((entry["id"], entry["text"]) for entry in payload)
        config = {"predictions": hashlib.sha256(json.dumps(said).encode()).hexdigest(), "data": record["config"].get("data")}
        file = study.scores_store.find("scores", record_key("scores", config, []))
        if file is not None:
            out.append(read_record(file))
    return out


def _models() -> list[dict[str, Any]]:
    """Provenance of the two models' training: {device, seconds}."""
    found = []
    for file in sorted(paths.checkpoints().glob("*/metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        made = metrics.get("provenance", {}) | {"seconds": metrics["train_seconds"]}
        found.append(made)
    return found


def _rows(notebook: str, made: Iterable[Mapping[str, Any]], complete: bool) -> list[dict[str, Any]]:
    by: dict[str, list[float]] = {}
    for entry in made:
        by.setdefault(str(entry.get("device") or "not known"), []).append(float(entry["seconds"]))
    if not by:
        return [{"notebook": notebook, "records": 0, "device": "", "seconds": 0.0, "complete": "no"}]
    return [
        {"notebook": notebook, "records": len(times), "device": device, "seconds": sum(times),
         "complete": "yes" if complete else "no"}
        for device, times in sorted(by.items())
    ]  # fmt: skip


def time_table(data: pd.DataFrame) -> pd.DataFrame:
    """`spent` with minutes, a row of the sum for each device, and one of all."""
    rows = data[data.records > 0]
    sums = [
        {"notebook": "sum", "records": int(part.records.sum()), "device": device, "seconds": float(part.seconds.sum())}
        for device, part in rows.groupby("device", sort=True)
    ]
    if len(sums) > 1:
        whole = {"records": int(rows.records.sum()), "device": "all", "seconds": float(rows.seconds.sum())}
        sums.append({"notebook": "sum", **whole})
    table = pd.concat([data, pd.DataFrame(sums, columns=list(COLUMNS)).assign(complete="")], ignore_index=True)
    return table.assign(minutes=table.seconds / 60)


def limit_line(data: pd.DataFrame, limit: float = LIMIT) -> str:
    """The sum on each device against the limit in minutes, and which notebooks' records are not all there."""
    if not data.records.sum():
        return "no record to tell computing time from"
    parts = []
    for device, group in data[data.records > 0].groupby("device", sort=True):
        minutes = group.seconds.sum() / 60
        over = f"{minutes - limit:.1f} over" if minutes > limit else f"{limit - minutes:.1f} under"
        parts.append(f"{device}: {minutes:.1f} min, {over} the {limit:.0f} asked for")
    lacking = sorted(set(data[data.complete == "no"].notebook))
    return "; ".join(parts) + (f"; not all records are there of {', '.join(lacking)}" if lacking else "")
