"""lmms-eval from here: the project's tasks known, Java found, and an exit code that tells of failure. Needs lmms-eval.

lmms-eval's own command prints a traceback and leaves with 0 when an evaluation fails, and cannot be told of task folders by
an entry point.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from ..errors import DyRateError, InputError, ResourceError
from ..metrics import find_java
from .benchmarks import BENCHMARKS, LOCAL, LOCAL_GROUP
from .task_files import SCENES_PICTURES, official_folder, write_tasks


def evaluate(
    arguments: Sequence[str], data: str | None = None, scenes_pictures: int = SCENES_PICTURES, scenes_seed: int = 0
) -> int:
    """Run lmms-eval with these arguments of its command line; returns the exit code (0, or 1 after a failure).

    Under `torchrun` or `accelerate launch` every process calls this; rank 0 prints and writes.

    Raises:
        InputError, ResourceError: bad arguments, missing data or packages, before any weights are loaded.
    """
    if "--model" in arguments or any(a.startswith("--model=") for a in arguments):
        raise InputError("--model is dyrate here: leave it out, or call lmms-eval itself")
    if "--trust_remote_code" in arguments:
        raise InputError("--trust_remote_code would run code that a data set brings: leave it out")
    official_folder()
    with contextlib.suppress(ResourceError):  # captions need it, short answers do not
        os.environ["PATH"] = str(Path(find_java()).parent) + os.pathsep + os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(prefix="dyrate-tasks-") as folder:
        known = write_tasks(folder, data, scenes_pictures=scenes_pictures, seed=scenes_seed)
        _check_tasks(arguments, known)
        try:
            return _run([*arguments, "--model", "dyrate", "--include_path", folder])
        except DyRateError:
            raise
        except Exception as error:
            traceback.print_exc()
            print(f"dyrate: the evaluation failed: {error}", file=sys.stderr)
            return 1


def _check_tasks(arguments: Sequence[str], known: Sequence[str]) -> None:
    asked = [a.partition("=")[2] for a in arguments if a.startswith("--tasks=")]
    asked += [b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--tasks"]
    for name in [text.strip() for text in asked[-1].split(",")] if asked else []:
        if not name.endswith(LOCAL) or name in known:
            continue
        if name == LOCAL_GROUP:
            raise InputError(
                f"the group {name} needs --data FOLDER, with a folder of parquet files for each benchmark that shall be asked: "
                f"{', '.join(BENCHMARKS)} (python -m dyrate_lib.lmms parquet writes those of captions)"
            )
        task = name.removesuffix(LOCAL)
        if task not in BENCHMARKS:
            raise InputError(f"there is no task {name}: local variants are {LOCAL_GROUP} and those of {', '.join(BENCHMARKS)}")
        raise InputError(f"the task {name} needs --data FOLDER with parquet files in FOLDER/{task}")


def _run(arguments: list[str]) -> int:
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs
    from lmms_eval.__main__ import cli_evaluate_single, parse_eval_args
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.utils import make_table

    from . import manifest

    # where the package is not installed, no entry point says so
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    saved, sys.argv = sys.argv, ["lmms-eval", *arguments]
    try:
        _, args = parse_eval_args()
    finally:
        sys.argv = saved
    _quiet(args.verbosity)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))])
    results, _ = cli_evaluate_single(args)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not results or not results.get("results"):
            print("dyrate: lmms-eval gave no results", file=sys.stderr)
            return 1
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
    return 0


def _quiet(level: str) -> None:
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level=level)
