"""The folder of task files that lmms-eval is given by `--include_path`: the paper's ten as a group, local variants, scenes.

Written rather than shipped, because a local variant names where lmms-eval and the data lie on this machine. The official task
is included by its file, so prompts, limits and metrics are lmms-eval's own; only where the data come from is changed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, ResourceError
from ..published_parquet import find_parquet
from . import VERSION
from .benchmarks import BENCHMARKS, GROUP, LOCAL, LOCAL_GROUP, SCENES_GROUP, Benchmark
from .parquet import check_parquet

SCENES_PICTURES = 1000
# the folder of GQA's pictures as lmms-eval's data set keeps them, apart from questions
GQA_IMAGES = "testdev_balanced_images"


def official_folder() -> Path:
    """The folder `lmms_eval/tasks`. ResourceError, with the cure, where lmms-eval is not installed."""
    found = importlib.util.find_spec("lmms_eval")
    places = [Path(p) / "tasks" for p in (found.submodule_search_locations or ())] if found else []
    if not places or not places[0].is_dir():
        raise ResourceError(
            "lmms-eval is not installed: `make lmms`, or pip install --no-deps lmms-eval and the extra [lmms]"
        )
    return places[0]


def scenes_specs() -> dict[str, str]:
    """Task name -> specification of every scenes data set that `open_dataset` knows, on its test split; short also on novel."""
    from .. import scenes

    families = [*scenes.FAMILIES, "questions", *scenes.tasks.NAMES]
    out = {f"scenes_{name.replace('-', '_')}": f"scenes:{name}:test" for name in families}
    return out | {"scenes_short_novel": "scenes:short:novel"}


def scenes_files(pictures: int = SCENES_PICTURES, seed: int = 0) -> dict[str, str]:
    """File name -> text for the scenes tasks and their group. pictures: of each; tasks that ask several times have more items."""
    from ..datasets import open_dataset

    if pictures < 1:
        raise InputError(f"scenes need at least one picture, not {pictures}")
    files = {}
    for task, spec in scenes_specs().items():
        open_dataset(spec, pictures, seed)  # refuses what it does not know now, not inside lmms-eval
        files[f"{task}.yaml"] = (
            f"task: {task}\nclass: !function dyrate_lib.lmms.scenes_task.ScenesTask\n"
            + yaml.safe_dump({"metadata": {"version": 1.0, "spec": spec, "n": pictures, "seed": seed}})
        )
    files[f"{SCENES_GROUP}.yaml"] = yaml.safe_dump(
        {"group": SCENES_GROUP, "task": list(scenes_specs())}, sort_keys=False
    )
    return files


def group_file(local: list[str] | None = None) -> tuple[str, str]:
    """(file name, text) of the group of the ten official tasks, or of the local ones given."""
    name, tasks = (GROUP, list(BENCHMARKS)) if local is None else (LOCAL_GROUP, [task + LOCAL for task in local])
    return f"{name}.yaml", yaml.safe_dump({"group": name, "task": tasks}, sort_keys=False)


def local_files(data: str | Path, tasks: Path | None = None, *, check: bool = True) -> dict[str, str]:
    """File name -> text of the offline variants for which `data` holds a folder named like the task, and their group.

    data: DATA/gqa/, DATA/pope/, .. with parquet files in the columns of lmms-eval's data sets; where files of several
    splits lie there, their names or folders begin with the split's. tasks: lmms_eval/tasks (default: the one installed).
    check: read schemas and the first rows (`check_parquet`).

    Raises:
        ResourceError: no such folder, or none of the ten in it. InputError: files that are not what the benchmark needs.
    """
    root = Path(data).expanduser().resolve()
    if not root.is_dir():
        raise ResourceError(
            f"there is no folder {data}: it holds one folder of parquet files for each task, e.g. {data}/gqa"
        )
    official = official_folder() if tasks is None else tasks
    files, found = {}, []
    for task, bench in BENCHMARKS.items():
        folder = root / task
        if not folder.is_dir():
            continue
        found.append(task)
        files.update(_local(bench, folder, official, check))
    if not found:
        raise ResourceError(f"{data} has a folder for none of {', '.join(BENCHMARKS)}")
    return files | dict([group_file(found)])


def _local(bench: Benchmark, folder: Path, official: Path, check: bool) -> dict[str, str]:
    page = official / bench.page
    if not page.is_file():
        raise ResourceError(f"this lmms-eval has no {bench.page}: {VERSION} is what the tasks are written for")
    parts = find_parquet(folder, bench.split)
    config: dict[str, Any] = {
        "include": str(page), "task": bench.task + LOCAL, "dataset_path": "parquet", "dataset_name": None,
        "dataset_kwargs": {"data_files": {bench.split: [str(p) for p in parts]}},
    }  # fmt: skip
    if "group:" in page.read_text(encoding="utf-8").replace(" :", ":"):
        config["group"] = f"{LOCAL_GROUP}_captions"  # or it would join the official task's own tag
    columns, extra = bench.columns, {}
    if bench.task == "gqa":
        images = folder / GQA_IMAGES
        config["process_docs"] = None
        if images.is_dir():
            # questions and pictures apart, as published: joined when the task is loaded
            pictures = find_parquet(images, bench.split)
            questions = [p for p in parts if images not in p.parents]
            config["dataset_kwargs"]["data_files"][bench.split] = [str(p) for p in questions]
            parts, columns = questions, tuple(c for c in columns if c[0] != "image") + (("imageId", "any"),)
            extra["gqa_local_images.py"] = _JOIN.format(paths=[str(p) for p in pictures])
            config["process_docs"] = "FUNCTION"
            if check:
                check_parquet(pictures, (("id", "any"), ("image", "image")), "gqa's pictures")
    if check:
        check_parquet(parts, columns, bench.task)
    text = yaml.safe_dump(config, sort_keys=False).replace("docs: FUNCTION", "docs: !function gqa_local_images.join")
    return {f"{bench.task}{LOCAL}.yaml": text, **extra}


_JOIN = '''"""Written by `python -m dyrate_lib.lmms tasks`."""
from functools import partial

from dyrate_lib.lmms.parquet import join_images

join = partial(join_images, files={paths!r})
'''


def write_tasks(
    folder: str | Path, data: str | Path | None = None, *, scenes_pictures: int = SCENES_PICTURES, seed: int = 0
) -> list[str]:
    """Write all task files into `folder`; returns the names of the tasks and groups that can then be asked for.

    data: also the offline variants for these parquet folders (`local_files`).
    Raises what `local_files` raises, with nothing written, and ResourceError where the folder cannot be written.
    """
    files = dict([group_file()]) | scenes_files(scenes_pictures, seed)
    if data is not None:
        files |= local_files(data)
    target = Path(folder).expanduser()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            part = target / f".{name}.{os.getpid()}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, target / name)
    except OSError as error:
        raise ResourceError(f"the task files could not be written to {folder}: {error}") from error
    return sorted(Path(name).stem for name in files if name.endswith(".yaml"))
