"""Parquet files of the benchmarks: found, checked, joined, and written from data sets that lie here in another format."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, ResourceError
from ..images import load_image
from ..published_parquet import arrow

if TYPE_CHECKING:
    from ..datasets import CaptionDataset

CHECKED_ROWS = 16


def check_parquet(files: Sequence[Path], columns: Sequence[tuple[str, str]], what: str) -> int:
    """Check schema and first rows; returns the number of rows.

    columns: (name, kind), kind text, texts, whole, image or any (see `benchmarks.Benchmark`).

    Raises:
        InputError: not parquet, a column missing or of another type, no rows, a first row without an answer or with a
            picture that cannot be read; the file (and row) is named.
    """
    pa, pq = arrow()

    rows = 0
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                schema, count = parquet.schema_arrow, parquet.metadata.num_rows
                for name, kind in columns:
                    if name not in schema.names:
                        raise InputError(
                            f"{file.name} has no column {name!r}, which {what} needs, but {', '.join(schema.names)}"
                        )
                    if not _fits(schema.field(name).type, kind, pa):
                        raise InputError(
                            f"{file.name}: column {name!r} holds {schema.field(name).type}, not {_KINDS[kind]}"
                        )
                wanted = [name for name, _ in columns]
                batch = next(parquet.iter_batches(batch_size=CHECKED_ROWS, columns=wanted), None)
                for place, row in enumerate(batch.to_pylist() if batch is not None else []):
                    _check_row(file, place, row, columns)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file.name} is not a sound parquet file: {error}") from error
        rows += count
    if not rows:
        raise InputError(f"{what}: the parquet files hold no rows")
    return rows


_KINDS = {
    "text": "text",
    "texts": "lists of text",
    "whole": "whole numbers",
    "image": "pictures ({bytes, path})",
    "any": "",
}


def _fits(kind_here: Any, kind: str, pa: Any) -> bool:
    types = pa.types
    text = types.is_string(kind_here) or types.is_large_string(kind_here) or types.is_null(kind_here)
    if kind == "text":
        return text
    if kind == "texts":
        listed = types.is_list(kind_here) or types.is_large_list(kind_here)
        return listed and (types.is_string(kind_here.value_type) or types.is_large_string(kind_here.value_type))
    if kind == "whole":
        return types.is_integer(kind_here)
    if kind == "image":
        return types.is_struct(kind_here) and kind_here.get_field_index("bytes") >= 0
    return True


def _check_row(file: Path, place: int, row: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> None:
    for name, kind in columns:
        value = row[name]
        if kind == "texts" and (not value or not any(text and text.strip() for text in value)):
            raise InputError(f"{file.name}, row {place}: {name!r} is empty")
        if kind == "image":
            if not value or not value.get("bytes"):
                raise InputError(f"{file.name}, row {place}: the picture's bytes are not in the file")
            try:
                load_image(value["bytes"])
            except InputError as error:
                raise InputError(f"{file.name}, row {place}: {error}") from error


def join_images(dataset: Any, files: Sequence[str]) -> Any:
    """GQA's questions with their pictures, which its data set keeps apart: a column `image` by `imageId`.

    dataset: questions, a `datasets.Dataset`. files: parquet files of (id, image). InputError for a picture that is not there.
    """
    import datasets
    import pyarrow.parquet as pq

    known: dict[str, bytes] = {}
    for file in files:
        for row in pq.read_table(file, columns=["id", "image"]).to_pylist():
            known[str(row["id"])] = row["image"]["bytes"]
    missing = sorted({str(key) for key in dataset["imageId"]} - set(known))
    if missing:
        raise InputError(f"gqa: {len(missing)} pictures are not in the picture files, e.g. {missing[0]}")
    features = datasets.Features({**dataset.features, "image": datasets.Image()})
    return dataset.map(
        lambda doc: {"image": {"bytes": known[str(doc["imageId"])], "path": None}},
        features=features,
        desc="GQA pictures",
    )


# ------------------------------------------------------------------------------------------------------------ writing

CAPTION_ROWS = {  # task -> how an item's id and captions are called there
    "coco2017_cap_val": lambda item, i: {"question_id": f"{_digits(item)}.jpg", "id": i, "answer": item.references},
    "flickr30k_test": lambda item, i: {"img_id": str(i), "caption": item.references},
    "nocaps_val": lambda item, i: {"image_id": int(_digits(item)), "annotations_captions": item.references},
}


def _digits(item: Any) -> str:
    digits = "".join(c for c in str(item.id) if c.isdigit())
    if not digits:
        raise InputError(f"item {item.id!r}: the benchmark wants a number for an id")
    return digits


def write_captions(dataset: CaptionDataset, task: str, file: str | Path, rows_a_group: int = 256) -> Path:
    """A data set of captions as the parquet file that lmms-eval's task reads offline; pictures go in as their own bytes.

    dataset: from `open_dataset`, e.g. of coco:, flickr30k: or nocaps:. task: coco2017_cap_val, flickr30k_test or nocaps_val.
    Written in row groups, so that memory holds `rows_a_group` pictures at most.

    Raises:
        InputError: another task, a broken picture. ResourceError: the file cannot be written.
    """
    pa, pq = arrow()

    if task not in CAPTION_ROWS:
        raise InputError(f"{task!r} is none of the caption tasks: {', '.join(CAPTION_ROWS)}")
    make, target = CAPTION_ROWS[task], Path(file).expanduser()
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    writer = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(dataset), rows_a_group):
            rows = []
            for i in range(start, min(start + rows_a_group, len(dataset))):
                item = dataset[i]
                rows.append({"image": {"bytes": picture_bytes(item), "path": None}, **make(item, i)})
            table = pa.Table.from_pylist(rows, schema=_schema(rows[0], pa))
            writer = writer or pq.ParquetWriter(part, table.schema)
            writer.write_table(table)
        if writer is None:
            raise InputError(f"{dataset.spec}: there is nothing to write")
        writer.close()
        os.replace(part, target)
    except OSError as error:
        raise ResourceError(f"{target} could not be written: {error}") from error
    finally:
        if writer is not None:
            writer.close()
        part.unlink(missing_ok=True)
    return target


def picture_bytes(item: Any) -> bytes:
    """The file of an item's picture as it lies on the disk if it is a JPEG, its pixels as PNG otherwise.

    Other formats may have transparency or deep greys, which lmms-eval would read in another way.
    """
    picture = item.image  # refuses a broken one here
    if item.file is not None:
        content = item.file.read_bytes()
        if content[:2] == b"\xff\xd8":
            return content
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _schema(row: Mapping[str, Any], pa: Any) -> Any:
    """Arrow types, and the note by which the library `datasets` knows a picture from a pair of columns."""
    fields: list[Any] = []
    features: dict[str, Any] = {}
    for name, value in row.items():
        if name == "image":
            fields.append(pa.field(name, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
            features[name] = {"_type": "Image"}
        elif isinstance(value, list):
            fields.append(pa.field(name, pa.list_(pa.string())))
            features[name] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
        else:
            kind, told = (pa.int64(), "int64") if isinstance(value, int) else (pa.string(), "string")
            fields.append(pa.field(name, kind))
            features[name] = {"dtype": told, "_type": "Value"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
