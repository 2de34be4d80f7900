"""The command line: `python -m dyrate_lib COMMAND` (also installed as `dyrate`)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dyrate_lib import captioning, paths, study
from dyrate_lib.errors import DyRateError, ResourceError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dyrate_lib", description="DyRate: token reduction while a VLM generates, and its study."
    )
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = sub.add_parser("reproduce", help="compute every notebook anew, in order, and print the scoreboard")
    p.add_argument("--scale", choices=study.SCALES, help="default: full with a CUDA device, else smoke")
    p.add_argument("--records", choices=("fresh", "committed"), default="fresh", help="committed reads data/results")
    p.add_argument("--model", help="a hub id or folder for both models of the study, or two of them: SMALL,BASE")
    p.add_argument("--data", help="scenes (default) or coco:/folder")
    p.add_argument("--out", help="output folder (default: build)")
    p.add_argument("--again", action="store_true", help="run also what is finished")
    p.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="these notebooks only")

    sub.add_parser("figures", help="redraw figures/ from the committed records")

    p = sub.add_parser("run", help="run one notebook")
    p.add_argument("notebook", help="name, number or path, e.g. 03_benchmarks or 3")
    p.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    p.add_argument("--out", help="folder for the executed notebook (default: build/notebooks)")

    p = sub.add_parser("list", help="list the notebooks with their parameters")
    p.add_argument("notebook", nargs="?", help="this one only")

    p = sub.add_parser("caption", help="caption a picture and show what was kept")
    p.add_argument("image")
    p.add_argument("--model", default="scenes-small")
    p.add_argument("--method", choices=captioning.METHODS, default="dyrate")
    p.add_argument("--layer", type=int)
    p.add_argument("--rate", type=float, help="share of image tokens removed (fastv, random)")
    p.add_argument("--flops", type=float, help="set the method (not dyrate) to this share of the FLOPs, e.g. 0.333")
    p.add_argument("--predictor", help="a trained predictor (.safetensors); default: the shipped one for a third of the FLOPs")
    p.add_argument("--prompt", default=captioning.DEFAULT_PROMPT)
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--device", help="cpu or cuda; default: cuda if there is one")
    p.add_argument("--out", help="folder for the mask figure (default: build/captions)")

    p = sub.add_parser("scoreboard", help="print the scoreboard, or write it into a file")
    p.add_argument("--tables", help="folder with scoreboard.csv (default: build/tables if there is one, else figures)")
    p.add_argument("--write", metavar="FILE", help="replace what stands between the scoreboard marks of FILE, from figures/")
    return parser


def _print_scoreboard(folder: Path) -> None:
    board = study.read_scoreboard(folder)
    for _, row in board.iterrows():
        print(f"{row['element']} ({row['claim']}): {row['verdict']}")
        print(f"    paper  {row['paper']}\n    ours   {row['ours']}\n    why    {row['evidence']}")


def _reproduce(args: argparse.Namespace) -> None:
    folder = study.reproduce(
        args.scale, records=args.records, model=args.model, data=args.data, out=args.out, only=args.only, again=args.again
    )
    if (folder / "tables" / "scoreboard.csv").is_file():
        print("\nScoreboard\n==========")
        _print_scoreboard(folder / "tables")
    elif not args.only:
        raise ResourceError(f"notebook 07 left no scoreboard in {folder / 'tables'}")
    print(f"\nExecuted notebooks, figures and tables: {folder}")


def _list(args: argparse.Namespace) -> None:
    for name in [args.notebook] if args.notebook else study.NOTEBOOKS:
        print(name)
        for p in study.notebook_parameters(name).values():
            print(f"    {p.name} = {p.default!r}" + (f"  # {p.help}" if p.help else ""))


def _caption(args: argparse.Namespace) -> None:
    result = captioning.caption(
        args.image, args.model, args.method, layer=args.layer, rate=args.rate, flops=args.flops, predictor=args.predictor,
        prompt=args.prompt, max_new_tokens=args.max_new_tokens, device=args.device, out=args.out,
    )  # fmt: skip
    print(result.text)
    print(f"\nImage tokens kept of {result.n_image}, step by step:")
    for t, (kept, word) in enumerate(zip(result.kept, result.words, strict=True)):
        print(f"  {t:3d}  {kept:5d}  {word!r}")
    print(f"\nMethod: {result.method}" if result.method.name != "dyrate" else "\nMethod: DyRate")
    print("FLOPs saved:")
    print(f"  {result.saved['cached']:7.1%}  as a KV-cached decoder computes them, vision tower and LM head included")
    print(f"  {result.saved['paper']:7.1%}  by FastV's formula, language model re-run for every token")
    print("\nMasks: " + ", ".join(str(f) for f in result.files))


def _scoreboard(args: argparse.Namespace) -> None:
    built = paths.build() / "tables"
    if args.write:
        study.write_scoreboard(args.write, args.tables or paths.figures())
    else:
        usual = built if (built / "scoreboard.csv").is_file() else paths.figures()
        _print_scoreboard(Path(args.tables) if args.tables else usual)


def _run(args: argparse.Namespace) -> None:
    print(study.run_notebook(args.notebook, dict(args.parameter), args.out))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 for bad input or a missing resource; 1 for a notebook that failed; 130 for Ctrl-C. No traceback."""
    args = _parser().parse_args(argv)
    commands = {
        "reproduce": _reproduce, "figures": lambda _: print(study.figures()), "run": _run, "list": _list, "caption": _caption,
        "scoreboard": _scoreboard,
    }  # fmt: skip
    try:
        commands[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except study.NotebookFailed as error:
        print(f"dyrate: {error}", file=sys.stderr)
        return 1
    except DyRateError as error:
        print(f"dyrate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dyrate: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
