"""One record in one file: how it is written in one step, checked when read, and named after what made it.

A record file is gzipped JSON with the fields format, name, config, inputs, provenance, payload and sha256 (of the
payload, and of the whole). Equal content gives equal bytes; two records of one result differ in provenance only.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, RecordError, ResourceError

FORMAT = 1
MOST_BYTES = 2**30  # of a record's JSON: a file of a few MB can hold zeros for all of the memory
TEMPORARY = ".writing-"  # prefix of files that are not records yet
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"  # no name, no time: equal content gives equal files
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SETTINGS = ("config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")
_KEPT = "all records and batches written before are kept"
_file_hashes: dict[tuple[str, int, int], str] = {}


def read_record(path: str | Path) -> dict[str, Any]:
    """Reads and checks one record file.

    Raises RecordError when a byte of it was altered, it was cut off, or its name is not its key; ResourceError when it
    cannot be opened.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResourceError(f"cannot read the record {path}: {error}") from error
    try:
        if content[: len(_GZIP_HEADER)] != _GZIP_HEADER:
            raise ValueError("its header is not one this library writes")
        stream = zlib.decompressobj(wbits=31)
        text = stream.decompress(content, MOST_BYTES)
        if stream.unconsumed_tail:
            raise ValueError(f"it holds more than {MOST_BYTES // 2**20} MiB")
        if not stream.eof or stream.unused_data:
            raise ValueError("it is cut off or has something appended")
        record = json.loads(text)
        checksum = record.pop("sha256")
        if checksum != (_checksums_of(text, record, checksum) or checksums(record)):
            raise ValueError("its checksum does not fit its content")
        key = record_key(record["name"], record["config"], record["inputs"])
        if path.parent.name != f"{key}.parts" and path.name != f"{key}.json.gz":
            raise ValueError(f"its content belongs to {key}.json.gz")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise RecordError(
            f"the record {path} was altered or damaged ({error}): restore it (`git checkout -- {path.name}` in its "
            "folder, if it is a committed one) or delete it, and it will be computed anew"
        ) from error
    record["sha256"] = checksum
    return record


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes a record in one step: readers see the old file or the new one, never a part of it.

    Raises ResourceError for a full disk or a folder that cannot be written; what was there before stays as it was.
    """
    path = Path(path)
    content = {key: value for key, value in record.items() if key != "sha256"}
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
        stream.write(canonical({**content, "sha256": checksums(content)}))
    try:
        try:
            _replace(path, buffer.getvalue())
        except FileNotFoundError:  # another process, done with the same record, has just removed the folder
            _replace(path, buffer.getvalue())
    except OSError as error:
        raise cannot_write(path.parent, error) from error


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private, records are to be shared
        os.replace(temporary, path)
    except BaseException:  # an interrupt, too, must not leave litter
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_litter(folder: Path, pattern: str) -> None:
    """Removes files that a process killed while writing has left: those of an hour or more, for younger ones may be in use."""
    for left in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process has just put it in its place, or removed it
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def cannot_write(folder: Path, error: OSError) -> ResourceError:
    """The error to raise for a write that failed, with its cause."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"the disk is full: no room for a record in {folder}; make room and run again: {_KEPT}")
    return ResourceError(f"cannot write a record in {folder} ({error.strerror or error}): {_KEPT}")


def checksums(record: Mapping[str, Any]) -> dict[str, str]:
    """Of the payload, and of the whole record without its checksums."""
    return {"payload": sha256(canonical(record["payload"])), "record": sha256(canonical(record))}


def _checksums_of(text: bytes, record: Mapping[str, Any], checksum: Any) -> dict[str, str] | None:
    """`checksums` from the file's own text, where that is the canonical one, or None: most of reading was to write it again."""
    head = canonical({name: value for name, value in record.items() if name < "payload"})[:-1] + b',"payload":'
    last = b',"sha256":' + canonical(checksum) + b"}"
    tail = b"," + canonical({name: value for name, value in record.items() if name > "payload"})[1:-1] + last
    if not (text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail)):
        return None
    return {"payload": sha256(text[len(head) : -len(tail)]), "record": sha256(text[: -len(last)] + b"}")}


# ------------------------------------------------------------------------------------------------------------ keys


def record_key(name: str, config: Any, inputs: Sequence[Mapping[str, str]] = ()) -> str:
    """16 hex digits from the name, the configuration and the inputs' contents (`hash_inputs`), not their file names."""
    if not re.fullmatch(r"[a-z0-9_-]+(/[a-z0-9_-]+)*", name):
        raise InputError(f"{name!r} is not a record name: small letters, digits, '_', '-', and '/' between parts")
    content = {"format": FORMAT, "name": name, "config": config, "inputs": [entry["sha256"] for entry in inputs]}
    return sha256(canonical(content))[:16]


def hash_inputs(inputs: Sequence[str | Path]) -> list[dict[str, str]]:
    """[{"name": base name, "sha256": of the content}] per file or folder. Raises ResourceError for a missing one.

    A folder is a checkpoint: its weight files count, and the settings that change what they compute.
    """
    if isinstance(inputs, (str, Path)):
        raise InputError("inputs must be a list of paths")
    return [{"name": Path(path).name, "sha256": _hash_input(Path(path))} for path in inputs]


def _hash_input(path: Path) -> str:
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise ResourceError(f"the input {path} does not exist")
    files = sorted(f for f in path.iterdir() if f.is_file() and (f.suffix in _WEIGHTS or f.name in _SETTINGS))
    if not any(f.suffix in _WEIGHTS for f in files):
        raise ResourceError(f"the input folder {path} holds no weights ({', '.join('*' + s for s in _WEIGHTS)})")
    return sha256(canonical([[f.name, hash_file(f)] for f in files]))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, once for as long as its size and time stay. Raises ResourceError."""
    try:
        state = path.stat()
        known = (str(path.resolve()), state.st_mtime_ns, state.st_size)
        if known not in _file_hashes:
            with open(path, "rb") as file:
                _file_hashes[known] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ResourceError(f"cannot read the input {path}: {error}") from error
    return _file_hashes[known]


def sha256(content: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no space, ASCII (a lone surrogate, too, can then be written)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def to_plain(value: Any, where: str = "value", allow_paths: bool = False) -> Any:
    """Plain JSON values from numbers, strings, lists, dicts, NumPy arrays and tensors; InputError for anything else.

    NaN and infinity are refused (JSON has none: store None), so are dict keys that are not strings (they would come
    back as strings), and, unless `allow_paths`, strings that name a place on one machine.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        if not allow_paths and re.match(r"(\w+:)?(/|~/|[A-Za-z]:\\)", value):
            raise InputError(f"{where} holds the path {value!r}: pass files as inputs, whose content enters the key")
        return value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise InputError(f"{where} holds {value}, which JSON cannot: store None instead")
        return float(value)
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise InputError(f"{where} has the key {wrong[0]!r}: keys must be strings")
        return {key: to_plain(entry, f"{where}[{key!r}]", allow_paths) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(entry, f"{where}[{i}]", allow_paths) for i, entry in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return to_plain(value.tolist(), where, allow_paths)
    raise InputError(f"{where} holds a {type(value).__name__}, which is not JSON")
