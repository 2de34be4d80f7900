"""The batches of a record that is being made: by this process, by others beside it, or by one that was stopped.

Each batch is a record file of its own in a folder beside the record; who wants to make one claims it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .claims import claimed
from .errors import RecordError, ResourceError
from .records import read_record, record_key


class Parts:
    """The batches of a record that is being made, by this process, by others, or by one that was stopped."""

    def __init__(self, folder: Path, key: str, n_items: int) -> None:
        self.folder, self.key, self.n_items = folder, key, n_items
        self.results: dict[int, Any] = {}
        self.made_by: list[dict] = []
        self.last: dict[str, Any] = {}
        self._seen: set[str] = set()
        self.read()

    def read(self) -> None:
        """Takes in the files that have come since the last call, in their order."""
        try:
            files = sorted(self.folder.glob("*.json.gz"))
        except FileNotFoundError:  # another process has removed the folder while it was read
            files = []
        for path in files:
            if path.name in self._seen:
                continue
            try:
                part = read_record(path)
            except ResourceError:
                continue  # another process has finished this very record and removed its parts
            try:
                results = dict(zip(part["payload"]["index"], part["payload"]["results"], strict=True))
                fitting = bool(results) and all(type(i) is int and 0 <= i < self.n_items for i in results)
                made_by = {"device": part["provenance"]["device"], "seconds": float(part["provenance"]["seconds"])}
            except (KeyError, TypeError, ValueError):
                fitting = False
            if not fitting or record_key(part["name"], part["config"], part["inputs"]) != self.key:
                raise RecordError(f"{path} belongs to another record: delete it")
            self.results.update(results)
            self.made_by.append({**part["provenance"], **made_by})
            self._seen.add(path.name)
            self.last = part


def work_through(
    name: str, made: Parts, batch_size: int, save: Callable[[list[int]], None], finished: Callable[[], bool], progress: bool
) -> None:
    """Makes every batch that nobody makes; then waits for those that others make, and makes what they left."""
    from tqdm import tqdm

    starts = list(range(0, made.n_items, batch_size))
    with tqdm(total=made.n_items, initial=len(made.results), desc=name, unit="item", disable=not progress) as bar:
        while starts:
            for wait in (False, True):
                left = []
                for start in starts:
                    batch = range(start, min(start + batch_size, made.n_items))
                    if all(i in made.results for i in batch):
                        continue
                    with contextlib.suppress(OSError):  # writing will tell what is wrong
                        made.folder.mkdir(parents=True, exist_ok=True)
                    with claimed(made.folder / f".{start:08d}.lock", f"{name}/{made.key}, item {start}", wait) as mine:
                        if finished():
                            return
                        made.read()
                        todo = [i for i in batch if i not in made.results]
                        if not mine:
                            left.append(start)
                        elif todo:
                            save(todo)
                            made.read()
                    bar.update(len(made.results) - bar.n)
                starts = left


def joined(made_by: list[dict]) -> dict[str, Any]:
    """One provenance for all batches: seconds add up, machines are all named, the rest is the last batch's."""
    devices = list(dict.fromkeys(entry["device"] for entry in made_by))
    last = made_by[-1]
    return {**last, "device": " + ".join(devices), "seconds": round(sum(entry["seconds"] for entry in made_by), 3)}
