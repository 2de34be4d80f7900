"""Pictures and captions in parquet files, as the hub's data sets have them; read where they lie, without another library's cache.

    open_dataset("parquet:/data/coco2017_cap_val#val")       # a folder (and split), or one file

A column `image` of {bytes, path}; captions, lists of text, in `answer`, `caption`, `captions`, `annotations_captions` or
`sentences`; ids in `question_id`, `image_id`, `img_id`, `id` or `filename`, else the row's number; `domain` if there is one.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, ResourceError
from .images import load_image
from .published import refuse_doubles, sound_text, split_part

CAPTIONS = ("answer", "caption", "captions", "annotations_captions", "sentences")
IDS = ("question_id", "image_id", "img_id", "id", "filename")
DOMAINS = ("domain", "annotations_domain")
MAX_PICTURE = 2**28  # bytes of one picture's file; more is no photograph
ROW_GROUPS_HELD = 2
_SPLITS = ("train", "val", "test", "dev", "challenge", "submission")


def find_parquet(folder: Path, split: str = "") -> list[Path]:
    """The parquet files of a split below `folder`: those whose name or folder begins with the split's, or all of a lone split.

    split: "" takes all. Raises ResourceError where there are none.
    """
    files = sorted(p for p in folder.rglob("*.parquet") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise ResourceError(f"{folder.name}/ holds no .parquet files")
    if not split:
        return files
    named = [p for p in files if _begins(p.relative_to(folder).parts, (split,))]
    others = [p for p in files if _begins(p.relative_to(folder).parts, _SPLITS)]
    if not named and others:
        raise ResourceError(f"{folder.name}/ holds no files of split {split}: {others[0].name} is of another")
    return named or files


def _begins(parts: Sequence[str], splits: Sequence[str]) -> bool:
    return any(part.startswith(split) for part in parts for split in splits)


@dataclass(frozen=True)
class _Row:
    """One picture: where its bytes lie (file, row group, row in it), its captions and what else is known."""

    key: str
    file: Path
    group: int
    row: int
    captions: tuple[str, ...]
    notes: dict[str, Any]


def open_parquet(spec: str, place: str, n: int | None, seed: int) -> Any:
    """A `CaptionDataset` from parquet files; see `datasets.open_dataset` for n and seed.

    Raises:
        ResourceError: pyarrow, the folder or its files are missing. InputError: not parquet, no column of pictures or captions,
            an empty caption, an id twice; file and row are named.
    """
    from .datasets import COCO_PROMPT, CaptionDataset, Item

    place, split = split_part(place)
    root = Path(place).expanduser()
    if not place or not root.exists():
        raise ResourceError(f"{spec!r}: there is nothing at {place or '(no place named)'}")
    files = [root] if root.is_file() else find_parquet(root, split)
    rows = [row for file in files for row in _read_texts(file)]
    if not rows:
        raise InputError(f"{spec!r}: the parquet files hold no rows")
    refuse_doubles(root, "id", (row.key for row in rows))
    if n is not None and n > len(rows):
        raise InputError(f"{spec!r} has {len(rows)} pictures with captions, {n} were asked for")
    if seed:
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    texts = hashlib.sha256(json.dumps([[r.key, r.captions] for r in rows]).encode()).hexdigest()[:16]
    rows = rows[:n]

    def make(index: int) -> Item:
        row = rows[index]
        return Item(
            id=row.key, prompt=COCO_PROMPT, references=list(row.captions), meta=dict(row.notes),
            _picture=_reader(row),
        )  # fmt: skip

    return CaptionDataset(spec, f"parquet:{split}" if split else "parquet", len(rows), seed, make, texts)


def _reader(row: _Row) -> Callable[[], Any]:
    def read() -> Any:
        content = _pictures(row.file, row.group)[row.row]
        content = content.get("bytes") if isinstance(content, dict) else content
        where = f"{row.file.name}, picture {row.key}"
        if not isinstance(content, bytes) or not content:
            raise InputError(f"{where}: the picture's bytes are not in the file")
        if len(content) > MAX_PICTURE:
            raise InputError(f"{where}: {len(content)} bytes are too many for a picture")
        try:
            return load_image(content)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    return read


def arrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. ResourceError, with the cure, where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ResourceError("parquet files need pyarrow: pip install pyarrow (the extra [lmms] brings it)") from error
    return pyarrow, pyarrow.parquet


def _read_texts(file: Path) -> list[_Row]:
    pa, pq = arrow()
    rows: list[_Row] = []
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            caption = next((name for name in CAPTIONS if name in names), None)
            if "image" not in names or caption is None:
                raise InputError(
                    f"{file.name} has no column 'image' or none of {', '.join(CAPTIONS)}; it has {', '.join(names)}"
                )
            key = next((name for name in IDS if name in names), None)
            domain = next((name for name in DOMAINS if name in names), None)
            wanted = [name for name in (caption, key, domain) if name is not None]
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=wanted).to_pylist()
                for place, row in enumerate(table):
                    where = f"row {len(rows)}"
                    found = row[caption]
                    if isinstance(found, str):
                        found = [found]
                    if not isinstance(found, list) or not found:
                        raise InputError(f"{file.name}: {where} has no captions")
                    told = tuple(sound_text(file, where, text) for text in found)
                    name = str(row[key]) if key and row[key] is not None else f"{file.stem}-{len(rows)}"
                    notes = {"domain": row[domain]} if domain and isinstance(row[domain], str) else {}
                    rows.append(_Row(name, file, group, place, told, notes))
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{file.name} is not a sound parquet file: {error}") from error
    return rows


@functools.lru_cache(maxsize=ROW_GROUPS_HELD)
def _pictures(file: Path, group: int) -> list[Any]:
    pa, pq = arrow()
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(group, columns=["image"])["image"].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.name} is not a sound parquet file: {error}") from error
