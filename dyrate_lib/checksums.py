"""Checksums of tensors, and of a checkpoint's files: a `SHA256SUMS` beside them, in the form that `sha256sum -c` reads.

Transformers notices a weight file that was cut off, not one whose bytes changed. A folder without the file is not checked:
the hub's have none.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError, ResourceError
from .records import hash_file

SUMS = "SHA256SUMS"
_LEFT_OUT = ("metrics.json",)  # scores are written beside the weights later on and change nothing


def write_sums(folder: str | Path) -> Path:
    """Write the checksums of all weights and settings (*.safetensors, *.json) of a folder; returns the file."""
    folder = Path(folder)
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".json") and f.name not in _LEFT_OUT)
    part = folder / f".{SUMS}.part"
    part.write_text("".join(f"{hash_file(file)}  {file.name}\n" for file in files), encoding="utf-8")
    os.replace(part, folder / SUMS)
    return folder / SUMS


def check_sums(folder: str | Path) -> bool:
    """Whether the folder has checksums, which then all fit.

    Raises:
        InputError: a file that is missing, cut off or altered, named; checksums that cannot be read.
    """
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        return False
    cure = "restore it (`git checkout`, or fetch it again)"
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / SUMS} cannot be read ({error}): {cure}") from error
    if not lines:
        raise InputError(f"{folder / SUMS} is empty: {cure}")
    for line in lines:
        found = re.fullmatch(r"([0-9a-f]{64})  ([^/\\]+)", line)
        if found is None:
            raise InputError(f"{folder / SUMS} holds the line {line[:80]!r}, which is no checksum: {cure}")
        digest, name = found.groups()
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing: {cure}")
        try:
            sound = hash_file(folder / name) == digest
        except ResourceError as error:
            raise InputError(f"{folder / name} cannot be read: {error}") from error
        if not sound:
            raise InputError(f"{folder / name} was altered or damaged, its checksum does not fit: {cure}")
    return True


def tensors_digest(head: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex of a text and of CPU tensors: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(head.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\0{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return digest.hexdigest()
