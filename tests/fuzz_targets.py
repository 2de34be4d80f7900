"""Readers under fire: each target takes bytes, hands them to one reader, and lets only the library's own errors pass.

`tests/test_fuzz.py` calls them with Hypothesis; `python -m tests.fuzz_targets NAME -runs=10000 -seed=1` with atheris.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyrate_lib import RatePredictor, fetch
from dyrate_lib.checksums import SUMS, check_sums, tensors_digest
from dyrate_lib.datasets import open_dataset
from dyrate_lib.errors import DyRateError
from dyrate_lib.images import load_image
from dyrate_lib.lmms.results import paper_tables, read_results
from dyrate_lib.notebooks import Parameter, code_cells, notebook_parameters
from dyrate_lib.parts import Parts
from dyrate_lib.records import checksums, read_record, record_key
from dyrate_lib.scenes.training_state import load_state
from dyrate_lib.study import _State, read_scoreboard, write_scoreboard

LAYOUTS = {
    "coco": ("captions.json", "images"),
    "flickr30k": ("dataset_flickr30k.json", "images"),
    "nocaps": ("nocaps_val_4500_captions.json", "images"),
}
_folder = Path(tempfile.mkdtemp(prefix="dyrate-fuzz-"))


def allowed(read: Callable[[], Any]) -> Any:
    """The result, or None after one of our own errors, which must say something."""
    try:
        return read()
    except DyRateError as error:
        assert str(error).strip()
        return None


def _file(name: str, content: bytes) -> Path:
    path = _folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def record(data: bytes) -> None:
    """A record file of these bytes; and one whose JSON they are, with a checksum that fits."""
    key = record_key("n", {})
    allowed(lambda: read_record(_file(f"{key}.json.gz", data)))
    allowed(
        lambda: read_record(
            _file(f"{key}.json.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + gzip.compress(data)[10:])
        )
    )
    try:
        payload = json.loads(data)
        whole = {"format": 1, "name": "n", "config": {}, "inputs": [], "provenance": payload, "payload": payload}
        text = json.dumps({**whole, "sha256": checksums(whole)}).encode()
    except (ValueError, RecursionError):
        return
    import io

    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        stream.write(text)
    path = _file(f"{key}.parts/00000000-00000001-2.json.gz", buffer.getvalue())
    assert allowed(lambda: read_record(path)) is not None
    allowed(lambda: Parts(path.parent, key, 2))


def predictor(data: bytes) -> None:
    """A predictor file of these bytes; and one whose head they are, with a checksum that fits."""
    import torch
    from safetensors.torch import save

    allowed(lambda: RatePredictor.load(_file("p.safetensors", data)))
    try:
        head = json.loads(data)
        tensors = {"linear.weight": torch.zeros(3, 8), "linear.bias": torch.zeros(3)}
        if isinstance(head, dict):
            head["sha256"] = tensors_digest(json.dumps(head, sort_keys=True), tensors)
        content = save(tensors, {"rate_predictor": json.dumps(head, sort_keys=True)})
    except (ValueError, RecursionError, UnicodeEncodeError):
        return
    allowed(lambda: RatePredictor.load(_file("p.safetensors", content)))


def training_state(data: bytes) -> None:
    """A state to resume from of these bytes, and one whose plain part they are."""
    import torch
    from safetensors.torch import save

    allowed(lambda: load_state(_file("state.safetensors", data)))
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    tensors = {"00000": torch.zeros(2)}
    content = save(tensors, {"state": text, "sha256": tensors_digest(text, tensors)})
    allowed(lambda: load_state(_file("state.safetensors", content)))


def annotations(data: bytes) -> None:
    """An annotation file of these bytes, in each published format; every item of what is accepted is read."""
    for kind, (name, pictures) in LAYOUTS.items():
        _file(f"{kind}/{pictures}/a.png", b"no picture")
        _file(f"{kind}/{name}", data)
        opened = allowed(lambda kind=kind: open_dataset(f"{kind}:{_folder / kind}"))
        for item in opened or ():
            assert item.id and item.references and all(text.strip() for text in item.references)
            allowed(lambda item=item: item.image)
        if opened is not None:
            json.dumps(opened.identity)


def picture(data: bytes) -> None:
    """A picture of these bytes."""
    found = allowed(lambda: load_image(data))
    assert found is None or (found.mode == "RGB" and min(found.size) >= 1)


def notebook(data: bytes) -> None:
    """A notebook file of these bytes, and a parameter's value from the command line."""
    path = _file("x.ipynb", data)
    allowed(lambda: code_cells(path))
    allowed(lambda: notebook_parameters(path))
    text = data.decode(errors="replace")
    for default in (0, 1.5, True, "a", [1], None):
        value = allowed(lambda default=default: Parameter("p", default).parse(text))
        assert value is None or default is None or type(value) is type(default)


def checksum_file(data: bytes) -> None:
    """A SHA256SUMS of these bytes."""
    allowed(lambda: check_sums(_file(f"sums/{SUMS}", data).parent))


def scoreboard(data: bytes) -> None:
    """A scoreboard.csv of these bytes, a text to write it into, and the notes on what is finished."""
    folder = _file("board/scoreboard.csv", data).parent
    allowed(lambda: read_scoreboard(folder))
    allowed(lambda: write_scoreboard(_file("board/README.md", data), folder))
    marked = _file("board/marked.md", b"<!-- scoreboard -->\n<!-- /scoreboard -->\n")
    allowed(lambda: write_scoreboard(marked, folder))
    _file("board/state.json", data)
    assert isinstance(allowed(lambda: _State(folder)).done, dict)


def archive(data: bytes) -> None:
    """An archive of checkpoints of these bytes: unpacked, searched and checked; not installed."""
    with tempfile.TemporaryDirectory(dir=_folder) as scratch:
        path = _file("a.archive", data)
        if allowed(lambda: fetch._unpack(path, Path(scratch)) or True):
            allowed(lambda: fetch._found(Path(scratch)))


def lmms_results(data: bytes) -> None:
    """A results file of lmms-eval of these bytes, and the paper's tables with it."""
    _file("lmms/m/1_results.json", data)
    frame = allowed(lambda: read_results(_folder / "lmms"))
    if frame is not None:
        assert len(frame) and len(allowed(lambda: paper_tables(frame)))


def parquet(data: bytes) -> None:
    """A data set's parquet file of these bytes; every item of what is accepted is read."""
    _file("parquet/coco2017_cap_val/val.parquet", data)
    opened = allowed(lambda: open_dataset(f"parquet:{_folder / 'parquet' / 'coco2017_cap_val'}"))
    for item in opened or ():
        assert item.id and item.references and all(text.strip() for text in item.references)
        allowed(lambda item=item: item.image)


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f
    for f in (
        record, predictor, training_state, annotations, picture, notebook, checksum_file, scoreboard, archive, lmms_results,
        parquet,
    )
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """A few sound inputs of a target, to begin with."""
    import io

    from PIL import Image

    if name == "picture":
        found = []
        for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX"):
            buffer = io.BytesIO()
            Image.radial_gradient("L").resize((16, 12)).convert("RGB").save(buffer, kind)
            found.append(buffer.getvalue())
        return found
    if name == "archive":
        return _archives()
    if name == "parquet":
        return _parquets()
    image = {"id": 1, "file_name": "a.png", "filename": "a.png", "split": "test", "domain": "in-domain"}
    image["sentences"] = [{"raw": "a dog", "sentid": 1}]
    document = {"images": [image], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}
    cell = {"cell_type": "code", "source": ["a = 1  # one\n"], "metadata": {"tags": ["parameters"]}}
    texts: dict[str, list[Any]] = {
        "annotations": [document],
        "notebook": [{"cells": [cell]}, 3],
        "record": [{"index": [0], "results": [1], "device": "x", "seconds": 1}],
        "predictor": [{"n_heads": 2, "n_rates": 3, "layer": 2, "model": "m"}],
        "lmms_results": [_lmms()],
        "training_state": [{"dict": [["a", {"tensor": "00000"}], [0, {"list": [1, None]}]]}],
    }
    plain = {
        "checksum_file": [b"0" * 64 + b"  a.json\n"],
        "scoreboard": [
            b"element,claim,notebook,paper,ours,verdict,evidence\na,b,03_benchmarks,c,d,e,f\n",
            b'{"00": {"key": "a", "seconds": 1}}',
        ],
    }
    return plain.get(name) or [json.dumps(text).encode() for text in texts[name]]


def _parquets() -> list[bytes]:
    """Two rows in lmms-eval's columns, in each way of packing."""
    import io

    import pyarrow as pa
    from pyarrow import parquet as pq

    picture = {"bytes": seeds("picture")[0], "path": "a.png"}
    table = pa.table({"image": [picture, picture], "question_id": ["a", "b"], "answer": [["a dog"], ["a cat", "two"]]})
    found = []
    for kind in ("none", "snappy", "gzip", "zstd"):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression=kind)
        found.append(buffer.getvalue())
    return found


def _lmms() -> dict[str, Any]:
    config = {"model": "dyrate", "model_args": "pretrained=m,method=fastv,layer=2,rate=0.5", "limit": None}
    scores = {"alias": "a", "coco_CIDEr,none": 1.1, "coco_CIDEr_stderr,none": "N/A"}
    return {"results": {"coco2017_cap_val": scores}, "config": config, "n-samples": {"coco2017_cap_val": {"effective": 5}}}


def _archives() -> list[bytes]:
    """One small checkpoint as a zip and as tars, packed in each way."""
    import io
    import tarfile
    import zipfile

    from safetensors.numpy import save

    files = {"scenes-small/config.json": b"{}", "scenes-small/model.safetensors": save({})}
    found = []
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    found.append(buffer.getvalue())
    for kind in ("", "gz", "bz2", "xz"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as opened_tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                opened_tar.addfile(member, io.BytesIO(content))
        found.append(buffer.getvalue())
    return found


if __name__ == "__main__":
    import atheris

    target = TARGETS[sys.argv.pop(1)]
    corpus = Path(tempfile.mkdtemp(prefix="dyrate-corpus-"))
    for number, content in enumerate(seeds(target.__name__)):
        (corpus / str(number)).write_bytes(content)
    for module in [module for name, module in sys.modules.items() if name.startswith("dyrate_lib")]:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and hasattr(value, "__code__"):
                setattr(module, name, atheris.instrument_func(value))
    target = TARGETS[target.__name__]
    atheris.Setup([*sys.argv, str(corpus)], target)
    atheris.Fuzz()
