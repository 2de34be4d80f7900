"""`python -m dyrate_lib.experiments NOTEBOOK ...`: the records of one notebook, computed without papermill or a kernel."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence

from ..errors import DyRateError, InputError
from .context import open_study

MODULES = {
    "01_attention_analysis": "attention", "02_training": "training_runs", "03_benchmarks": "benchmarks",
    "04_efficiency": "efficiency", "05_ablations": "ablations", "06_visualization": "visualization",
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
    args = vars(parser.parse_args(arguments))
    try:
        for name in [_notebook(text) for text in args.pop("notebook")]:
            study = open_study(name, **args, stage="records")
            start = time.perf_counter()
            records = importlib.import_module(f"{__package__}.{MODULES[name]}").compute(study)
            print(f"{name}: {len(records)} records in {time.perf_counter() - start:.1f} s, in {study.store.root}", flush=True)
    except DyRateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _notebook(text: str) -> str:
    for name in MODULES:
        if text == name or (text.isdigit() and name.startswith(f"{int(text):02d}_")):
            return name
    raise InputError(f"no notebook {text!r} with records: there are {', '.join(MODULES)}")


if __name__ == "__main__":
    sys.exit(main())
