"""A study that only reads: what records and quantities are there, for notebook 07, which makes none of its own."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import paths
from ..compare import load_quantities
from ..loading import SCENES
from ..store import Store
from .context import Study


def is_shipped(study: Study) -> bool:
    """Whether the study is the one whose figures and quantities are committed."""
    models = set(study.names.values()) == set(SCENES)
    return study.records == "committed" and study.scale.name == "full" and models and study.on_scenes and study.seed == 0


def figures_folder(study: Study) -> Path:
    """Where the figures of notebooks 01 to 06 lie that belong to this study."""
    return paths.figures() if is_shipped(study) else study.figures


def gather(study: Study) -> dict[str, Any]:
    """What notebooks 01 to 06 measured, as they saved it: name -> {mean, lo, hi, n}; {} where none of them ran yet.

    Of the study whose records are committed, the committed quantities; of any other, those in its own output folder.

    Raises:
        InputError: two notebooks saved the same name.
    """
    folder = paths.figures() if is_shipped(study) else study.tables
    return dict(load_quantities(folder)) if folder.is_dir() else {}


def reader(study: Study, folder: Path) -> Study:
    """The study with stores that compute nothing: a record that is not there is a ResourceError. folder: for what is written."""

    def frozen(store: Store, name: str) -> Store:
        return Store(folder / name, (store.root, *store.read), frozen=True)

    return dataclasses.replace(
        study, out=folder, store=frozen(study.store, "records"), scores_store=frozen(study.scores_store, "scores"),
        progress=False, _read={}, _datasets={}, _ids={},
    )  # fmt: skip


def part(name: str) -> ModuleType | None:
    """A module of the experiments by name, or None where this version has none of that name."""
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        return None
