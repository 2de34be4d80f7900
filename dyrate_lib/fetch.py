"""Bring the scenes checkpoints to where an installed wheel finds them: from a checkout, a folder or an archive on disk.

Nothing is downloaded. What is copied is checked first, so that a broken source changes nothing.
"""

from __future__ import annotations

import json
import logging
import lzma
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from . import paths
from .archives import unpack
from .checksums import SUMS, check_sums
from .errors import DyRateError, InputError, ResourceError
from .loading import SCENES

log = logging.getLogger(__name__)

LARGEST, MOST = 8 << 30, 100_000  # bytes and files that an archive may unpack to: a checkout with both models is below 1 GB
# what the standard library raises for damaged archives; RuntimeError: a zip that is encrypted or of an unknown kind
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError,
    OverflowError, LookupError, TypeError, AttributeError,
)  # fmt: skip
_KEPT = (".json", ".jsonl", ".safetensors", ".md", ".gz")  # a checkpoint is these; anything else stays behind


def fetch(source: str | Path) -> list[Path]:
    """Copy every scenes checkpoint found in `source` into `paths.checkpoints()`; returns their folders there.

    source: a checkout, its data/checkpoints, one checkpoint's folder, or a .zip, .tar, .tar.gz, .tar.xz of any of these. A
    checkpoint that is there already is replaced as a whole.

    Raises:
        InputError: no such file or folder, no archive, one that would unpack to more than LARGEST bytes or MOST files, no
            checkpoint in it, or one that is incomplete or damaged.
        ResourceError: the target cannot be written.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        return _install(_found(source))
    if not source.is_file():
        raise InputError(f"there is no {source}: name a checkout, a folder with {' or '.join(SCENES)}, or an archive of one")
    with tempfile.TemporaryDirectory(prefix="dyrate-fetch-") as scratch:
        _unpack(source, Path(scratch))
        return _install(_found(Path(scratch)))


def _unpack(archive: Path, scratch: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                _check_size(archive, (member.file_size for member in opened.infolist()))
                opened.extractall(scratch)  # zipfile itself keeps member names inside the folder
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as opened_tar:
                _check_size(archive, (member.size for member in opened_tar))
                unpack(opened_tar, scratch)
        else:
            raise InputError(f"{archive} is no .zip or .tar archive: name a checkout, a folder of checkpoints, or an archive")
    except DyRateError:
        raise
    except _BROKEN as error:
        raise InputError(f"{archive} cannot be unpacked ({error}): get it again") from error
    except OSError as error:
        raise ResourceError(f"{archive} cannot be unpacked: {error.strerror or error}") from error


def _check_size(archive: Path, sizes: Iterable[int]) -> None:
    """InputError for what would fill the disk, told from what the archive says of its members before any is written."""
    total = 0
    for number, size in enumerate(sizes, 1):
        total += max(size, 0)
        if total > LARGEST or number > MOST:
            raise InputError(f"{archive} would unpack to more than {LARGEST >> 30} GB or {MOST} files: no archive of checkpoints")


def _found(folder: Path) -> list[Path]:
    places = [folder / name for name in SCENES] + ([folder] if folder.resolve().name in SCENES else [])
    places += [place for name in SCENES for place in sorted(folder.glob(f"**/checkpoints/{name}"))]
    places += [place for name in SCENES for place in sorted(folder.glob(f"*/{name}"))]
    by_name = {place.resolve().name: place for place in reversed(places) if (place / "config.json").is_file()}
    if not by_name:
        raise InputError(f"no {' or '.join(SCENES)} with a config.json in {folder}: name a checkout of the project")
    for place in by_name.values():
        _check(place)
    return [by_name[name] for name in SCENES if name in by_name]


def _check(folder: Path) -> None:
    """Every weight file opens, the index names no other, and checksums fit where there are any. InputError otherwise."""
    from safetensors import SafetensorError, safe_open

    try:
        index = folder / "model.safetensors.index.json"
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
        files = sorted(named) or [file.name for file in folder.glob("*.safetensors")]
        if not files:
            raise InputError(f"{folder} holds no weights (*.safetensors): it is incomplete")
        for name in files:
            with safe_open(folder / name, framework="numpy") as file:
                file.keys()
        check_sums(folder)
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint {folder} is incomplete or damaged ({error}): get it again") from error


def _install(folders: list[Path]) -> list[Path]:
    target = paths.checkpoints()
    installed = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            place = target / folder.resolve().name
            if place.resolve() == folder.resolve():
                raise InputError(f"{folder} is already where it is looked for")
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target) as scratch:
                new = Path(scratch) / "new"
                new.mkdir()
                for file in sorted(folder.iterdir()):
                    if file.is_file() and (file.suffix in _KEPT or file.name == SUMS):
                        shutil.copyfile(file, new / file.name)
                if place.exists():
                    os.replace(place, Path(scratch) / "old")
                os.replace(new, place)
            log.info("%s from %s", place, folder)
            installed.append(place)
    except OSError as error:
        raise ResourceError(f"cannot write into {target}: {error.strerror or error}") from error
    return installed
