"""A study of a few seconds, of the real one's own cells on the tiny random model: what is killed, doubled and starved of room.

Run as a program it makes the study's records in a folder: `python -m tests.soak_study FOLDER [LOG]`, alone or under torchrun.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyrate_lib import distributed, jobs, store
from dyrate_lib.experiments import cells, training_runs
from dyrate_lib.experiments.context import Study, open_study
from dyrate_lib.records import canonical, read_record

TINY = "random:tiny"
SIZES = dict(
    n_captions=4, n_validation=3, batch_size=2, train_steps=3, train_batch=3, targets=(0.8,), predictor_seeds=(0,), n_masked=1,
    max_new_tokens=8,
)  # fmt: skip


def stop_the_clock() -> None:
    """Provenance without times: what is left of a record is then the same, byte for byte, whenever it was made."""
    store.provenance = lambda seconds, about=None: {"device": "any", "date": "none", "seconds": 0.0, **(about or {})}


def open_small(out: str | Path, progress: bool = False) -> Study:
    """The study in an output folder; models are loaded at the first record that needs one."""
    study = open_study("02_training", scale="smoke", records="fresh", out=str(out), model_small=TINY, model_base=TINY)
    return dataclasses.replace(study, scale=dataclasses.replace(study.scale, **SIZES), progress=progress)


def compute(study: Study) -> int:
    """Train, save the predictor, and reply under it and without: how many records there are then."""
    trained = training_runs.trained_cells(study)
    training_runs.save_predictors(study, trained)
    made = [*trained.values(), *training_runs.schedules(study).values()]
    made.append(training_runs.masked_against_discarded(study))
    made += [study.captions("small", "coco", study.method(name)) for name in ("original", "fastv-2")]
    made.append(study.captions("small", "coco", study.method("dyrate", target=0.8)))
    return len(made)


def files(out: str | Path) -> dict[str, str]:
    """Every file below a folder and the hash of its bytes.

    What a killed writer left unfinished is no result: names that begin with a dot, which nobody reads, removed when an hour old.
    """
    found = sorted(path for path in Path(out).rglob("[!.]*") if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def contents(out: str | Path) -> dict[str, bytes]:
    """Every record below a folder by name, without its provenance: what a record says, in bytes."""
    found = {}
    for path in sorted(Path(out).rglob("*.json.gz")):
        record = read_record(path)
        kept = {key: value for key, value in record.items() if key not in ("provenance", "sha256")}
        found[path.relative_to(out).as_posix()] = canonical(kept)
    return found


def train_alone(out: str | Path, names: Sequence[str]) -> dict[str, bytes]:
    """What is in the records of training jobs of the smoke study (train-KEY-TARGET-SEED) when this process does them itself."""
    for name in names:
        _, key, target, seed = name.split("-")
        command = [key, target, seed, "--scale", "smoke", "--out", str(out)]
        for size in ("small", "base"):
            command += [f"--model-{size}", TINY]
        assert jobs.train(command) == 0
    return contents(out)


def log_replies(log: str) -> None:
    """Appends to a file what each process replies to: its number, the record and the pictures.

    A first reply waits until every process has one to make: a process that is late would else find all of them made.
    """
    real = cells.predict

    def begun() -> set[str]:
        return {line.split()[0] for line in Path(log).read_text(encoding="utf-8").splitlines() if " replies " in line}

    def predict(model: Any, processor: Any, dataset: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{distributed.rank()} replies {method.name} {dataset.name} {kwargs['indices']}\n")
        until = time.monotonic() + 60
        while len(begun()) < distributed.size() and time.monotonic() < until:
            time.sleep(0.05)
        return real(model, processor, dataset, method, *args, **kwargs)

    cells.predict = predict


if __name__ == "__main__":
    distributed.start()
    for file in sys.argv[2:]:
        with open(file, "a", encoding="utf-8") as log:
            log.write(f"{distributed.rank()} world {distributed.size()}\n")
        log_replies(file)
    if sys.argv[1] != "hello":
        compute(open_small(sys.argv[1]))
    distributed.stop()
