"""`python -m dyrate_lib.lmms`: lmms-eval with the model `dyrate`, its task files, captions as parquet, tables from results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..__main__ import exit_code
from .benchmarks import BENCHMARKS, GROUP
from .task_files import SCENES_PICTURES, write_tasks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dyrate_lib.lmms",
        description="lmms-eval with the model dyrate: all methods, official benchmarks.",
    )
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = sub.add_parser(
        "eval", help="run lmms-eval; whatever is not listed here goes to it", add_help=False,
        description="All options of lmms-eval; --model is dyrate, and the project's tasks are known.",
    )  # fmt: skip
    _task_options(p)

    p = sub.add_parser("tasks", help="write the task files, for lmms-eval's own --include_path")
    p.add_argument("folder")
    _task_options(p)

    p = sub.add_parser(
        "parquet", help="write captions that lie here in another format as parquet, for the offline tasks"
    )
    p.add_argument("dataset", help="coco:FOLDER, flickr30k:FOLDER, nocaps:FOLDER or parquet:FOLDER")
    p.add_argument("file", help="e.g. DATA/coco2017_cap_val/val.parquet")
    p.add_argument("--task", required=True, choices=[b.task for b in BENCHMARKS.values() if b.table == 2])
    p.add_argument("--n", type=int, help="how many items (default: all)")

    p = sub.add_parser("tables", help=f"Tables I and II from the results of {GROUP}, beside the paper's values")
    p.add_argument("folder", help="what --output_path named")
    return parser


def _task_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="folder of parquet files, one folder a task: makes the tasks ..._local")
    parser.add_argument("--scenes_pictures", type=int, default=SCENES_PICTURES, help="pictures of each scenes task")
    parser.add_argument("--scenes_seed", type=int, default=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 for bad input or a missing resource; 1 for an evaluation that failed; 130 for Ctrl-C."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "eval":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return exit_code(lambda: _run(args, rest))


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.command == "eval":
        from .launch import evaluate

        return evaluate(rest, data=args.data, scenes_pictures=args.scenes_pictures, scenes_seed=args.scenes_seed)
    if args.command == "tasks":
        names = write_tasks(args.folder, args.data, scenes_pictures=args.scenes_pictures, seed=args.scenes_seed)
        print("\n".join(names))
    elif args.command == "parquet":
        from ..datasets import open_dataset
        from .parquet import write_captions

        print(write_captions(open_dataset(args.dataset, args.n), args.task, args.file))
    else:
        from .results import differences, paper_tables, read_results

        scores = read_results(args.folder)
        for title, table in {**paper_tables(scores), "Against the paper": differences(scores)}.items():
            print(f"\n{title}\n{table.to_string(index=False, na_rep='-')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
