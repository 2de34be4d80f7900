"""What the notebooks save, read from their cells: each file and each quantity once, and each claim where its file says.

Two sets are looked at: the notebooks as committed, and those of the next study (`data/next/notebooks` in place of theirs).
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest

from dyrate_lib import compare, paths
from dyrate_lib.experiments import claim_words, computing_time

EXPERIMENTS = "dyrate_lib.experiments"
FOLDERS = {"present": (paths.notebooks(),), "next": (paths.notebooks(), paths.data() / "next" / "notebooks")}


@dataclass(frozen=True)
class Saved:
    """Names of figures and tables, the files they become, the modules whose quantities are saved, and whose records are made."""

    figures: tuple[str, ...]
    tables: tuple[str, ...]
    files: tuple[str, ...]
    modules: tuple[str, ...]
    computed: tuple[str, ...]


def saved(notebook: Path) -> Saved:
    figures, tables, files, modules, computed = [], [], [], [], []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        calls = [] if cell["cell_type"] != "code" else calls_of(ast.parse("".join(cell["source"])))
        for call in calls:
            if call.func.attr == "compute":
                computed.append(ast.unparse(call.func.value))
            if call.func.attr == "save_figure":
                name = written(call.args[1])
                drawn = len(call.args) > 2 or any(keyword.arg == "data" for keyword in call.keywords)
                figures.append(name)
                files += [f"{name}.{kind}" for kind in ("pdf", "png", *(["csv"] if drawn else []))]
            if call.func.attr == "save_table":
                name = written(call.args[1])
                tables.append(name)
                files += [f"{name}.{kind}" for kind in ("csv", "md", "tex")]
        if any(call.func.attr == "save_quantities" for call in calls):
            modules += [ast.unparse(call.func.value) for call in calls if call.func.attr == "quantities"]
    return Saved(tuple(figures), tuple(tables), tuple(files), tuple(modules), tuple(computed))


def calls_of(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]


def written(name: ast.expr) -> str:
    """A name as the cell spells it; of an f-string with * for what is filled in."""
    if isinstance(name, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in name.values)
    assert isinstance(name, ast.Constant) and isinstance(name.value, str), ast.unparse(name)
    return name.value


def notebooks(which: str) -> dict[str, Saved]:
    """Notebook -> what it saves; a later folder's notebook takes the place of an earlier one's."""
    found = {file.stem: file for folder in FOLDERS[which] for file in sorted(folder.glob("0*.ipynb"))}
    return {stem: saved(file) for stem, file in found.items()}


@pytest.fixture(scope="module", params=FOLDERS)
def every(request):
    return request.param, notebooks(request.param)


# --------------------------------------------------------------------------------------------------------- quantities


def claims_of(module: str) -> set[str]:
    """The claims that begin the names in what `module.quantities` is made of, without running it."""
    return {text.upper() for text in heads(part(module).quantities, set())}


def heads(function: FunctionType, seen: set[FunctionType]) -> Iterator[str]:
    """Beginnings of quantities' names among the texts of a function and of what it calls in the experiments."""
    if function in seen:
        return
    seen.add(function)
    names: set[str] = set()
    for code in nested(function.__code__):
        names |= set(code.co_names)
        for text in code.co_consts:
            if isinstance(text, str) and (found := re.match(r"(c\d+|f\d)\.", text)):
                yield found[1]
    places = [function.__globals__, *(vars(found) for name in names if (found := module_of(function, name)))]
    for place in places:
        for called in (place.get(name) for name in names):
            if isinstance(called, FunctionType) and called.__module__.startswith(EXPERIMENTS):
                yield from heads(called, seen)


def nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from nested(inner)


def module_of(function: FunctionType, name: str) -> ModuleType | None:
    """A module of the experiments that a function names: by an import of its own or of its module."""
    found = function.__globals__.get(name)
    if isinstance(found, ModuleType) and found.__name__.startswith(EXPERIMENTS):
        return found
    return None if name in function.__globals__ else part(name)


def part(name: str) -> ModuleType | None:
    file = Path(compare.__file__).parent / "experiments" / f"{name}.py"
    return importlib.import_module(f"{EXPERIMENTS}.{name}") if file.is_file() else None


def test_the_claims_of_a_module_are_found_where_its_functions_name_them():
    assert claims_of("training_runs") == {"C5", "F3"} and claims_of("visualization") == {"C9"}
    assert claims_of("controls") == {f"C{i}" for i in range(11, 16)}  # by way of `better`, imported when called


def test_each_claim_is_measured_by_the_notebook_that_its_file_names(every):
    which, found = every
    asked = compare.claims(beyond=which == "next")
    told = {stem: {key for module in one.modules for key in claims_of(module)} for stem, one in found.items()}
    named = {stem: {key for key, claim in asked.items() if claim.notebook == stem} for stem in found}
    assert told == named
    counted = Counter(key for keys in told.values() for key in keys)
    assert set(counted) == set(asked) and set(counted.values()) == {1}  # no quantity in two notebooks


def test_committed_quantities_are_of_the_notebooks_that_the_claims_name(tmp_path):
    committed = sorted(paths.figures().glob("quantities_*.json"))
    assert len(committed) == 6
    for file in committed:
        measured = json.loads(file.read_text(encoding="utf-8"))
        again = compare.save_quantities(measured, file.stem.removeprefix("quantities_"), tmp_path)
        assert again.read_bytes() == file.read_bytes()


# -------------------------------------------------------------------------------------------------- figures and tables


def test_no_file_is_saved_twice(every):
    counted = Counter(file for one in every[1].values() for file in one.files)
    assert not [file for file, times in counted.items() if times > 1]


def test_figures_named_for_a_claim_are_saved_by_a_notebook():
    """Notebook 07 of the next study links what begins so."""
    drawn = [name for one in notebooks("next").values() for name in one.figures]
    lacking = [
        (claim, start)
        for claim, starts in claim_words.FIGURES.items()
        for start in starts
        if not any(name.startswith(start) for name in drawn)
    ]
    assert len(drawn) > 30 and not lacking


def test_computing_time_is_counted_over_the_records_that_the_notebooks_ask_for():
    """Those of the next study, whose notebook 07 shows it: the old curves, which only `benchmarks` makes, are not among them."""
    asked = {stem: set(one.computed) for stem, one in notebooks("next").items() if one.computed}
    assert asked == {stem: set(modules) for stem, modules in computing_time.PARTS.items()}
