"""Runs the notebooks: parameters checked first, executed by this very Python, resumed after a kill, good results never lost.

papermill only warns of an unknown parameter and writes its output even when a cell fails; here an unknown parameter is an
error before anything runs, and a notebook that fails lies beside the last good one as `<name>.failed.ipynb`.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyrate_lib import paths
from dyrate_lib.errors import DyRateError, InputError, ResourceError

NOTEBOOKS = [
    "00_scenes_vlm", "01_attention_analysis", "02_training", "03_benchmarks", "04_efficiency", "05_ablations",
    "06_visualization", "07_verdict",
]  # fmt: skip
SCALES = ("smoke", "full")

# Minutes a notebook takes: computing anew at smoke scale on two CPU cores, at full scale on one H200; redrawing from the
# committed records on a CPU.
MINUTES: dict[str, dict[str, float]] = {
    "smoke": dict(zip(NOTEBOOKS, (2, 1, 2, 3, 1, 2, 1, 0.2), strict=True)),
    "full": dict(zip(NOTEBOOKS, (8, 2, 10, 10, 5, 10, 2, 0.2), strict=True)),
    "redraw": dict(zip(NOTEBOOKS, (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.2), strict=True)),
}


class NotebookFailed(DyRateError):
    """A cell raised. The message holds the cell, its error and where the half-executed notebook lies."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of a notebook: its default from the cell tagged `parameters`, the comment behind it as help."""

    name: str
    default: Any
    help: str = ""

    @property
    def type_name(self) -> str:
        return type(self.default).__name__

    def parse(self, text: str) -> Any:
        """A value from the command line, as the type of the default. InputError when it cannot be one."""
        kind = type(self.default)
        if kind is str:
            return text
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (ValueError, SyntaxError):
            raise InputError(f"parameter {self.name} is of type {self.type_name}, {text!r} is not") from None
        return self.check(value)

    def check(self, value: Any) -> Any:
        """The value itself if it has the default's type (an int may stand for a float). InputError otherwise."""
        kind = type(self.default)
        if kind is float and type(value) is int:
            return float(value)
        if self.default is not None and type(value) is not kind:
            raise InputError(
                f"parameter {self.name} is of type {self.type_name} (default {self.default!r}), not {value!r}"
            )
        return value


def find_notebook(name: str | Path) -> Path:
    """A notebook's file from its name ('03_benchmarks'), its number ('03' or '3') or a path. InputError if there is none."""
    if str(name).endswith(".ipynb"):
        if Path(name).is_file():
            return Path(name).resolve()
        raise InputError(f"there is no notebook at {name}")
    text = str(name)
    number = f"{int(text):02d}_" if text.isascii() and text.isdigit() else None
    for known in NOTEBOOKS:
        if text == known or (number and known.startswith(number)):
            file = paths.notebooks() / f"{known}.ipynb"
            if not file.is_file():
                raise ResourceError(f"{file.name} is missing from notebooks/: get a full checkout")
            return file
    raise InputError(f"no notebook {text!r}; there are: {', '.join(NOTEBOOKS)}")


def _code_cells(file: Path) -> list[dict[str, Any]]:
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file.name} cannot be read as a notebook: {error}") from error
    return [c for c in cells if c.get("cell_type") == "code"]


def notebook_parameters(name: str | Path) -> dict[str, Parameter]:
    """The parameters a notebook declares, in order: literal assignments of the one cell tagged `parameters`."""
    file = find_notebook(name)
    cells = [c for c in _code_cells(file) if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{file.name} has {len(cells)} cells tagged 'parameters'; it must have one")
    source = "".join(cells[0]["source"])
    help_at = {
        t.start[0]: t.string.lstrip("# ").strip()
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    out: dict[str, Parameter] = {}
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            try:
                default = ast.literal_eval(value)
            except ValueError as error:
                raise InputError(f"{file.name}: parameter {target.id} is no literal, so it cannot be set") from error
            out[target.id] = Parameter(target.id, default, help_at.get(value.end_lineno or 0, ""))
    return out


def check_parameters(name: str | Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with strings parsed where the notebook wants another type. InputError on an unknown name, listing the known."""
    known = notebook_parameters(name)
    for key in params:
        if key not in known:
            listing = "\n".join(f"  {p.name} ({p.type_name}, {p.default!r}) {p.help}".rstrip() for p in known.values())
            raise InputError(f"{find_notebook(name).stem} has no parameter {key!r}; it has:\n{listing}")
    return {k: known[k].parse(v) if isinstance(v, str) else known[k].check(v) for k, v in params.items()}


@contextlib.contextmanager
def _this_python() -> Iterator[str]:
    """A kernelspec that starts sys.executable, ahead of any 'python3' the user has installed elsewhere; yields its name."""
    with tempfile.TemporaryDirectory(prefix="dyrate-kernel-") as folder:
        spec = Path(folder) / "kernels" / "python3"
        spec.mkdir(parents=True)
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        body = {"argv": argv, "display_name": "Python 3", "language": "python"}
        (spec / "kernel.json").write_text(json.dumps(body), encoding="utf-8")
        before = os.environ.get("JUPYTER_PATH")
        os.environ["JUPYTER_PATH"] = folder if before is None else folder + os.pathsep + before
        try:
            yield "python3"
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


@contextlib.contextmanager
def _import_path() -> Iterator[None]:
    """Lets the kernel import this copy of the library, installed or not."""
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = here if not before else here + os.pathsep + before
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_notebook(
    name: str | Path, params: Mapping[str, Any] | None = None, out_dir: str | Path | None = None, progress: bool = True
) -> Path:
    """Execute a notebook into `out_dir`/<name>.ipynb (default build/notebooks) and return that file.

    The kernel is this Python, its folder the notebook's own. A failing notebook becomes `<name>.failed.ipynb` and an earlier
    good one stays. Raises InputError (unknown notebook or parameter, before anything runs), ResourceError (papermill missing, folder
    not writable), NotebookFailed.
    """
    source = find_notebook(name)
    values = check_parameters(source, params or {})
    try:
        import papermill
    except ImportError as error:
        raise ResourceError("papermill is not installed: pip install papermill, or use `make env`") from error
    folder = Path(out_dir) if out_dir else paths.build() / "notebooks"
    folder = folder.resolve()
    done, failed, part = (folder / f"{source.stem}{s}.ipynb" for s in ("", ".failed", ".part"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _this_python() as kernel, _import_path():
            papermill.execute_notebook(
                source, part, parameters=values, kernel_name=kernel, cwd=source.parent, progress_bar=progress,
                stderr_file=sys.stderr if progress else None,
            )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        os.replace(part, failed)
        raise NotebookFailed(_failure(source.stem, error, failed)) from None
    except OSError as error:
        raise ResourceError(f"{source.stem}: cannot write into {folder}: {error.strerror or error}") from error
    os.replace(part, done)
    failed.unlink(missing_ok=True)
    return done


def _failure(name: str, error: Any, kept: Path) -> str:
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()
    tail = "\n".join(f"    {line}" for line in trace[-12:])
    first = next((line for line in error.source.splitlines() if line.strip()), "")
    return (
        f"{name} stopped in cell [{error.exec_count}], which begins {first.strip()!r}:\n{tail}\n  {error.ename}: {error.evalue}\n"
        f"  What ran is kept in {kept}; what was computed before is kept too and is not computed again."
    )


def _digest(files: Sequence[Path], base: Path) -> str:
    h = hashlib.sha256()
    for file in files:
        h.update(f"{file.relative_to(base).as_posix()}\0".encode())
        h.update(hashlib.sha256(file.read_bytes()).digest())
    return h.hexdigest()


def _everything_read(records: str) -> str:
    """Hash of what a notebook's result hangs on beside itself: the library and the shipped data."""
    library = Path(__file__).resolve().parent
    data = [paths.checkpoints(), paths.predictors(), paths.data() / "paper"]
    if records == "committed":
        data.append(paths.results())
    files = sorted(p for folder in data for p in folder.rglob("*") if p.is_file())
    return _digest(sorted(library.rglob("*.py")), library) + _digest(files, paths.data())


class _State:
    """Which notebooks are finished in an output folder, and for what inputs: `<out>/state.json`."""

    def __init__(self, out: Path) -> None:
        self.file = out / "state.json"
        try:
            self.done: dict[str, dict[str, Any]] = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or a kill tore it: run again, the records still spare the work
            self.done = {}

    def set(self, name: str, key: str, seconds: float) -> None:
        self.done[name] = {"key": key, "seconds": round(seconds, 1)}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.done, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, self.file)


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
    progress: bool = True,
) -> Path:  # fmt: skip
    """Run the notebooks in order and return the output folder, which then holds executed notebooks, figures and tables.

    scale: 'smoke' or 'full'; None takes full with CUDA, else smoke. records: 'fresh' computes everything anew, 'committed' reads
    data/results. model: replaces both VLMs of the study, or 'A,B' the small and the base one. data: 'scenes' or 'coco:/folder'.
    out: default build/. executed: where executed notebooks go (default out/notebooks). only: some notebooks. again: also those
    already finished with the same inputs. Raises what run_notebook raises; finished notebooks stay finished.
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
    plan = []
    for file in files:  # every parameter of every notebook is checked before the first one runs
        known = notebook_parameters(file)
        needed = {k: v for k, v in asked.items() if k in known or k in ("scale", "records", "out")}
        plan.append((file, check_parameters(file, needed)))
    target = Path(executed).resolve() if executed else folder / "notebooks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make the output folder {folder}: {error.strerror or error}") from error
    with _only_run(folder):
        _run_plan(plan, _State(folder), target, MINUTES["redraw" if records == "committed" else scale], again, progress)
    return folder


def _run_plan(
    plan: Sequence[tuple[Path, dict[str, Any]]], state: _State, target: Path, minutes: Mapping[str, float], again: bool,
    progress: bool,
) -> None:  # fmt: skip
    what = plan[0][1]
    print(f"Running {len(plan)} notebooks: scale {what['scale']}, records {what['records']}; results go to {state.file.parent}")
    shared = _everything_read(what["records"])
    todo = []
    key = ""
    for file, params in plan:
        # Each key holds the one before: a notebook reads what the earlier ones left.
        sources = ["".join(c["source"]) for c in _code_cells(file)]
        key = hashlib.sha256(json.dumps([key, shared, params, sources], sort_keys=True).encode()).hexdigest()
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
