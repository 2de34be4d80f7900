"""More than one process: items shared out, records claimed, training by row under torchrun, jobs; all as with one process."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from dyrate_lib import InputError, ResourceError, distributed, jobs
from dyrate_lib.claims import claimed
from dyrate_lib.records import read_record
from dyrate_lib.store import get_or_run, run_items

from . import soak_study

ROOT = Path(__file__).parents[1]
# as many threads as this process has: sums over them are added in another order
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
ITEMS = [f"item-{i:02d}" for i in range(24)]
FORK = get_context("fork")


def at_once(n, target, *arguments):
    """n processes of a function; their numbers come first among its arguments."""
    workers = [FORK.Process(target=target, args=(i, *arguments)) for i in range(n)]
    for worker in workers:
        worker.start()
    return workers


def joined(workers):
    for worker in workers:
        worker.join(120)
    return [worker.exitcode for worker in workers]


def note(log, line):
    """Appended in one write, so that lines of several processes do not mix."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


# ------------------------------------------------------------------------------------------------------------ claims


def _work(number, folder, log, batch_size, stuck_at=None):
    def fn(batch):
        if number == 0 and stuck_at in batch:
            note(log, "stuck")
            time.sleep(600)
        time.sleep(0.02)
        for item in batch:
            note(log, f"{number} {item}")
        return [{"id": item, "n": len(item)} for item in batch]

    record = run_items("n", {}, ITEMS, fn, store=folder, batch_size=batch_size, progress=False)
    assert record["payload"]["results"] == [{"id": item, "n": 7} for item in ITEMS]


def test_processes_share_the_items_and_each_item_is_worked_on_once(tmp_path):
    log = tmp_path / "log"
    assert joined(at_once(3, _work, tmp_path / "s", log, 2)) == [0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(item for _, item in lines) == ITEMS and len({number for number, _ in lines}) > 1
    left = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert len(left) == 1 and read_record(left[0])["payload"]["ids"] == ITEMS  # no batch, no claim is left over


def test_what_a_killed_process_had_claimed_the_others_do(tmp_path):
    log = tmp_path / "log"
    first = at_once(1, _work, tmp_path / "s", log, 2, "item-04")[0]
    deadline = time.monotonic() + 60
    while not (log.exists() and "stuck" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    others = [FORK.Process(target=_work, args=(i, tmp_path / "s", log, 2)) for i in (1, 2)]
    for worker in others:
        worker.start()
    while len(log.read_text().splitlines()) < len(ITEMS) - 1:  # all but the claimed batch; that they wait for
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    assert all(worker.is_alive() for worker in others) and "item-04" not in log.read_text()
    os.kill(first.pid, signal.SIGKILL)
    first.join(60)
    assert joined(others) == [0, 0]
    done = [line.split()[1] for line in log.read_text().splitlines() if line != "stuck"]
    assert sorted(done) == ITEMS


def _work_in_batches_of_its_own(number, folder, log):
    _work(number, folder, log, 2 + number)


def test_processes_with_other_batch_sizes_end_with_one_whole_record(tmp_path):
    assert joined(at_once(3, _work_in_batches_of_its_own, tmp_path / "s", tmp_path / "log")) == [0, 0, 0]
    assert len([path for path in (tmp_path / "s").rglob("*") if path.is_file()]) == 1


def _make(number, folder, log):
    def fn():
        note(log, number)
        time.sleep(0.3)
        return {"made": 1}

    assert get_or_run("n", {"x": 1}, fn, store=folder)["payload"] == {"made": 1}


def test_one_process_makes_a_record_and_the_others_wait_for_it(tmp_path):
    assert joined(at_once(4, _make, tmp_path / "s", tmp_path / "log")) == [0] * 4
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert len([path for path in (tmp_path / "s").rglob("*") if path.is_file()]) == 1


def test_a_claim_is_refused_while_held_and_given_where_there_can_be_none(tmp_path):
    file = tmp_path / "c.lock"
    with claimed(file, "x") as mine:
        assert mine
        with claimed(file, "x", wait=False) as other:
            assert not other
    assert not file.exists()
    with claimed(tmp_path / "gone" / "c.lock", "x") as mine:  # the work is then done without one
        assert mine
    with pytest.raises(OSError, match="of the work"), claimed(file, "x"):
        raise OSError("of the work")
    assert not file.exists()


# ---------------------------------------------------------------------------------------------------------- torchrun


def launched(module, *arguments, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")):
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_two_processes_of_torchrun_make_the_records_of_one(tmp_path):
    two, one, again = tmp_path / "two", tmp_path / "one", tmp_path / "again"
    log = tmp_path / "log"
    done = launched("tests.soak_study", two, log)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    replies = [what for _, what in lines if what.startswith("replies")]
    assert len(replies) == len(set(replies)) and len({rank for rank, what in lines if what.startswith("replies")}) == 2
    assert [what for _, what in lines if what.startswith("world")] == ["world 2"] * 2

    soak_study.compute(soak_study.open_small(one))
    theirs, ours = soak_study.contents(two), soak_study.contents(one)
    trained = [name for name in ours if "/training/" in name]
    assert len(trained) == 1 and trained[0] in theirs
    mine, shared = (json.loads(found[trained[0]])["payload"] for found in (ours, theirs))
    # the same rows, draws and loss; sums over rows are added in another order
    np.testing.assert_allclose(shared["weight"], mine["weight"], atol=1e-4)
    np.testing.assert_allclose(shared["bias"], mine["bias"], atol=1e-4)
    assert np.abs(mine["weight"]).max() > 0.01
    for a, b in zip(shared["history"], mine["history"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    same = [name for name in ours if ours[name] == theirs.get(name)]
    assert len([name for name in same if "/captions/" in name]) == 2  # replies that no predictor was part of

    # with the very predictor that two processes trained, one process gets all of their records, byte for byte
    place = again / trained[0]
    place.parent.mkdir(parents=True)
    place.write_bytes((two / trained[0]).read_bytes())
    soak_study.compute(soak_study.open_small(again))
    assert soak_study.contents(again) == theirs
    names = {path.name for path in two.rglob("*") if path.is_file()}
    assert names == {path.name for path in again.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_accelerate_launch_starts_the_same_two(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setitem(ENVIRONMENT, "ACCELERATE_USE_CPU", "true")
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    done = launched(
        "tests.soak_study", "hello", tmp_path / "log",
        launcher=("-m", "accelerate.commands.launch", *options, "--main_process_port", "0"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["0 world 2", "1 world 2"]


def test_alone_a_process_is_the_first_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.start()
    assert (distributed.rank(), distributed.size(), distributed.rows(3)) == (0, 1, [0, 1, 2])
    assert distributed.agreed(True) and not distributed.agreed(False)
    monkeypatch.setattr(distributed, "size", lambda: 4)
    with pytest.raises(InputError, match="a batch of 3 cannot be shared by 4"):
        distributed.rows(3)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.rows(6) == [1, 5]


# -------------------------------------------------------------------------------------------------------------- jobs


def planned(tmp_path, **options):
    return {job.name: job for job in jobs.plan({"scale": "smoke", "out": str(tmp_path), **options}, 4)}


def test_the_plan_trains_first_and_ends_with_the_notebooks(tmp_path):
    found = planned(tmp_path, model=soak_study.TINY)
    trained = [name for name in found if name.startswith("train-")]
    assert len(trained) == 3 and set(trained) == set(found["records-02-small"].after)
    assert set(found["notebooks"].after) == set(found) - {"notebooks"}
    seen = set()
    for name, job in found.items():  # an order in which each comes after what it needs
        assert set(job.after) <= seen
        seen.add(name)
    assert len([name for name in found if name.startswith("records-03-small")]) == 4
    assert len([name for name in planned(tmp_path) if name.startswith("records-03")]) == 4  # two for each of two models
    assert "--model-small" in found["records-05"].arguments and "--model" in found["notebooks"].arguments


@pytest.mark.parametrize(
    "value, error", [("0", InputError), ("-1", InputError), ("a b", InputError), ("nosuch", ResourceError)]
)
def test_jobs_that_cannot_be(tmp_path, value, error):
    with pytest.raises(error, match="jobs="):
        jobs.reproduce(value, "smoke", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_local_jobs_make_the_records_of_one_process(tmp_path, capfd):
    pytest.importorskip("snakemake")
    both = ["train-small-0.5-0", "train-small-0.333-0"]
    jobs.reproduce("2", "smoke", tmp_path / "jobs", model=soak_study.TINY, only=both)
    place = next((tmp_path / "jobs" / "jobs").iterdir())
    assert sorted(path.stem for path in place.glob("*.done")) == sorted(both)
    capfd.readouterr()
    jobs.reproduce("2", "smoke", tmp_path / "jobs", model=soak_study.TINY, only=both)  # nothing is done twice
    assert "Nothing to be done" in "".join(capfd.readouterr())
    alone = soak_study.train_alone(tmp_path / "alone", both)
    assert len(alone) == 2 and soak_study.contents(tmp_path / "jobs") == alone
    with pytest.raises(jobs.JobsFailed, match="train-small-0.5-0"):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "records_fresh").write_text("no folder")
        jobs.reproduce("2", "smoke", broken, model=soak_study.TINY, only=both[:1])
