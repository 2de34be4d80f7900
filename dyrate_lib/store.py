"""Raw results on disk, found again by what made them.

A record is one gzipped JSON file, `<root>/<name>/<key>.json.gz`. Its key is a hash of the name, the configuration and
the content of the input files; machine, paths and date take no part in it, so that a record made on one machine is
found on another. Every write is atomic, every read is checked, and lists of items are saved batch by batch, so that a
kill loses one batch at most.

Any number of processes may work on one store at once, on one machine or on several that share the folder: what one has
claimed (`claims`) the others wait for, and the batches of a list of items are shared out among all that ask for it.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import distributed, paths
from .claims import claimed
from .errors import InputError, ResourceError
from .parts import Parts, joined, work_through
from .provenance import provenance
from .records import (
    FORMAT,
    TEMPORARY,
    cannot_write,
    canonical,
    hash_inputs,
    read_record,
    record_key,
    remove_litter,
    sha256,
    to_plain,
    write_record,
)

# finished results by the file they belong into, kept until they are written: a second try must not compute them anew
_unsaved: dict[Path, dict] = {}
_SEEN_WITHIN = 60.0  # seconds


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
    together: bool = False,
) -> dict[str, Any]:
    """The stored record of this configuration, or the result of `fn()`, stored.

    Args:
        name: kind of result; folders are allowed ("03_benchmarks/captions"): small letters, digits, `_`, `-`, `/`.
        config: what determines the result, as JSON values. No paths: files belong into `inputs`.
        fn: computes the payload: JSON values, NumPy arrays and tensors (stored as lists).
        store: a Store, or a folder that serves as one.
        inputs: files and checkpoint folders that determine the result; their content enters the key.
        about: additions to the provenance, e.g. {"dtype": "bfloat16"}.
        together: under `torchrun` all its processes call `fn` at once and share its work; the first one's result is kept.

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
    found, together = store.find(name, key), together and distributed.size() > 1
    if found and not together:  # together all look at once, so that none goes on alone
        return read_record(found)
    path = store.path(name, key)
    if not found and path not in _unsaved:
        _prepare(store, name, key)

    def make() -> None:
        if path not in _unsaved:
            start = time.perf_counter()
            payload = to_plain(fn(), "payload", allow_paths=True)
            made_by = provenance(time.perf_counter() - start, about)
            _unsaved[path] = _record(name, config, hashes, made_by, payload)

    if together:
        return _made_together(store, name, key, make)
    with _claim(path):
        found = store.find(name, key)  # by the process that held the claim before
        if found is None:
            make()
            return _finish(path)
    _unsaved.pop(path, None)
    return read_record(found)


def _made_together(store: Store, name: str, key: str, make: Callable[[], None]) -> dict[str, Any]:
    """As the rest of `get_or_run`, by all processes of a launch: the first claims, looks and writes, all work."""
    path, first = store.path(name, key), distributed.rank() == 0
    with _claim(path) if first else contextlib.nullcontext():
        if not distributed.agreed(first and store.find(name, key) is not None):
            make()
            if first:
                _finish(path)
            _unsaved.pop(path, None)
        distributed.barrier()
    deadline = time.monotonic() + _SEEN_WITHIN
    while (found := store.find(name, key)) is None and time.monotonic() < deadline:
        time.sleep(0.1)  # a network file system may show another machine's file late
    return read_record(found or path)


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

    Processes that ask for the same record at once share its batches: each item is worked on once, and all get the same
    record. A batch begins at a multiple of `batch_size`, whoever makes it, so that a reply does not hang on how many there are.

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

    def save(todo: list[int]) -> None:
        start = time.perf_counter()
        results = to_plain(list(fn([items[i] for i in todo])), "results", allow_paths=True)
        if len(results) != len(todo):
            raise InputError(f"{name}: the function gave {len(results)} results for {len(todo)} items")
        made_by = provenance(time.perf_counter() - start, about)
        record = _record(name, config, hashes, made_by, {"index": todo, "results": results})
        write_record(parts / f"{todo[0]:08d}-{todo[-1]:08d}-{len(todo)}.json.gz", record)

    while (record := _assembled(store, path, parts, key, names)) is None:
        made = Parts(parts, key, len(names))
        work_through(name, made, batch_size, save, lambda: store.find(name, key) is not None, progress)
    shutil.rmtree(parts, ignore_errors=True)
    return record


def _assembled(store: Store, path: Path, parts: Path, key: str, names: list[str]) -> dict[str, Any] | None:
    """The record made of all parts, or by another process; None while parts are missing."""
    name = path.parent.relative_to(store.root).as_posix()
    with _claim(path):
        found = store.find(name, key)
        if found is None:
            if path not in _unsaved:  # from the files alone: whoever puts them together gets the same record
                made = Parts(parts, key, len(names))
                if len(made.results) < len(names):
                    return None
                payload = {"ids": names, "results": [made.results[i] for i in range(len(names))]}
                about = {field: made.last[field] for field in ("name", "config", "inputs")}
                _unsaved[path] = _record(made_by=joined(made.made_by), payload=payload, **about)
            return _finish(path)
    _unsaved.pop(path, None)
    return read_record(found)


def _claim(path: Path) -> contextlib.AbstractContextManager[bool]:
    """The claim on a record that is to be written to `path`."""
    return claimed(path.with_name(f".{path.name}.lock"), f"{path.parent.name}/{path.name}")


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
        remove_litter(folder, f"{TEMPORARY}*")
        for claim in folder.glob(".*.lock"):  # of one that was killed between its record and the end of its claim
            if (folder / claim.name[1 : -len(".lock")]).is_file():
                claim.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise cannot_write(folder, error) from error


def _finish(path: Path) -> dict[str, Any]:
    write_record(path, _unsaved[path])
    del _unsaved[path]
    return read_record(path)


def _record(name: str, config: Any, inputs: list, made_by: dict, payload: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": name,
        "config": config,
        "inputs": inputs,
        "provenance": to_plain(made_by, "about", allow_paths=True),
        "payload": payload,
    }


def _item_ids(items: Sequence[Any], ids: Sequence[str] | None) -> list[str]:
    names: list[Any] = list(ids or ()) or [i if isinstance(i, str) else getattr(i, "id", None) for i in items]
    if len(names) != len(items) or not names:
        raise InputError(f"{len(names)} ids for {len(items)} items: there must be one each, and at least one")
    if not all(isinstance(name, str) for name in names):
        raise InputError("every item needs an id that is a string: give items with an `id`, or pass ids=")
    if len(set(names)) != len(names):
        raise InputError("item ids must differ from each other")
    return names
