"""One set of versions: pyproject.toml, requirements.lock and environment.yml agree with each other and with what runs here."""

import ast
import re
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from dyrate_lib import __version__, paths

ROOT = paths.root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
PINS = [Requirement(line) for line in LINES]
LOCK = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in PINS}
HERE = {
    canonicalize_name(pin.name) for pin in PINS if pin.marker is None or pin.marker.evaluate()
}  # triton: Linux only
DECLARED = [Requirement(r) for group in (PROJECT["dependencies"], *EXTRAS.values()) for r in group]
# `make lmms`, `make soak` and JOBS add theirs to an environment that the lock describes; the lock itself does without
LOCKED = [Requirement(r) for name in EXTRAS if name not in ("lmms", "jobs", "fuzz") for r in EXTRAS[name]] + DECLARED[
    : len(PROJECT["dependencies"])
]
# What a package is imported as, where that is not its name.
IMPORTED_AS = {"pyyaml": "yaml", "pillow": "PIL", "ipython": "IPython"}


def locked_environment():
    """Whether this is the environment that the lock describes (a GPU machine may bring a torch of its own)."""
    return metadata.version("torch").split("+")[0] == LOCK["torch"] and sys.version_info[:2] == (3, 11)


def test_the_lock_pins_every_line_exactly():
    exact = re.compile(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*(; (sys_platform == 'linux'|python_version == '3.[0-9]+'))?")
    assert len(LINES) > 50 and all(exact.fullmatch(line) for line in LINES)
    assert len(LOCK) == len(LINES)


@pytest.mark.parametrize("requirement", LOCKED, ids=str)
def test_the_lock_satisfies_what_pyproject_asks_for(requirement):
    assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_is_closed(python):
    """Everything that a locked package needs on this system is locked too, in a version it accepts, on each Python."""
    if not locked_environment():
        pytest.skip("the installed versions are not the locked ones, so their needs say nothing of the lock")
    there = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    locked = {canonicalize_name(pin.name) for pin in PINS if pin.marker is None or pin.marker.evaluate(there)}
    for name in HERE:
        wanted = metadata.metadata(name).get("Requires-Python", "")
        assert SpecifierSet(wanted).contains(f"{python}.0"), f"{name} needs Python {wanted}"
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate(there):
                key = canonicalize_name(need.name)
                if key in ("setuptools", "pip") or key.startswith(("nvidia-", "triton", "cuda-")):
                    continue  # the installer's own, or torch's CUDA parts, which follow from torch's pin
                assert key in locked and need.specifier.contains(LOCK[key], prereleases=True), f"{name} needs {text}"


def test_the_installed_versions_are_the_locked_ones():
    if not locked_environment():
        pytest.skip("another torch or Python than the locked one: a machine of its own, not the project's environment")
    here = {name: metadata.version(name).split("+")[0] for name in HERE}
    assert here == {name: LOCK[name] for name in HERE}


def test_conda_users_get_the_same_pins():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert "-r requirements.lock" in pip
    conda = [d for d in env["dependencies"] if isinstance(d, str)]
    assert [d.split("=")[0] for d in conda] == ["python", "pip"]  # nothing whose version the lock would not know
    python = conda[0].split("=")[1]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python)


def test_transformers_is_one_version():
    pin = next(r for r in DECLARED if r.name == "transformers")
    assert str(pin.specifier) == f"=={LOCK['transformers']}"


def test_the_package_version_is_written_the_same_everywhere():
    assert PROJECT["version"] == __version__
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == __version__
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and Version(newest[1]) == Version(__version__)


def test_every_package_imported_is_declared():
    names = {IMPORTED_AS.get(canonicalize_name(r.name), r.name.replace("-", "_")) for r in DECLARED}
    imported = set()
    for file in (ROOT / "dyrate_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"dyrate_lib"}
    assert "torch" in outside and outside <= names, f"imported but not in pyproject.toml: {sorted(outside - names)}"


def test_no_index_or_machine_path_stands_in_the_pins():
    for name in ("requirements.lock", "environment.yml", "pyproject.toml", "Makefile"):
        text = (ROOT / name).read_text()
        assert not re.search(r"--(extra-)?index-url|--find-links|file://|@ /|/home/|https?://", text), name
