"""Raw results on disk, found again by what made them.

A record is one gzipped JSON file, `<root>/<name>/<key>.json.gz`. Its key is a hash of the name, the configuration and
the content of the input files; machine, paths and date take no part in it, so that a record made on one machine is
found on another. Every write is atomic, every read is checked, and lists of items are saved batch by batch, so that a
kill loses one batch at most.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import paths
from .errors import InputError, RecordError, ResourceError
from .provenance import provenance
from .records import (
    FORMAT,
    TEMPORARY,
    cannot_write,
    canonical,
    hash_inputs,
    read_record,
    record_key,
    sha256,
    to_plain,
    write_record,
)

# finished results by the file they belong into, kept until they are written: a second try must not compute them anew
_unsaved: dict[Path, dict] = {}


class Store:
    """One folder that is written to and read, and optional folders that are only read, asked first and in order.

    Args:
        root: where new records go (made when the first is written).
        read: folders of finished records, never written to.
        frozen: refuse to compute: a record that is not there is a ResourceError.
    """

    def __init__(self, root: str | Path, read: Iterable[str | Path] = (), frozen: bool = False) -> None:
        self.root, self.read, self.frozen = Path(root), tuple(Path(folder) for folder in read), frozen
        if self.root.resolve() in {folder.resolve() for folder in self.read}:
            raise InputError(f"{self.root} cannot be both written to and only read")

    @classmethod
    def committed(cls, build: str | Path | None = None, frozen: bool = False) -> Store:
        """Reads the committed records of `data/results`; what is missing there is computed into `build`/records."""
        return cls(Path(build or paths.build()) / "records", (paths.results(),), frozen)

    @classmethod
    def fresh(cls, build: str | Path | None = None) -> Store:
        """Never reads a committed record: everything is computed into, or resumed from, `build`/records_fresh."""
        root = Path(build or paths.build()) / "records_fresh"
        if root.resolve().is_relative_to(paths.results().resolve()):
            raise InputError("a fresh store cannot lie inside the committed records")
        return cls(root)

    def path(self, name: str, key: str) -> Path:
        """Where a record of this key is written."""
        return self.root / name / f"{key}.json.gz"

    def find(self, name: str, key: str) -> Path | None:
        """The file of a finished record, or None."""
        for folder in (*self.read, self.root):
            candidate = folder / name / f"{key}.json.gz"
            if candidate.is_file():
                return candidate
        return None

    def records(self, name: str) -> list[dict]:
        """All finished records of a name, each checked, in the order of their keys. Raises RecordError."""
        found: dict[str, Path] = {}
        for folder in (self.root, *reversed(self.read)):
            found.update({path.name: path for path in (folder / name).glob("*.json.gz")})
        return [read_record(found[file]) for file in sorted(found)]

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r}, read={[str(folder) for folder in self.read]}, frozen={self.frozen})"


def get_or_run(
    name: str,
    config: Mapping[str, Any],
    fn: Callable[[], Any],
    *,
    store: Store | str | Path,
    inputs: Sequence[str | Path] = (),
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The stored record of this configuration, or the result of `fn()`, stored.

    Args:
        name: kind of result; folders are allowed ("03_benchmarks/captions"): small letters, digits, `_`, `-`, `/`.
        config: what determines the result, as JSON values. No paths: files belong into `inputs`.
        fn: computes the payload: JSON values, NumPy arrays and tensors (stored as lists).
        store: a Store, or a folder that serves as one.
        inputs: files and checkpoint folders that determine the result; their content enters the key.
        about: additions to the provenance, e.g. {"dtype": "bfloat16"}.

    Returns:
        dict with config, inputs, provenance, payload (as read back from JSON: the same the first time as ever after).

    Raises:
        InputError: a configuration or payload that is not JSON, a bad name.
        ResourceError: an input that is missing, a frozen store without the record, a folder that cannot be written, a
            full disk. A result that could not be written is kept: calling again in the same process only writes it.
        RecordError: the stored record was altered.
    """
    store = store if isinstance(store, Store) else Store(store)
    config, hashes = to_plain(config, "config"), hash_inputs(inputs)
    key = record_key(name, config, hashes)
    found = store.find(name, key)
    if found:
        return read_record(found)
    path = store.path(name, key)
    if path not in _unsaved:
        _prepare(store, name, key)
        start = time.perf_counter()
        payload = to_plain(fn(), "payload", allow_paths=True)
        made_by = provenance(time.perf_counter() - start, about)
        _unsaved[path] = _record(name, config, hashes, made_by, payload)
    return _finish(path)


def run_items(
    name: str,
    config: Mapping[str, Any],
    items: Sequence[Any],
    fn: Callable[[list[Any]], Sequence[Any]],
    *,
    store: Store | str | Path,
    batch_size: int = 16,
    inputs: Sequence[str | Path] = (),
    ids: Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """As `get_or_run`, for one result per item, saved batch by batch: after a kill the next call goes on from there.

    Args:
        items: what to work on; their `id` attributes, or `ids`, enter the key.
        fn: list of at most `batch_size` items -> as many results, in order.
        batch_size: takes no part in the key; a run may be resumed with another one.
        progress: shows a bar over the items.

    Returns:
        The record; its payload is {"ids": [..], "results": [..]}, in the order of the items.

    Raises:
        As `get_or_run`; InputError also for items without an id, doubled ids, or a wrong number of results.
    """
    store = store if isinstance(store, Store) else Store(store)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    names = _item_ids(items, ids)
    config = to_plain(config, "config")
    hashes = [*hash_inputs(inputs), {"name": "items", "sha256": sha256(canonical(names))}]
    key = record_key(name, config, hashes)
    found = store.find(name, key)
    if found:
        return read_record(found)
    path, parts = store.path(name, key), store.root / name / f"{key}.parts"
    if path not in _unsaved:
        _prepare(store, name, key)
        results, made_by = _load_parts(parts, key, len(names))
        todo = [i for i in range(len(names)) if i not in results]
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        for batch in _bar(batches, name, len(names), len(results), progress):
            start = time.perf_counter()
            batch_results = to_plain(list(fn([items[i] for i in batch])), "results", allow_paths=True)
            if len(batch_results) != len(batch):
                raise InputError(f"{name}: the function gave {len(batch_results)} results for {len(batch)} items")
            made_by.append(provenance(time.perf_counter() - start, about))
            part = {"index": batch, "results": batch_results}
            record = _record(name, config, hashes, made_by[-1], part)
            write_record(parts / f"{batch[0]:08d}-{batch[-1]:08d}-{len(batch)}.json.gz", record)
            results.update(zip(batch, batch_results, strict=True))
        payload = {"ids": names, "results": [results[i] for i in range(len(names))]}
        _unsaved[path] = _record(name, config, hashes, _joined(made_by), payload)
    record = _finish(path)
    shutil.rmtree(parts, ignore_errors=True)
    return record


def _prepare(store: Store, name: str, key: str) -> None:
    """Refuses before the work what would fail after it."""
    if store.frozen:
        folders = ", ".join(str(folder) for folder in (*store.read, store.root))
        raise ResourceError(
            f"no record {name}/{key} in {folders}, and this store only reads: run with records=fresh to compute it"
        )
    folder = store.root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{TEMPORARY}*"):  # of a process that was killed while writing, unless it is recent
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise cannot_write(folder, error) from error


def _finish(path: Path) -> dict[str, Any]:
    write_record(path, _unsaved[path])
    del _unsaved[path]
    return read_record(path)


def _record(name: str, config: Any, hashes: list, made_by: dict, payload: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": name,
        "config": config,
        "inputs": hashes,
        "provenance": to_plain(made_by, "about", allow_paths=True),
        "payload": payload,
    }


# ----------------------------------------------------------------------------------------------------------- parts


def _item_ids(items: Sequence[Any], ids: Sequence[str] | None) -> list[str]:
    names: list[Any] = list(ids or ()) or [i if isinstance(i, str) else getattr(i, "id", None) for i in items]
    if len(names) != len(items) or not names:
        raise InputError(f"{len(names)} ids for {len(items)} items: there must be one each, and at least one")
    if not all(isinstance(name, str) for name in names):
        raise InputError("every item needs an id that is a string: give items with an `id`, or pass ids=")
    if len(set(names)) != len(names):
        raise InputError("item ids must differ from each other")
    return names


def _load_parts(folder: Path, key: str, n_items: int) -> tuple[dict[int, Any], list[dict]]:
    """Results by item index and the provenances, from the batches an interrupted run left behind."""
    results: dict[int, Any] = {}
    made_by = []
    for path in sorted(folder.glob("*.json.gz")) if folder.is_dir() else []:
        try:
            part = read_record(path)
        except ResourceError:
            continue  # another process has finished this very record and removed its parts
        index = part["payload"]["index"]
        if record_key(part["name"], part["config"], part["inputs"]) != key or not all(i < n_items for i in index):
            raise RecordError(f"{path} belongs to another record: delete it")
        results.update(zip(index, part["payload"]["results"], strict=True))
        made_by.append(part["provenance"])
    return results, made_by


def _joined(made_by: list[dict]) -> dict[str, Any]:
    """One provenance for all batches: seconds add up, machines are all named, the rest is the last batch's."""
    devices = list(dict.fromkeys(entry["device"] for entry in made_by))
    last = made_by[-1]
    return {**last, "device": " + ".join(devices), "seconds": round(sum(entry["seconds"] for entry in made_by), 3)}


def _bar(batches: list[list[int]], name: str, total: int, done: int, progress: bool) -> Iterable[list[int]]:
    from tqdm import tqdm

    with tqdm(total=total, initial=done, desc=name, unit="item", disable=not progress) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
