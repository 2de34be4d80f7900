"""Text that a program writes into a document, between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InputError, ResourceError


def read(file: str | Path, name: str) -> str:
    """What stands between the marks of that name. Raises as `replace`."""
    return _parts(Path(file), name)[1].strip("\n")


def replace(file: str | Path, name: str, text: str) -> None:
    """Replace what stands between the marks of that name, whole or not at all.

    Raises:
        InputError: the file cannot be read or has not exactly one pair of these marks. ResourceError: it cannot be written.
    """
    file = Path(file)
    before, _, after = _parts(file, name)
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise ResourceError(f"cannot write {file}: {error.strerror or error}") from error


def _parts(file: Path, name: str) -> tuple[str, str, str]:
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{file.name} cannot be read: {error}") from error
    if [text.count(m) for m in (first, last)] != [1, 1] or text.index(first) > text.index(last):
        raise InputError(f"{file.name} must hold {first} and, after it, {last}, each once")
    start, end = text.index(first) + len(first), text.index(last)
    return text[:start], text[start:end], text[end:]
