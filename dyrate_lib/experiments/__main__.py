"""`python -m dyrate_lib.experiments NOTEBOOK ...`: the records of one notebook, computed without papermill or a kernel.

Under `torchrun` or `accelerate launch` the processes share the work: a training's batches by row, replies by batch of
pictures. Several calls at once, on machines that share the output folder, share everything but a training's batches.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence

from .. import distributed
from ..errors import DyRateError, InputError
from .context import STAGES, open_study

MODULES = {
    "01_attention_analysis": "attention", "02_training": "training_runs", "03_benchmarks": "benchmarks",
    "04_efficiency": "efficiency", "05_ablations": "ablations", "06_visualization": "visualization",
    # parts of a notebook, for several processes that start together
    "short_answers": "short_answers", "caption_cells": "caption_cells", "fronts": "fronts", "controls": "controls",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute (or find) every record of the notebooks asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dyrate_lib.experiments", description=__doc__)
    parser.add_argument("notebook", nargs="+", help=f"one or more of {', '.join(MODULES)} (a number will do)")
    parser.add_argument("--scale", default="auto", help="smoke, full, or auto: full with a GPU (default)")
    parser.add_argument("--records", default="fresh", help="fresh (default) or committed")
    parser.add_argument("--out", default="", help="folder for records (default: build)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-small", default="scenes-small")
    parser.add_argument("--model-base", default="scenes-base")
    parser.add_argument("--data", default="scenes", help="scenes, or coco:/folder")
    parser.add_argument("--stage", default="records", choices=STAGES[1:], help="records of both models (default), or of one")
    args = vars(parser.parse_args(arguments))
    try:
        distributed.start()
        for name in [_notebook(text) for text in args.pop("notebook")]:
            study = open_study(name, **args)
            start = time.perf_counter()
            models = None if study.keys_asked == study.keys else study.keys_asked
            compute = importlib.import_module(f"{__package__}.{MODULES[name]}").compute
            records = compute(study) if models is None else compute(study, models)
            if distributed.rank() > 0:
                continue
            print(f"{name}: {len(records)} records in {time.perf_counter() - start:.1f} s, in {study.store.root}", flush=True)
    except DyRateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    distributed.stop()
    return 0


def _notebook(text: str) -> str:
    for name in MODULES:
        if text == name or (text.isdigit() and name.startswith(f"{int(text):02d}_")):
            return name
    raise InputError(f"no notebook {text!r} with records: there are {', '.join(MODULES)}")


if __name__ == "__main__":
    sys.exit(main())
