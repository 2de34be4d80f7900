"""The whole study: every notebook in order, announced with its time, resumed after a kill, ending with the scoreboard.

What is finished is remembered by a hash of everything it was made from (library, shipped data, parameters, code of the
notebook and of those before it), so that a second call runs only what is new or changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyrate_lib import marks, paths
from dyrate_lib.errors import InputError, ResourceError
from dyrate_lib.notebooks import (
    NOTEBOOKS,
    NotebookFailed,
    Parameter,
    check_parameters,
    code_cells,
    find_notebook,
    notebook_parameters,
    run_notebook,
)

__all__ = [
    "MINUTES", "NOTEBOOKS", "SCALES", "NotebookFailed", "Parameter", "default_scale", "figures", "notebook_parameters",
    "read_scoreboard", "reproduce", "run_notebook", "write_scoreboard",
]  # fmt: skip

SCALES = ("smoke", "full")

# Minutes a notebook takes: computing anew at smoke scale on two CPU cores, at full scale on one H200; redrawing from the
# committed records on a CPU.
MINUTES: dict[str, dict[str, float]] = {
    "smoke": dict(zip(NOTEBOOKS, (0.9, 0.6, 1.2, 2.3, 0.7, 1, 0.4, 0.2), strict=True)),
    "full": dict(zip(NOTEBOOKS, (18, 1, 10, 22, 60, 4, 1, 0.2), strict=True)),
    "redraw": dict(zip(NOTEBOOKS, (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.2), strict=True)),
}


def _digest(files: Sequence[Path], base: Path) -> str:
    h = hashlib.sha256()
    for file in files:
        h.update(f"{file.relative_to(base).as_posix()}\0".encode())
        h.update(hashlib.sha256(file.read_bytes()).digest())
    return h.hexdigest()


def _everything_read(records: str) -> str:
    """Hash of what a notebook's result hangs on beside itself: the library and the shipped data."""
    library = Path(__file__).resolve().parent
    data = [paths.checkpoints(), paths.predictors(), paths.paper()]
    if records == "committed":
        data.append(paths.results())
    files = sorted(p for folder in data for p in folder.rglob("*") if p.is_file())
    return _digest(sorted(library.rglob("*.py")), library) + _digest(files, paths.data())


class _State:
    """Which notebooks are finished, and for what inputs: `state.json` beside the folder of executed notebooks."""

    def __init__(self, out: Path) -> None:
        self.file = out / "state.json"
        self.done: dict[str, dict[str, Any]] = {}
        try:
            for name, entry in json.loads(self.file.read_text(encoding="utf-8")).items():
                self.done[name] = {"key": str(entry["key"]), "seconds": float(entry["seconds"])}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self.done = {}  # none yet, or damaged: run again, the records still spare the work

    def set(self, name: str, key: str, seconds: float) -> None:
        self.done[name] = {"key": key, "seconds": round(seconds, 1)}
        part = self.file.with_suffix(".part")
        try:
            part.write_text(json.dumps(self.done, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(part, self.file)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise ResourceError(
                f"cannot note in {self.file} that {name} is finished ({error.strerror or error}): its records are kept"
            ) from error


@contextlib.contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """One run at a time in an output folder. ResourceError when another holds it. The lock goes when its process ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two runs at once are then the user's to avoid
        yield
        return
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResourceError(f"another run is at work in {out}: wait for it, or choose another folder (--out)") from error
        yield


def default_scale() -> str:
    """'full' where CUDA is available, else 'smoke'."""
    import torch

    return "full" if torch.cuda.is_available() else "smoke"


def _minutes(minutes: float) -> str:
    return f"{max(1, round(minutes * 60))} s" if minutes < 1 else f"{minutes:.0f} min"


def reproduce(
    scale: str | None = None, *, records: str = "fresh", model: str | None = None, data: str | None = None,
    out: str | Path | None = None, executed: str | Path | None = None, only: Sequence[str] | None = None, again: bool = False,
    lmms: str | Path | None = None, progress: bool = True,
) -> Path:  # fmt: skip
    """Run the notebooks in order and return the output folder, which then holds executed notebooks, figures and tables.

    scale: 'smoke' or 'full'; None takes full with CUDA, else smoke. records: 'fresh' computes everything anew, 'committed' reads
    data/results. model: replaces both VLMs of the study, or 'A,B' the small and the base one. data: 'scenes' or 'coco:/folder'.
    out: default build/. executed: where executed notebooks go (default out/notebooks). only: some notebooks. again: also those
    already finished with the same inputs. lmms: a folder of lmms-eval results, shown in notebook 03. Raises what run_notebook
    raises; finished notebooks stay finished.
    """
    scale = scale or default_scale()
    if scale not in SCALES:
        raise InputError(f"scale is one of {', '.join(SCALES)}, not {scale!r}")
    if records not in ("fresh", "committed"):
        raise InputError(f"records is 'fresh' or 'committed', not {records!r}")
    files = [find_notebook(name) for name in (only or NOTEBOOKS)]
    asked: dict[str, Any] = {"scale": scale, "records": records, "out": ""}
    folder = Path(out).expanduser().resolve() if out else paths.build()
    if out:
        asked["out"] = str(folder)
    if model:
        small, _, base = model.partition(",")
        asked |= {"model_small": small.strip(), "model_base": (base or small).strip()}
    if data:
        asked["data"] = data
        if data != "scenes":
            from dyrate_lib.experiments.context import data_specs

            data_specs(data)
    read = ""
    if lmms:
        from dyrate_lib.lmms.results import read_results, result_files

        asked["lmms"] = str(Path(lmms).expanduser().resolve())
        read_results(asked["lmms"])
        read = _digest(result_files(asked["lmms"]), Path(asked["lmms"]))
        if not any("lmms" in notebook_parameters(file) for file in files):
            raise InputError("lmms: none of the notebooks asked for shows results of lmms-eval; 03_benchmarks does")
    plan = []
    for file in files:  # every parameter of every notebook is checked before the first one runs
        known = notebook_parameters(file)
        needed = {k: v for k, v in asked.items() if k in known or k in ("scale", "records", "out")}
        plan.append((file, check_parameters(file, needed)))
    target = Path(executed).resolve() if executed else folder / "notebooks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make the output folder {folder}: {error.strerror or error}") from error
    with _only_run(target.parent):
        minutes = MINUTES["redraw" if records == "committed" else scale]
        _run_plan(plan, _State(target.parent), target, minutes, again, progress, read)
    return folder


def _run_plan(
    plan: Sequence[tuple[Path, dict[str, Any]]], state: _State, target: Path, minutes: Mapping[str, float], again: bool,
    progress: bool, read: str = "",
) -> None:  # fmt: skip
    what = plan[0][1]
    print(f"Running {len(plan)} notebooks: scale {what['scale']}, records {what['records']}; notebooks go to {target}")
    shared = _everything_read(what["records"])
    todo = []
    key = ""
    for file, params in plan:
        # Each key holds the one before: a notebook reads what the earlier ones left.
        sources = ["".join(c["source"]) for c in code_cells(file)]
        inputs = [key, shared, params, sources] + ([read] if "lmms" in params else [])
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        last = state.done.get(file.stem, {})
        finished = not again and last.get("key") == key and (target / file.name).is_file()
        about = last["seconds"] / 60 if "seconds" in last else minutes.get(file.stem, 1.0)
        print(f"  {file.stem:24s} {'finished before, kept' if finished else 'about ' + _minutes(about)}")
        if not finished:
            todo.append((file, params, key, about))
    if todo:
        print(f"In all about {_minutes(sum(t[3] for t in todo))}. If it is stopped, the same command goes on where it was.")
    for i, (file, params, file_key, _) in enumerate(todo, 1):
        print(f"[{i}/{len(todo)}] {file.stem}", flush=True)
        start = time.monotonic()
        run_notebook(file, params, target, progress)
        seconds = time.monotonic() - start
        state.set(file.stem, file_key, seconds)
        print(f"[{i}/{len(todo)}] {file.stem} done in {_minutes(seconds / 60)}", flush=True)


def figures(progress: bool = True) -> Path:
    """Redraw every figure and table of `figures/` from the committed records, on any machine; returns the folder."""
    reproduce(
        "full", records="committed", out=paths.root(), executed=paths.build() / "redrawn" / "notebooks", again=True,
        progress=progress,
    )  # fmt: skip
    return paths.figures()


def read_scoreboard(folder: str | Path) -> Any:
    """The scoreboard that notebook 07 left as `scoreboard.csv` in `folder` (a DataFrame).

    ResourceError if there is none, InputError for one that was altered or damaged.
    """
    import pandas as pd

    file = Path(folder) / "scoreboard.csv"
    if not file.is_file():
        raise ResourceError(f"there is no {file}: run the study first (make reproduce)")
    try:
        board = pd.read_csv(file, keep_default_na=False, dtype=str)
        missing = [name for name in _COLUMNS if name not in board.columns]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}")
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors, as wrong encodings are
        raise InputError(f"{file} was altered or damaged ({error}): run notebook 07 again") from error
    return board


_COLUMNS = ("element", "claim", "notebook", "paper", "ours", "verdict", "evidence")


def write_scoreboard(file: str | Path, folder: str | Path) -> None:
    """Replace what stands between the scoreboard marks of a text file by the scoreboard in `folder`, as a Markdown table.

    InputError when the file has not exactly one pair of marks.
    """
    from dyrate_lib.plotting import markdown_table

    marks.read(file, "scoreboard")  # a file without the marks is told before a missing scoreboard
    board = read_scoreboard(folder)
    board["notebook"] = [f"[{n[:2]}](notebooks/{n}.ipynb)" for n in board["notebook"]]
    shown = board[["element", "claim", "notebook", "paper", "ours", "verdict"]]
    shown.columns = ["Figure, table", "Claim", "Notebook", "Paper (LLaVA-1.5)", "Ours (scenes)", "Verdict"]
    marks.replace(file, "scoreboard", markdown_table(shown))
