"""Checkpoints of scenes VLMs in transformers' own layout: written whole, packed for transport, unpacked again."""

from __future__ import annotations

import copy
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..archives import unpack
from ..checksums import write_sums

SHARD = "14MB"


def export(model: Any, processor: Any, out: Path, extra: Mapping[str, str] | None = None) -> None:
    """Write a complete bfloat16 checkpoint to ``out``, swapped in whole, so that a kill leaves the old or the new."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    fresh.mkdir(parents=True)
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(fresh, max_shard_size=SHARD)
    processor.save_pretrained(fresh)
    for name, text in (extra or {}).items():
        (fresh / name).write_text(text)
    write_sums(fresh)
    if out.exists():
        for kept in ("metrics.json", "README.md", "predictions.json.gz"):
            if (out / kept).exists() and not (fresh / kept).exists():
                shutil.copy2(out / kept, fresh / kept)
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def ship(out: Path, to: Path) -> None:
    """Copy a checkpoint for transport: its weight shards and a ``files.tar`` with everything else, each atomically."""
    to.mkdir(parents=True, exist_ok=True)
    for shard in sorted(out.glob("*.safetensors")):
        shutil.copyfile(shard, to / f".{shard.name}")
        os.replace(to / f".{shard.name}", to / shard.name)
    with tarfile.open(to / ".files.tar", "w") as tar:
        for path in sorted(p for p in out.iterdir() if p.suffix != ".safetensors"):
            tar.add(path, arcname=path.name)
    os.replace(to / ".files.tar", to / "files.tar")


def unship(source: Path, out: Path) -> None:
    """The inverse of :func:`ship`."""
    out.mkdir(parents=True, exist_ok=True)
    for shard in sorted(source.glob("*.safetensors")):
        shutil.copyfile(shard, out / shard.name)
    with tarfile.open(source / "files.tar") as tar:
        unpack(tar, out)
