"""The command line: `python -m dyrate_lib COMMAND` (also installed as `dyrate`)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dyrate_lib import __version__, captioning, generation, paths, plan, study
from dyrate_lib.errors import DyRateError, InputError, ResourceError

log = logging.getLogger(__name__)

SHELLS = ("bash", "zsh", "tcsh")


def _parser(prog: str = "python -m dyrate_lib") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="DyRate: token reduction while a VLM generates, and its study.",
        epilog="COMMAND --help says more of each. Exit codes: 0; 1 a notebook or page failed; 2 bad input, or something is "
        "missing; 130 stopped by Ctrl-C.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dyrate {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say what is done; -vv: every detail, and tracebacks")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = sub.add_parser("reproduce", help="compute every notebook anew, in order, and print the scoreboard")
    p.add_argument("--scale", choices=study.SCALES, help="default: full with a CUDA device, else smoke")
    p.add_argument("--records", choices=("fresh", "committed"), default="fresh", help="committed reads data/results")
    p.add_argument("--model", help="a hub id or folder for both models of the study, or two of them: SMALL,BASE")
    p.add_argument("--data", help="scenes (default) or coco:/folder, and with it flickr30k:/folder, nocaps:/folder, by commas")
    p.add_argument("--lmms", help="a folder of lmms-eval results, which fill Tables I and II of notebook 03")
    p.add_argument("--out", help="output folder (default: build)")
    p.add_argument("--again", action="store_true", help="run also what is finished")
    p.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="these notebooks only")
    p.add_argument("--jobs", metavar="N|EXECUTOR", help="as independent jobs by Snakemake: N at a time here, or on slurm")

    sub.add_parser("figures", help="redraw figures/ from the committed records")

    p = sub.add_parser("run", help="run one notebook")
    p.add_argument("notebook", help="name, number or path, e.g. 03_benchmarks or 3")
    p.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    p.add_argument("--out", help="folder for the executed notebook (default: build/notebooks)")

    p = sub.add_parser("list", help="list the notebooks with their parameters")
    p.add_argument("notebook", nargs="?", help="this one only")

    p = sub.add_parser("caption", help="caption a picture and show what was kept")
    p.add_argument("image", help="a picture file")
    p.add_argument("--model", default="scenes-small", help="scenes-small (default), scenes-base, a hub id or a folder")
    p.add_argument("--method", choices=captioning.METHODS, default="dyrate", metavar="METHOD",
                   help="dyrate (default), " + ", ".join(m for m in captioning.METHODS if m != "dyrate"))  # fmt: skip
    p.add_argument("--layer", type=int, help="P: layers from P on read the kept tokens only")
    p.add_argument("--rate", type=float, help="share of image tokens removed (fastv, random, merge)")
    p.add_argument("--flops", type=float, help="set the method (not dyrate) to this share of the FLOPs, e.g. 0.333")
    p.add_argument("--predictor", help="a trained predictor (.safetensors); default: the shipped one for a third of the FLOPs")
    p.add_argument("--prompt", default=captioning.DEFAULT_PROMPT, help="default: asks for a one-sentence caption")
    p.add_argument("--max-new-tokens", type=int, default=64, help="length of the reply at most (default: 64)")
    p.add_argument("--json", action="store_true", help="one JSON object on standard output instead of text")
    p.add_argument("--no-progress", action="store_true", help="no bar on standard error (without a terminal there is none)")
    p.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    p.add_argument("--engine", choices=generation.ENGINES, help="default: graph where it can run, else reference")
    p.add_argument("--out", help="folder for the mask figure (default: build/captions)")

    p = sub.add_parser("bench", help="time loops and methods on this machine, with ratios and floors")
    p.add_argument("--model", help="default: scenes-small on a CPU, random:llava-1.5-7b on a GPU")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--pictures", type=int, default=1, help="in a prompt, with random weights (5 are 2,880 image tokens)")
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--loops", nargs="+", help="graph, reference, stock, static (compiled): default those that run here at once")
    p.add_argument("--methods", nargs="+", default=["original", "fastv-2", "vtw", "dyrate"])
    p.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    p.add_argument("--profile", action="store_true", help="also where the reference loop's time goes, by kind of operator")

    p = sub.add_parser("scoreboard", help="print the scoreboard, or write it into a file")
    p.add_argument("--tables", help="folder with scoreboard.csv (default: build/tables if there is one, else figures)")
    p.add_argument("--write", metavar="FILE", help="replace what stands between the scoreboard marks of FILE, from figures/")

    p = sub.add_parser("plan", help="how long the full study takes on original weights: hours and memory on several GPUs")
    p.add_argument("--model", choices=plan.SIZES, help="LLaVA-1.5's size (default: both)")
    p.add_argument("--gpus", type=int, default=8, help="GPUs that share the work (default: 8)")
    p.add_argument("--write", metavar="FILE", help="put the table, for both sizes and eight GPUs, between the plan marks of FILE")

    p = sub.add_parser("book", help="build the book: notebooks, reference and an interactive page as static HTML")
    p.add_argument("--out", help="folder of the book (default: build/book)")

    p = sub.add_parser("fetch", help="copy the scenes checkpoints from a checkout, a folder or an archive on disk")
    p.add_argument("source", help="a checkout, a folder with scenes-small or scenes-base, or a .zip or .tar of one")

    p = sub.add_parser("completion", help="print a completion script for a shell, for the command `dyrate`")
    p.add_argument("shell", choices=SHELLS)
    for p in sub.choices.values():  # -v may stand before or after the command
        p.add_argument("-v", "--verbose", action="count", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _print_scoreboard(folder: Path) -> None:
    board = study.read_scoreboard(folder)
    for _, row in board.iterrows():
        print(f"{row['element']} ({row['claim']}): {row['verdict']}")
        print(f"    paper  {row['paper']}\n    ours   {row['ours']}\n    why    {row['evidence']}")


def _reproduce(args: argparse.Namespace) -> None:
    if args.jobs:
        folder = _jobs(args)
    else:
        folder = study.reproduce(
            args.scale, records=args.records, model=args.model, data=args.data, out=args.out, only=args.only, again=args.again,
            lmms=args.lmms,
        )  # fmt: skip
    if (folder / "tables" / "scoreboard.csv").is_file():
        print("\nScoreboard\n==========")
        _print_scoreboard(folder / "tables")
    elif not args.only:
        raise ResourceError(f"notebook 07 left no scoreboard in {folder / 'tables'}")
    print(f"\nExecuted notebooks, figures and tables: {folder}")


def _jobs(args: argparse.Namespace) -> Path:
    from dyrate_lib import jobs

    if args.only or args.again or args.records != "fresh":
        raise InputError("--jobs computes the whole study anew: leave out --only, --again and --records")
    if args.lmms:
        raise InputError("--lmms goes without --jobs: after the jobs, the same command with it instead finds all their records")
    if not args.scale and not args.jobs.isdigit():
        raise InputError(f"--jobs {args.jobs}: say --scale full or smoke, for the nodes may have GPUs that are not here")
    return jobs.reproduce(args.jobs, args.scale or study.default_scale(), args.out or paths.build(), args.model, args.data)


def _list(args: argparse.Namespace) -> None:
    for name in [args.notebook] if args.notebook else study.NOTEBOOKS:
        print(name)
        for p in study.notebook_parameters(name).values():
            print(f"    {p.name} = {p.default!r}" + (f"  # {p.help}" if p.help else ""))


def _caption(args: argparse.Namespace) -> None:
    with captioning.Progress(args.max_new_tokens, enabled=not args.no_progress and sys.stderr.isatty()) as progress:
        result = captioning.caption(
            args.image, args.model, args.method, layer=args.layer, rate=args.rate, flops=args.flops, predictor=args.predictor,
            prompt=args.prompt, max_new_tokens=args.max_new_tokens, device=args.device, out=args.out, engine=args.engine,
            progress=progress,
        )  # fmt: skip
    if args.json:
        print(json.dumps({"image": args.image, "model": args.model, "prompt": args.prompt, **result.as_dict()}, indent=1))
        return
    print(result.text)
    print(f"\nImage tokens kept of {result.n_image}, step by step:")
    for t, (kept, word) in enumerate(zip(result.kept, result.words, strict=True)):
        print(f"  {t:3d}  {kept:5d}  {word!r}")
    print(f"\nMethod: {result.method}" if result.method.name != "dyrate" else "\nMethod: DyRate")
    print("FLOPs saved:")
    print(f"  {result.saved['cached']:7.1%}  as a KV-cached decoder computes them, vision tower and LM head included")
    print(f"  {result.saved['paper']:7.1%}  by FastV's formula, language model re-run for every token")
    print("\nMasks: " + ", ".join(str(f) for f in result.files))


def _bench(args: argparse.Namespace) -> None:
    from dyrate_lib.experiments.efficiency_bench import bench, bench_profile, subject
    from dyrate_lib.plotting import markdown_table

    table, about = bench(
        args.model, args.batch, args.pictures, args.new_tokens, args.repeats, args.loops, args.methods, args.device
    )  # fmt: skip
    print(f"{about}\n\n{markdown_table(table)}")
    if args.profile:
        spent = bench_profile(args.model, batch=args.batch, pictures=args.pictures, device=args.device)
        what = f"{subject(args.model, args.device)}, {args.batch} prompt(s), FastV"
        print(f"\nThe reference loop by kind of operator ({what}):\n\n{markdown_table(spent)}")


def _scoreboard(args: argparse.Namespace) -> None:
    built = paths.build() / "tables"
    if args.write:
        study.write_scoreboard(args.write, args.tables or paths.figures())
    else:
        usual = built if (built / "scoreboard.csv").is_file() else paths.figures()
        _print_scoreboard(Path(args.tables) if args.tables else usual)


def _plan(args: argparse.Namespace) -> None:
    if args.write:
        plan.write_plan(args.write)
    else:
        print(plan.sheet((args.model,) if args.model else plan.SIZES, args.gpus))


def _run(args: argparse.Namespace) -> None:
    print(study.run_notebook(args.notebook, dict(args.parameter), args.out))


def _book(args: argparse.Namespace) -> None:
    from dyrate_lib import book

    try:
        print(book.build(args.out))
    except book.BookFailed as error:
        raise study.NotebookFailed(str(error)) from error


def _fetch(args: argparse.Namespace) -> None:
    from dyrate_lib.fetch import fetch

    for folder in fetch(args.source):
        print(folder)


def completion(shell: str) -> str:
    """The completion script of the command `dyrate` for bash, zsh or tcsh. ResourceError without shtab."""
    try:
        import shtab
    except ImportError as error:
        raise ResourceError("completion needs shtab: pip install shtab") from error
    if shell not in SHELLS:
        raise InputError(f"there is completion for {', '.join(SHELLS)}, not for {shell!r}")
    parser = _parser("dyrate")
    commands: Any = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    for command in commands.values():  # what takes files or folders; the shell completes those itself
        for action in command._actions:
            if action.dest in ("image", "predictor", "source", "write"):
                action.complete = shtab.FILE
            elif action.dest in ("out", "tables", "lmms"):
                action.complete = shtab.DIRECTORY
    for command in ("run", "list"):
        next(a for a in commands[command]._actions if a.dest == "notebook").choices = study.NOTEBOOKS
    return shtab.complete(parser, shell)


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is now, not to what it was when the handler was made."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _set_up_logging(verbose: int) -> None:
    """The library logs under `dyrate_lib`; warnings always, what is done with -v, every detail with -vv."""
    logger = logging.getLogger("dyrate_lib")
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(relativeCreated)7d ms  %(name)s: %(message)s"))
        logger.addHandler(handler)


def exit_code(command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a command and say in a line what went wrong; returns the code of it: see `main`. 0 where it returns None."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DyRateError as error:
        log.debug("where it happened", exc_info=True)
        print(f"dyrate: {error}", file=sys.stderr)
        return 1 if isinstance(error, study.NotebookFailed) else 2
    except KeyboardInterrupt:
        print(f"dyrate: {stopped}", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 for bad input or a missing resource; 1 for what failed on the way; 130 for Ctrl-C. A traceback of
    our own errors only with -vv."""
    prog = "dyrate" if Path(sys.argv[0]).stem == "dyrate" else "python -m dyrate_lib"
    args = _parser(prog).parse_args(argv)
    _set_up_logging(args.verbose)
    commands = {
        "reproduce": _reproduce, "figures": lambda _: print(study.figures()), "run": _run, "list": _list, "caption": _caption,
        "scoreboard": _scoreboard, "bench": _bench, "plan": _plan, "book": _book, "fetch": _fetch,
        "completion": lambda a: print(completion(a.shell)),
    }  # fmt: skip
    return exit_code(lambda: commands[args.command](args), stopped="stopped; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
