"""Nothing is lost: kills, full disks, damaged files, two runs at once; every time the same records, or a plain refusal.

Here in a short form. `make soak` (DYRATE_SOAK=full) kills twenty times, at more file operations, and damages more bytes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

from dyrate_lib import InputError, RatePredictor, ResourceError, load_vlm, notebooks, study
from dyrate_lib.checksums import SUMS, check_sums, write_sums
from dyrate_lib.errors import DyRateError, RecordError
from dyrate_lib.records import read_record
from dyrate_lib.scenes.training_state import load_state, save_state

from . import soak_study

FULL = os.environ.get("DYRATE_SOAK") == "full"
ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What `soak_kills` found, made once for the tests below."""
    folder = tmp_path_factory.mktemp("kills")
    command = [sys.executable, "-m", "tests.soak_kills", str(folder), "20" if FULL else "2", "0"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=3600 if FULL else 540
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


@pytest.mark.slow
def test_a_study_made_twice_is_the_same_byte_for_byte(killed):
    assert killed["files"] >= 7 and killed["again"] == []


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_is_the_same_byte_for_byte(killed):
    found = killed["killed"]
    assert found["kills"] == (20 if FULL else 2) and found["studies"] >= 1 and found["differ"] == []
    assert not FULL or max(found["resumed_with"]) > 0  # some kills came when records were there already


@pytest.mark.slow
def test_killed_just_before_any_file_operation_it_is_the_same_byte_for_byte(killed):
    assert killed["writes"] == {"deaths": 3 * (20 if FULL else 2), "status": 0, "differ": []}


@pytest.mark.slow
def test_after_a_full_disk_it_is_the_same_byte_for_byte(killed):
    found = killed["full"]
    refused = found["statuses"].count(28)  # refused, and said why; each time a little more was written before
    assert refused > 0 and found["statuses"] == [28] * refused + [0] * (len(found["statuses"]) - refused)
    assert found["last"] == 0 and found["differ"] == []


@pytest.mark.slow
def test_two_studies_on_one_store_and_a_third_that_is_killed(killed):
    assert killed["two"] == {"statuses": [0, 0], "third": -signal.SIGKILL, "differ": []}


# ----------------------------------------------------------------------------------------------------------- damage


def damages(content: bytes, seed: int, n: int):
    """n damaged versions of a file: cut off, a bit turned, a stretch of zeros, something appended, nothing left."""
    rng = random.Random(seed)
    for i in range(n):
        at = rng.randrange(len(content))
        kinds = (
            content[:at],
            content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :],
            content[:at] + bytes(min(16, len(content) - at)) + content[at + 16 :],
            content + b"\0",
            b"",
        )
        if kinds[i % 5] != content:
            yield kinds[i % 5]


@pytest.mark.slow
def test_damaged_records_and_predictors_are_named_and_made_again(killed, monkeypatch):
    """Whatever happened to a file: the study refuses and names it, or is the same as ever; and again once it is gone."""
    monkeypatch.setattr("dyrate_lib.store.provenance", None)
    soak_study.stop_the_clock()
    alone = killed["folder"] / "alone"
    good = soak_study.files(alone)
    for seed, name in enumerate(sorted(good)):
        path, content = alone / name, (alone / name).read_bytes()
        read = read_record if name.endswith(".json.gz") else RatePredictor.load
        for damaged in damages(content, seed, 100 if FULL else 10):
            path.write_bytes(damaged)
            with pytest.raises((RecordError, InputError), match=path.name):
                read(path)
        if name.endswith(".json.gz"):
            with pytest.raises(RecordError, match=path.name):
                soak_study.compute(soak_study.open_small(alone))
            path.unlink()
        soak_study.compute(soak_study.open_small(alone))  # a predictor is written anew from its record
        assert soak_study.files(alone) == good


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny model of the reference figures with checksums."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model, processor = load_vlm("random:tiny", device="cpu")
    model.save_pretrained(folder, max_shard_size="600KB")
    processor.save_pretrained(folder)
    write_sums(folder)
    return folder


def test_a_damaged_checkpoint_is_refused_by_name(checkpoint, tmp_path):
    assert check_sums(checkpoint) and load_vlm(checkpoint, device="cpu")[0].dyrate_name == str(checkpoint)
    listed = [line.split("  ")[1] for line in (checkpoint / SUMS).read_text().splitlines()]
    assert len([name for name in listed if name.endswith(".safetensors")]) > 1 and "config.json" in listed
    for seed, name in enumerate(listed):
        folder = tmp_path / f"{seed}"
        shutil.copytree(checkpoint, folder)
        for damaged in damages((folder / name).read_bytes(), seed, 20 if FULL else 5):
            (folder / name).write_bytes(damaged)
            os.utime(folder / name, ns=(seed, random.Random(damaged).randrange(10**9)))
            with pytest.raises(InputError, match=name):
                load_vlm(folder, device="cpu")
        (folder / name).unlink()
        with pytest.raises(DyRateError, match=name):
            load_vlm(folder, device="cpu")
    for damaged in (b"", b"\xff\xfe", b"no checksum\n", b"0" * 64 + b"  ../config.json\n"):
        (checkpoint / SUMS).write_bytes(damaged)
        with pytest.raises(InputError, match=SUMS):
            load_vlm(checkpoint, device="cpu")
    write_sums(checkpoint)


def test_a_checkpoint_without_checksums_is_refused_where_it_cannot_be_read(checkpoint, tmp_path):
    """Hub folders have no checksums: a weight file that was cut off must still be no traceback."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoint, folder)
    (folder / SUMS).unlink()
    assert not check_sums(folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    for cut in (content[: len(content) // 2], content[:4], b""):
        shard.write_bytes(cut)
        with pytest.raises(DyRateError):
            load_vlm(folder, device="cpu")


def test_shipped_checkpoints_and_predictors_are_sound():
    from dyrate_lib import paths

    for name in ("scenes-small", "scenes-base"):
        assert check_sums(paths.checkpoints() / name)
    shipped = sorted(paths.predictors().glob("*.safetensors"))
    assert len(shipped) == 18 and all(RatePredictor.load(path).metadata["target"] for path in shipped)


def test_a_training_state_comes_back_and_a_damaged_one_is_refused(tmp_path):
    weights = torch.randn(3, 4)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(weights).sum().backward()
    optimizer.step()
    state = {
        "step": 3, "planned": None, "history": [{"loss": 0.5}], "model": {"a": weights, "tied": weights},
        "half": weights.bfloat16(), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    path = tmp_path / "run.state" / "state.safetensors"
    save_state(path, state)
    found = load_state(path)
    assert found["step"] == 3 and found["planned"] is None and found["history"] == [{"loss": 0.5}]
    assert torch.equal(found["model"]["tied"], weights) and torch.equal(found["half"], weights.bfloat16())
    again = torch.optim.AdamW(torch.nn.Linear(4, 3).parameters(), lr=1.0)
    again.load_state_dict(found["optimizer"])
    assert again.param_groups[0]["lr"] == 0.1 and set(again.state_dict()["state"]) == {0, 1}
    content = path.read_bytes()
    for damaged in damages(content, 0, 200 if FULL else 25):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="state.safetensors"):
            load_state(path)


# -------------------------------------------------------------------------------------------------------- full disk

SMALL_DISK = """
import os, sys
import torch
from pathlib import Path
from dyrate_lib import RatePredictor, ResourceError
from dyrate_lib.scenes.training_state import load_state, save_state
from dyrate_lib.study import _State

disk = Path(sys.argv[1])
predictor = RatePredictor(8, 20, 2)
good, state = predictor.save(disk / "p.safetensors"), disk / "state.safetensors"
save_state(state, {"step": 1})
notes = _State(disk)
notes.set("00", "key", 1.0)
before = {path.name: path.read_bytes() for path in disk.iterdir()}
room = os.statvfs(disk)
(disk / "other").write_bytes(b"x" * (room.f_bavail * room.f_frsize))
refused = 0
for write in (
    lambda: RatePredictor(8, 20, 2).save(good, seed=1), lambda: save_state(state, {"w": torch.zeros(50_000)}),
    lambda: notes.set("01" * 5000, "key", 1.0),
):
    try:
        write()
    except ResourceError as error:
        refused += 1
after = {path.name: path.read_bytes() for path in disk.iterdir() if path.name != "other"}
assert after == before, sorted(after)
RatePredictor.load(good), load_state(state)
print(refused, "refused")
"""


def test_predictor_state_and_notes_on_a_disk_that_is_really_full(tmp_path):
    """On a small file system mounted for the test's process alone: the old files stay whole, and the error is ours."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a small file system of its own needs root and unshare")
    inside = 'mount -t tmpfs -o size=80k tmpfs "$0" && exec "$1" -c "$2" "$0"'
    command = ["unshare", "--mount", "sh", "-c", inside, str(tmp_path), sys.executable, SMALL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    if "mount:" in done.stderr:
        pytest.skip("this machine does not let root mount a tmpfs")
    assert done.stdout.split() == ["3", "refused"], done.stderr[-2000:]


# -------------------------------------------------------------------------------------------------------- notebooks


def write_notebook(file: Path, *cells: str) -> Path:
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    )
    nb.cells.append(nbformat.v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}))
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nb, file)
    return file


def test_a_notebook_that_fails_or_is_killed_half_way_leaves_the_last_good_one(tmp_path):
    file, out, mark = tmp_path / "x.ipynb", tmp_path / "out", tmp_path / "mark"
    write_notebook(file, "print('good')")
    good = study.run_notebook(file, out_dir=out, progress=False).read_bytes()
    write_notebook(file, "print('half')", "1 / 0")
    with pytest.raises(notebooks.NotebookFailed, match="ZeroDivisionError"):
        study.run_notebook(file, out_dir=out, progress=False)
    assert (out / "x.ipynb").read_bytes() == good
    write_notebook(file, f"open({str(mark)!r}, 'w').close(); import time; time.sleep(600)")
    script = f"from dyrate_lib import study; study.run_notebook({str(file)!r}, out_dir={str(out)!r}, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not mark.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the session started here, its kernel included
        process.wait()
    assert (out / "x.ipynb").read_bytes() == good
    write_notebook(file, "import os; os.kill(os.getpid(), 9)")  # as the system does when memory runs out
    with pytest.raises((notebooks.NotebookFailed, ResourceError), match="x"):
        study.run_notebook(file, out_dir=out, progress=False)
    assert (out / "x.ipynb").read_bytes() == good
    write_notebook(file, "print('better')")
    study.run_notebook(file, out_dir=out, progress=False)
    assert "better" in (out / "x.ipynb").read_text() and sorted(p.name for p in out.iterdir()) == ["x.ipynb"]
