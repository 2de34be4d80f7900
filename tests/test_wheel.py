"""The wheel works outside the repository: built, installed into an environment of its own, run from an empty folder."""

import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dyrate_lib import paths, scenes
from dyrate_lib.errors import InputError
from dyrate_lib.fetch import fetch

ROOT = paths.root()
pytestmark = pytest.mark.slow


def run(command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **kwargs)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, so that no build folder is left in the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "dyrate_lib", folder / "dyrate_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("paper", "predictors"):
        shutil.copytree(ROOT / "data" / name, folder / "data" / name)
    made = run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "dist", folder])
    assert made.returncode == 0, made.stderr
    (file,) = (folder / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """`outside(*argv)`: the installed command, run in an empty folder by an environment that sees this one's packages."""
    home = tmp_path_factory.mktemp("outside")
    venv, empty = home / "venv", home / "empty"
    empty.mkdir()
    assert run([sys.executable, "-m", "venv", "--system-site-packages", venv]).returncode == 0
    python = venv / "bin" / "python"
    beneath = sysconfig.get_paths()["purelib"]  # a venv's own parent would be the bare Python, without torch
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).stdout.strip()
    (Path(site) / "beneath.pth").write_text(f"import site; site.addsitedir({beneath!r})\n")
    done = run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--force-reinstall", wheel])
    assert done.returncode == 0, done.stderr
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DYRATE_HOME")}
    env = {**kept, "XDG_DATA_HOME": str(home / "share"), "HF_HUB_OFFLINE": "1"}

    def call(*argv, program=venv / "bin" / "dyrate"):
        return run([program, *argv], cwd=empty, env=env)

    call.folder, call.share, call.python = empty, home / "share" / "dyrate", python
    return call


def test_the_wheel_holds_the_small_data_and_no_large_or_private_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder, pattern in (("paper", "*"), ("predictors", "*.safetensors")):
        held = {n.rpartition("/")[2] for n in names if n.startswith(f"dyrate_lib/_data/{folder}/")}
        assert held == {f.name for f in (ROOT / "data" / folder).glob(pattern)} and held
    shipped = {str(f.relative_to(ROOT)) for f in (ROOT / "dyrate_lib").rglob("*.py")}
    assert shipped <= set(names)
    assert not [n for n in names if n.startswith(("tests/", "notebooks/", "data/")) or "checkpoints/" in n]
    assert wheel.stat().st_size < 5e6


def test_it_runs_from_an_empty_folder(outside):
    where = outside("-c", "import dyrate_lib; print(dyrate_lib.__file__)", program=outside.python).stdout
    assert "outside" in where and str(ROOT) not in where  # the wheel's copy, not this checkout
    assert outside("--version").stdout.startswith("dyrate ")
    missing = outside("list")
    assert missing.returncode == 2 and "DYRATE_HOME" in missing.stderr
    table = outside("-c", "from dyrate_lib import compare; print(len(compare.claims()))", program=outside.python)
    assert table.returncode == 0 and int(table.stdout) > 5, table.stderr


def test_checkpoints_are_asked_for_then_fetched_then_used(outside, tmp_path):
    picture = tmp_path / "scene.png"
    scenes.render(scenes.make_scene(7, "test")).save(picture)
    before = outside("caption", picture, "--device", "cpu")
    assert before.returncode == 2 and "dyrate fetch" in before.stderr
    one = tmp_path / "only-small"
    shutil.copytree(ROOT / "data" / "checkpoints" / "scenes-small", one / "scenes-small")
    got = outside("fetch", one)
    assert got.returncode == 0 and Path(got.stdout.strip()) == outside.share / "data" / "checkpoints" / "scenes-small"
    done = outside("caption", picture, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["text"].endswith("background.") and 0 < said["kept"][-1] < said["n_image"] == 576
    assert all(Path(f).is_file() and outside.folder in Path(f).parents for f in said["files"])  # not in site-packages


# ---------------------------------------------------------------------------------------------------------------- fetch


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DYRATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "data" / "checkpoints"


def fake(folder, name="scenes-small"):
    from safetensors.numpy import save_file

    place = folder / name
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place / "extra.py").write_text("print('never')")
    save_file({"w": np.zeros(3)}, place / "model.safetensors")
    return place


@pytest.mark.parametrize("form", ["folder", "itself", "checkout", "zip", "gztar"])
def test_fetch_takes_folders_checkouts_and_archives(home, tmp_path, form):
    base = tmp_path / "project" / "data" / "checkpoints"
    place = fake(base)
    source = {"folder": base, "itself": place, "checkout": tmp_path / "project"}.get(form)
    if source is None:
        source = Path(shutil.make_archive(str(tmp_path / "all"), form, tmp_path, "project"))
    assert fetch(source) == [home / "scenes-small"]
    assert sorted(f.name for f in (home / "scenes-small").iterdir()) == ["config.json", "model.safetensors"]  # no code


def test_a_broken_source_is_named_and_changes_nothing(home, tmp_path):
    fetch(fake(tmp_path / "good").parent)
    bad = fake(tmp_path / "bad")
    (bad / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="incomplete or damaged"):
        fetch(tmp_path / "bad")
    (bad / "SHA256SUMS").write_text(f"{'0' * 64}  config.json\n")
    shutil.copyfile(tmp_path / "good" / "scenes-small" / "model.safetensors", bad / "model.safetensors")
    with pytest.raises(InputError, match="checksum does not fit"):
        fetch(tmp_path / "bad")
    (bad / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        fetch(tmp_path / "bad")
    (tmp_path / "text.tar").write_text("not an archive")
    with pytest.raises(InputError, match="no .zip or .tar"):
        fetch(tmp_path / "text.tar")
    with pytest.raises(InputError, match="there is no"):
        fetch(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no scenes-small or scenes-base"):
        fetch(tmp_path / "empty")
    assert (home / "scenes-small" / "model.safetensors").stat().st_size > 50
    assert [p.name for p in home.iterdir()] == ["scenes-small"]  # no scratch left


def test_checksums_come_along(home, tmp_path):
    from dyrate_lib.checksums import write_sums

    place = fake(tmp_path / "good")
    write_sums(place)
    fetch(place)
    assert (home / "scenes-small" / "SHA256SUMS").read_text() == (place / "SHA256SUMS").read_text()


@pytest.mark.parametrize("form", ["zip", "gztar"])
def test_an_archive_that_would_fill_the_disk_is_refused_unopened(home, tmp_path, monkeypatch, form):
    place = fake(tmp_path / "project" / "data" / "checkpoints")
    (place / "zeros.json").write_bytes(bytes(3_000_000))
    bomb = Path(shutil.make_archive(str(tmp_path / "all"), form, tmp_path, "project"))
    assert bomb.stat().st_size < 20_000
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    for limit, value in (("LARGEST", 2_000_000), ("MOST", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(f"dyrate_lib.fetch.{limit}", value)
            patch.setattr("zipfile.ZipFile.extractall", lambda *_: pytest.fail("unpacked"))
            patch.setattr("tarfile.TarFile.extractall", lambda *_, **__: pytest.fail("unpacked"))
            with pytest.raises(InputError, match="would unpack to more"):
                fetch(bomb)
    assert not home.exists() and fetch(bomb) == [home / "scenes-small"]


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_an_archive_cannot_write_outside(home, tmp_path, monkeypatch, form):
    evil = tmp_path / f"evil.{form}"
    if form == "zip":
        with zipfile.ZipFile(evil, "w") as archive:
            archive.writestr("../../escaped.txt", "x")
    else:
        with tarfile.open(evil, "w") as archive:
            archive.addfile(tarfile.TarInfo("../../escaped.txt"), io.BytesIO())
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))  # two folders above what it unpacks into is tmp_path
    with pytest.raises(InputError):
        fetch(evil)
    assert not list(tmp_path.rglob("escaped.txt"))


