"""The book: executed notebooks, scoreboard, reference and an interactive page as static HTML that asks the network for nothing.

Sources lie in `book/`; what they show is laid out beside a copy of them (notebooks as committed, documents,
figures, the modules' docstrings), and Sphinx turns that into build/book.
"""

from __future__ import annotations

import ast
import html
import importlib
import importlib.util
import json
import logging
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import paths, study, walkthrough
from .errors import DyRateError, InputError, ResourceError
from .loading import SCENES
from .store import Store

log = logging.getLogger(__name__)

NEEDED = ("sphinx", "myst_nb", "furo", "latex2mathml")
DOCUMENTS = (
    "README.md", "DEVIATIONS.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/DATASHEET.md", "data/predictors/README.md",
    "data/checkpoints/scenes-small/README.md", "data/checkpoints/scenes-base/README.md",
)  # fmt: skip
_MARK = {"borne out": "yes", "partly": "partly", "not borne out": "no"}
_PICTURE = 504  # px: a scene is 336, drawn larger so that patch borders stay sharp on dense screens


class BookFailed(DyRateError):
    """Sphinx stopped, or found something wrong in a page; the message holds what it said."""


def build(out: str | Path | None = None, per_kind: int = walkthrough.PER_KIND, store: Store | None = None) -> Path:
    """Build the book and return its first page. A book that is already there stays until the new one is whole.

    out: folder of the book (default build/book). per_kind: scenes of each kind on the interactive page. store: where
    its generations are read from and written to (default: committed records, then build/records).

    Raises:
        ResourceError: a tool of the `book` extra is missing, this is no full checkout, or the folder cannot be written.
        InputError: the folder holds something else. BookFailed: a page does not build.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ResourceError(f"the book needs {', '.join(missing)}: `make book` installs them (pip install 'dyrate[book]')")
    sources = paths.root() / "book"
    if not sources.is_dir():
        raise ResourceError(f"no book/ in {paths.root()}: get a full checkout, or name one by DYRATE_HOME")
    target = Path(out).expanduser().resolve() if out else paths.build() / "book"
    if target.exists() and not (target / "objects.inv").is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} is there and is no book: name a new or an empty folder (--out)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".book-", dir=target.parent) as work:
            staged, fresh = Path(work) / "source", Path(work) / "html"
            shutil.copytree(sources, staged)
            _documents(staged)
            _scoreboard(staged / "parts")
            _reference(staged / "reference")
            _walk(staged, per_kind, store or Store.committed())
            _sphinx(staged, fresh)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(fresh, target)
    except OSError as error:
        raise ResourceError(f"cannot write the book into {target}: {error.strerror or error}") from error
    return target / "index.html"


def _sphinx(staged: Path, fresh: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-j", "2"]
    command += ["-d", str(staged / "doctrees"), str(staged), str(fresh)]
    above = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (above, os.environ.get("PYTHONPATH"))))}
    log.info("sphinx: %s", " ".join(command[1:]))
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise BookFailed(f"the book did not build; Sphinx says:\n{(done.stderr or done.stdout)[-4000:]}")


# --------------------------------------------------------------------------------------------------------- what is shown


def _documents(staged: Path) -> None:
    """Notebooks, documents and everything they link to, at the same places relative to each other as in the project."""
    root = paths.root()
    for name in DOCUMENTS:
        if (root / name).is_file():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, staged / name)
    (staged / "notebooks").mkdir()
    for file in sorted(paths.notebooks().glob("*.ipynb")):
        shutil.copyfile(file, staged / "notebooks" / file.name)
    shutil.copytree(paths.data() / "paper", staged / "data" / "paper")
    (staged / "figures").mkdir()
    for file in sorted(paths.figures().glob("*.png")):
        shutil.copyfile(file, staged / "figures" / file.name)


def _scoreboard(parts: Path) -> None:
    """figures/scoreboard.csv as a table whose verdicts carry a colour and, for those who see none, their word."""
    board = study.read_scoreboard(paths.figures())
    lines = ["| Figure, table | Claim | Paper (LLaVA-1.5) | Ours (scenes) | Verdict |", "|---|---|---|---|---|"]
    for _, row in board.iterrows():
        verdict = f"[{row['verdict']}]{{.verdict .{_MARK.get(row['verdict'], 'unknown')}}}"
        cells = [f"[{row['element']}](notebooks/{row['notebook']}.ipynb)", row["claim"], row["paper"], row["ours"], verdict]
        lines.append("| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |")
    parts.mkdir(exist_ok=True)
    (parts / "scoreboard.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ reference


def modules() -> dict[str, list[str]]:
    """Names of the library's modules by package, without those that are only commands."""
    import dyrate_lib

    found: dict[str, list[str]] = {"dyrate_lib": []}
    for info in pkgutil.walk_packages(dyrate_lib.__path__, "dyrate_lib."):
        package = info.name.rpartition(".")[0]
        if info.ispkg:
            found[info.name] = []
        elif not info.name.rpartition(".")[2].startswith("_"):
            found.setdefault(package, []).append(info.name)
    return {package: sorted(names) for package, names in sorted(found.items())}


def _reference(folder: Path) -> None:
    """api.md (what `from dyrate_lib import ..` gives), a page for every module, and modules.md that lists them."""
    import dyrate_lib

    folder.mkdir(exist_ok=True)
    parts = ["# The public API", "", "What `from dyrate_lib import ...` gives; the rest is in [all modules](modules.md).", ""]
    for name in sorted(dyrate_lib.__all__, key=str.lower):
        thing = getattr(dyrate_lib, name)
        kind = "autoclass" if isinstance(thing, type) else "autofunction"
        members = "\n   :members:" if kind == "autoclass" and not issubclass(thing, Exception) else ""
        parts += [f"## {name}", "", _rst(f".. {kind}:: dyrate_lib.{name}{members}"), ""]
    (folder / "api.md").write_text("\n".join(parts), encoding="utf-8")
    packages = {package: names for package, names in modules().items() if names}
    index = ["# All modules", ""]
    for package, names in packages.items():
        page = [f"# {package}", ""]
        index += [f"## [{package}]({package}.md)", ""]
        for name in names:
            short, absent = name.removeprefix("dyrate_lib."), _absent(name)
            index.append(f"- **{short}**: {_purpose(name)}")
            body = _rst(f".. automodule:: {name}\n   :members:\n   :undoc-members:")
            if absent:
                body = f"{_purpose(name)}\n\n*Needs {absent}, which was not there when this book was built.*"
            page += [f"## {short}", "", body, ""]
        (folder / f"{package}.md").write_text("\n".join(page) + "\n", encoding="utf-8")
        index.append("")
    tree = ["```{toctree}", ":hidden:", "", *packages, "```"]
    (folder / "modules.md").write_text("\n".join([*index, *tree]) + "\n", encoding="utf-8")


def _absent(name: str) -> str:
    """The outside package for want of which a module cannot be imported here; "" if it can, or is broken otherwise."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        return "" if missing == "dyrate_lib" else missing
    except ImportError:
        pass  # autodoc says what is wrong with it
    return ""


def _rst(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```"


def _purpose(name: str) -> str:
    """The first sentence of a module's docstring, read without importing it."""
    spec = importlib.util.find_spec(name)
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) if spec and spec.origin else None
    return html.escape(" ".join((text or "").split("\n\n")[0].split()), quote=False).replace("*", r"\*")


# ------------------------------------------------------------------------------------------------------ interactive page


def _walk(staged: Path, per_kind: int, store: Store) -> None:
    """parts/walk.html: the page's controls with its data as JSON inside; static/walk/: the scenes as PNG."""
    from .datasets import open_dataset

    rows = walkthrough.scenes_shown(per_kind)
    folder = staged / "static" / "walk"
    folder.mkdir(parents=True)
    scenes = []
    for row in rows:
        name = f"{row['id']}.png"
        if not (folder / name).is_file():
            picture = open_dataset(row["spec"], row["index"] + 1)[row["index"]].image
            picture.resize((_PICTURE, _PICTURE)).save(folder / name, optimize=True)
        scenes.append({"key": walkthrough.place(row), "picture": f"_static/walk/{name}"}
                      | {k: row[k] for k in ("kind", "id", "prompt", "reference")})  # fmt: skip
    models: dict[str, Any] = {}
    for name in SCENES:
        record = walkthrough.walk(name, rows, store)
        models[name] = record["payload"] | {"device": record["provenance"]["device"]}
    data = json.dumps({"grid": 24, "scenes": scenes, "models": models}, separators=(",", ":"), ensure_ascii=True)
    page = (staged / "walk.html").read_text(encoding="utf-8")
    safe = data.replace("<", r"\u003c")  # nothing in the data can end the script element
    (staged / "parts" / "walk.html").write_text(page.replace("WALK_DATA", safe), encoding="utf-8")
