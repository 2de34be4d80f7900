"""One notebook: found, its parameters read and checked, executed by this very Python.

papermill only warns of an unknown parameter and writes its output even when a cell fails; here an unknown parameter is an
error before anything runs, and a notebook that fails lies beside the last good one as `<name>.failed.ipynb`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyrate_lib import paths
from dyrate_lib.errors import DyRateError, InputError, ResourceError

NOTEBOOKS = [
    "00_scenes_vlm", "01_attention_analysis", "02_training", "03_benchmarks", "04_efficiency", "05_ablations",
    "06_visualization", "07_verdict",
]  # fmt: skip

PLACES = ("out", "lmms")  # parameters that are folders: as the caller sees them, not as the notebook's own folder does


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
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # of texts that nest without end, too
            raise InputError(f"parameter {self.name} is of type {self.type_name}, {text[:80]!r} is not") from None
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
                raise ResourceError(
                    f"{file.name} is not in {file.parent}: the study needs a checkout of the project (set DYRATE_HOME to one)"
                )
            return file
    raise InputError(f"no notebook {text!r}; there are: {', '.join(NOTEBOOKS)}")


def code_cells(file: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook file. InputError when it is none."""
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        code = [c for c in cells if c.get("cell_type") == "code"]
        for cell in code:
            "".join(cell["source"])
            if not isinstance(cell.setdefault("metadata", {}).get("tags") or [], list):
                raise TypeError("tags that are no list")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file.name} cannot be read as a notebook: {error!r}") from error
    return code


def notebook_parameters(name: str | Path) -> dict[str, Parameter]:
    """The parameters a notebook declares, in order: literal assignments of the one cell tagged `parameters`."""
    file = find_notebook(name)
    cells = [c for c in code_cells(file) if "parameters" in (c["metadata"].get("tags") or ())]
    if len(cells) != 1:
        raise InputError(f"{file.name} has {len(cells)} cells tagged 'parameters'; it must have one")
    source = "".join(cells[0]["source"])
    try:
        help_at = {
            t.start[0]: t.string.lstrip("# ").strip()
            for t in tokenize.generate_tokens(io.StringIO(source).readline)
            if t.type == tokenize.COMMENT
        }
        body = ast.parse(source).body
    except (SyntaxError, tokenize.TokenError, ValueError, MemoryError, RecursionError) as error:
        raise InputError(f"{file.name}: its parameters are no Python: {error}") from error
    out: dict[str, Parameter] = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            try:
                default = ast.literal_eval(value)
            except (ValueError, TypeError, MemoryError, RecursionError) as error:
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

    The kernel is this Python, its folder the notebook's own. A failing notebook becomes `<name>.failed.ipynb` and an
    earlier good one stays; one that stopped as asked (stage = "records") becomes `<name>.records.ipynb`. Raises
    InputError (unknown notebook or parameter, before anything runs), ResourceError (papermill missing, folder not
    writable, no results in the folder `lmms`), NotebookFailed.
    """
    source = find_notebook(name)
    values = check_parameters(source, params or {})
    for place in PLACES:
        if values.get(place):
            values[place] = str(Path(values[place]).expanduser().resolve())
    if values.get("lmms"):
        from dyrate_lib.lmms.results import read_results

        read_results(values["lmms"])  # before a kernel is started
    try:
        import papermill
        from nbclient.exceptions import DeadKernelError
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
        if error.ename == "StageDone":  # stopped where it was asked to, once its records were there
            stopped = folder / f"{source.stem}.records.ipynb"
            os.replace(part, stopped)
            return stopped
        os.replace(part, failed)
        raise NotebookFailed(_failure(source.stem, error, failed)) from None
    except DeadKernelError as error:
        kept = f"what ran is in {failed}" if part.is_file() else "nothing of it was written"
        if part.is_file():
            os.replace(part, failed)
        raise NotebookFailed(
            f"{source.stem}: its process ended in the middle of a cell ({error}), killed, or out of memory; {kept}. "
            "What was computed before is kept and is not computed again."
        ) from None
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
        f"{name} stopped in cell [{error.exec_count}], which begins {first.strip()!r}:\n{tail}\n"
        f"  {error.ename}: {error.evalue}\n"
        f"  What ran is kept in {kept}; what was computed before is kept too and is not computed again."
    )
