"""Tar archives unpacked so that nothing lands outside the folder asked for."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

from .errors import InputError


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Extract an opened archive into `folder`: by Python's own "data" filter, where this Python has it (3.11 from 3.11.4 on).

    Elsewhere by hand, and stricter: plain files and folders alone.

    Raises:
        InputError or tarfile.TarError: a member that would lie outside, or is no plain file or folder.
    """
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    unpack_plain(archive, folder)


def unpack_plain(archive: tarfile.TarFile, folder: Path) -> None:
    """`unpack` by hand."""
    members = archive.getmembers()
    for member in members:
        name = PurePosixPath(member.name)
        inside = not name.is_absolute() and ".." not in name.parts and not set("\\:") & set(member.name)
        if not inside or not (member.isfile() or member.isdir()):
            raise InputError(f"the archive holds {member.name!r}, which is no plain file or folder inside it: it is not ours")
    for member in members:
        place = folder / member.name
        if member.isdir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        source = archive.extractfile(member)
        assert source is not None  # a plain file has contents
        with source, place.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
