"""Cells shared out among processes that start together, so that each works on another one instead of waiting.

The store already lets processes share one record's batches; with as many processes as batches all of them would crowd on the same
cell, each rendering the same pictures. Here a process takes a group of cells (one model, one set: the pictures and what the
vision tower makes of them are made once), the next one another group. Who finds no free group helps in those of others, from
their end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import distributed
from ..claims import claimed
from .cells import Record, StudyCells

FOLDER = ".shared"  # in the store: claims on groups and jobs, nothing else


@dataclass(frozen=True)
class Job:
    """A part of the work: its name, unique in the store, and what makes (or finds) its records."""

    name: str
    run: Callable[[], list[Record]]


def work_off(study: StudyCells, groups: Sequence[Sequence[Job]]) -> list[Record]:
    """The records of all jobs, in order, whoever made them.

    Jobs may ask for records of earlier ones of their group: those found missing are made on the way. A claim only saves work
    (see `claims`), so jobs are sound without any. Put the longest groups first.
    """
    if not study.store.frozen and distributed.size() == 1:  # processes of one launch go through all of them together
        for group in groups:
            with _claim(study, "/".join(job.name for job in group)) as mine:
                for job in group if mine else ():
                    _alone(study, job)
        for group in groups:
            for job in reversed(group):
                _alone(study, job)
    return [record for group in groups for job in group for record in job.run()]


def _alone(study: StudyCells, job: Job) -> None:
    """Runs a job unless another process is at it."""
    with _claim(study, job.name) as mine:
        if mine:
            job.run()


def _claim(study: StudyCells, name: str) -> contextlib.AbstractContextManager[bool]:
    folder = study.store.root / FOLDER
    with contextlib.suppress(OSError):  # without the folder there are no claims, and the work is done all the same
        folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(name.encode()).hexdigest()[:24]
    return claimed(folder / f"{digest}.lock", name, wait=False)


def distinct(records: Sequence[Record]) -> list[Record]:
    """Each record once, in order: tables that share a cell, or take the first pictures of one, name it again."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(json.dumps([record["config"], record["inputs"]], sort_keys=True), record)
    return list(found.values())
