"""Records: found again by content alone, checked on reading, never lost to a kill, a full disk or a second writer."""

import errno
import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib import records, store
from dyrate_lib.errors import InputError, RecordError, ResourceError
from dyrate_lib.parts import Parts
from dyrate_lib.records import hash_inputs, read_record, record_key, to_plain, write_record
from dyrate_lib.store import Store, get_or_run, run_items

# another process must find the library wherever the tests are started from
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[1])}


class Counted:
    """A function that counts its calls; on items it gives the length of each."""

    def __init__(self, result=None, fails_at=None):
        self.calls, self.result, self.fails_at = [], result, fails_at

    def __call__(self, batch=None):
        if self.fails_at is not None and len(self.calls) == self.fails_at:
            raise RuntimeError("killed by a test")
        self.calls.append(batch)
        return self.result if batch is None else [{"id": item, "n": len(item)} for item in batch]


def only_file(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert len(files) == 1
    return files[0]


# -------------------------------------------------------------------------------------------------------- get_or_run


def test_computed_once_and_equal_ever_after(tmp_path):
    fn = Counted({"tokens": np.arange(3), "share": np.float32(0.5), "pair": (1, 2)})
    first = get_or_run("a/b", {"rate": 0.5}, fn, store=tmp_path, about={"dtype": "bfloat16"})
    again = get_or_run("a/b", {"rate": 0.5}, fn, store=tmp_path)
    assert first == again and len(fn.calls) == 1
    assert first["payload"] == {"tokens": [0, 1, 2], "share": 0.5, "pair": [1, 2]}
    assert first["provenance"]["dtype"] == "bfloat16" and first["provenance"]["seconds"] >= 0
    assert {"device", "python", "torch", "transformers", "date", "commit"} <= set(first["provenance"])
    assert only_file(tmp_path).parent == tmp_path / "a" / "b"


def test_another_configuration_is_another_record(tmp_path):
    results = [
        get_or_run(name, config, lambda i=i: i, store=tmp_path)["payload"]
        for i, (name, config) in enumerate(
            [("a", {"x": 1}), ("a", {"x": 2}), ("b", {"x": 1}), ("a", {"x": 1, "y": None})]
        )
    ]
    assert results == [0, 1, 2, 3] and len(Store(tmp_path).records("a")) == 3


def test_key_follows_content_and_not_place(tmp_path):
    config = {"x": [1, 2.5], "y": {"b": 1, "a": None}}
    keys = set()
    for place in ("one", "two"):
        folder = tmp_path / place / f"named-{place}"
        folder.mkdir(parents=True)
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text(place)  # a model card does not change what the weights compute
        (tmp_path / place / "data.json").write_text("[1]")
        keys.add(record_key("n", config, hash_inputs([folder, tmp_path / place / "data.json"])))
    assert len(keys) == 1
    assert record_key("n", {"y": {"a": None, "b": 1}, "x": [1, 2.5]}, hash_inputs([folder])) not in keys
    before = record_key("n", config, hash_inputs([folder]))
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"Weights")
    os.utime(folder / "model-00001-of-00001.safetensors", ns=(1, 1))
    assert record_key("n", config, hash_inputs([folder])) != before


def test_key_is_the_same_on_every_machine():
    """A fixed figure: if it changes, every committed record is lost."""
    inputs = [{"name": "anything", "sha256": "0" * 64}]
    assert record_key("03_benchmarks/captions", {"n": 500, "rate": 0.5, "name": "é"}, inputs) == "4e3d58b44d191b84"


def test_same_payload_gives_the_same_file_apart_from_provenance(tmp_path, monkeypatch):
    def made(folder):
        get_or_run("n", {"x": 1}, lambda: {"b": [1, 2], "a": "text"}, store=folder)
        return only_file(folder)

    monkeypatch.setattr(store, "provenance", lambda seconds, about: {"device": "same"})
    first, second = made(tmp_path / "1"), made(tmp_path / "2")
    assert first.read_bytes() == second.read_bytes() and first.name == second.name
    monkeypatch.setattr(store, "provenance", lambda seconds, about: {"device": "other"})
    third = read_record(made(tmp_path / "3"))
    fields = {k for k in third if third[k] != read_record(first)[k]}
    assert fields == {"provenance", "sha256"} and third["sha256"]["payload"] == read_record(first)["sha256"]["payload"]
    assert json.loads(gzip.decompress(first.read_bytes()))["payload"] == {"a": "text", "b": [1, 2]}


def test_a_failing_function_stores_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        get_or_run("n", {}, Counted(fails_at=0), store=tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert get_or_run("n", {}, Counted(5), store=tmp_path)["payload"] == 5


@pytest.mark.parametrize(
    "config, message",
    [
        ({"data": "/home/someone/coco"}, "holds the path"),
        ({"data": "coco:/home/someone/coco"}, "holds the path"),
        ({"deep": [{"data": "~/coco"}]}, r"config\['deep'\]\[0\]\['data'\] holds the path"),
        ({"data": Path("x")}, "Path, which is not JSON"),
        ({"x": float("nan")}, "holds nan"),
        ({1: 2}, "keys must be strings"),
        ({"x": {1, 2}}, "holds a set"),
    ],
)
def test_bad_configuration_is_refused_before_the_work(tmp_path, config, message):
    fn = Counted(1)
    with pytest.raises(InputError, match=message):
        get_or_run("n", config, fn, store=tmp_path)
    assert not fn.calls


@pytest.mark.parametrize("name", ["", "../x", "/x", "A", "a//b", "a b", "a/"])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="not a record name"):
        get_or_run(name, {}, Counted(1), store=tmp_path)


def test_missing_inputs_are_refused_before_the_work(tmp_path):
    fn = Counted(1)
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "gone", "does not exist"), (tmp_path / "empty", "holds no weights")):
        with pytest.raises(ResourceError, match=message):
            get_or_run("n", {}, fn, store=tmp_path / "s", inputs=[path])
    with pytest.raises(InputError, match="list of paths"):
        get_or_run("n", {}, fn, store=tmp_path / "s", inputs=str(tmp_path))
    assert not fn.calls


def test_payload_that_is_not_json(tmp_path):
    with pytest.raises(InputError, match=r"payload\['x'\] holds inf"):
        get_or_run("n", {}, lambda: {"x": float("inf")}, store=tmp_path)
    with pytest.raises(InputError, match="keys must be strings"):
        get_or_run("n", {}, lambda: {3: 1}, store=tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(payload=json_values)
def test_any_json_payload_comes_back(payload, tmp_path_factory):
    folder = tmp_path_factory.mktemp("r")
    record = get_or_run("n", {}, lambda: payload, store=folder)
    assert record["payload"] == payload == read_record(only_file(folder))["payload"]
    shutil.rmtree(folder)


def test_to_plain_of_arrays_and_tensors():
    import torch

    value = to_plain({"a": torch.tensor([[1, 2]]), "b": np.bool_(True), "c": np.int64(3), "d": np.array(2.5)})
    assert value == {"a": [[1, 2]], "b": True, "c": 3, "d": 2.5} and type(value["c"]) is int
    with pytest.raises(InputError, match="holds nan"):
        to_plain(np.array([1.0, np.nan]))


# ----------------------------------------------------------------------------------------------------------- damage


_TRICKY = st.sampled_from(['","sha256":{', '"payload":1,', "\\", '"', "é", "\ud800", ",\"provenance\":{}"]) | st.text(max_size=5)


@given(
    st.recursive(st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TRICKY,
                 lambda v: st.lists(v, max_size=3) | st.dictionaries(_TRICKY, v, max_size=3), max_leaves=8),
    st.dictionaries(_TRICKY, _TRICKY, max_size=2),
)  # fmt: skip
def test_checksums_from_the_text_are_those_of_the_content(payload, config):
    content = {"format": 1, "name": "n", "config": config, "inputs": [], "provenance": {"device": "d"}, "payload": payload}
    sums = records.checksums(content)
    text = records.canonical({**content, "sha256": sums})
    assert records._checksums_of(text, content, sums) == sums
    spaced = json.dumps({**content, "sha256": sums}).encode()  # not the text we write: the content is written again
    assert records._checksums_of(spaced, content, sums) is None


def test_every_altered_byte_is_noticed(tmp_path):
    get_or_run("n", {"x": 1}, lambda: {"tokens": [1, 2, 3]}, store=tmp_path)
    path = only_file(tmp_path)
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        with pytest.raises(RecordError):
            read_record(path)
    for damaged in (good[:-1], good[: len(good) // 2], b"", good + b"\0", good + good):
        path.write_bytes(damaged)
        with pytest.raises(RecordError):
            read_record(path)
    path.write_bytes(good)
    assert read_record(path)["payload"] == {"tokens": [1, 2, 3]}


def test_the_error_names_the_file_and_the_cure(tmp_path):
    get_or_run("n", {}, lambda: 1, store=tmp_path)
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RecordError, match=rf"{re.escape(str(path))} was altered .*git checkout.* or delete it"):
        get_or_run("n", {}, Counted(1), store=tmp_path)
    path.unlink()
    assert get_or_run("n", {}, Counted(2), store=tmp_path)["payload"] == 2


@pytest.mark.parametrize("field", ["payload", "config", "provenance", "inputs", "name"])
def test_a_field_rewritten_by_hand_is_noticed(tmp_path, field):
    get_or_run("n", {"x": 1}, lambda: [1, 2], store=tmp_path)
    path = only_file(tmp_path)
    content = json.loads(gzip.decompress(path.read_bytes()))
    content[field] = [7] if field in ("payload", "inputs") else "other" if field == "name" else {"x": 2}
    path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))
    with pytest.raises(RecordError):
        read_record(path)


def test_a_renamed_record_is_noticed(tmp_path):
    get_or_run("n", {"x": 1}, lambda: 1, store=tmp_path)
    other = Store(tmp_path).path("n", record_key("n", {"x": 2}))
    only_file(tmp_path).rename(other)
    with pytest.raises(RecordError, match="its content belongs to"):
        get_or_run("n", {"x": 2}, Counted(1), store=tmp_path)


# ------------------------------------------------------------------------------------------------------------ chain


def test_store_chain_reads_committed_and_writes_elsewhere(tmp_path):
    committed = tmp_path / "committed"
    get_or_run("n", {"x": 1}, lambda: "committed", store=committed)
    before = only_file(committed).read_bytes()
    chain = Store(tmp_path / "build", read=[committed])
    fn = Counted("new")
    assert get_or_run("n", {"x": 1}, fn, store=chain)["payload"] == "committed" and not fn.calls
    assert get_or_run("n", {"x": 2}, fn, store=chain)["payload"] == "new"
    assert only_file(committed).read_bytes() == before and only_file(tmp_path / "build").parent.name == "n"
    assert sorted(r["payload"] for r in chain.records("n")) == ["committed", "new"]
    frozen = Store(tmp_path / "build", read=[committed], frozen=True)
    assert get_or_run("n", {"x": 2}, fn, store=frozen)["payload"] == "new"
    with pytest.raises(ResourceError, match="only reads"):
        get_or_run("n", {"x": 3}, fn, store=frozen)
    assert len(fn.calls) == 1
    with pytest.raises(InputError, match="both written to and only read"):
        Store(committed, read=[committed])


def test_fresh_store_never_reads_committed_records(tmp_path, monkeypatch):
    monkeypatch.setenv("DYRATE_HOME", str(tmp_path))
    (tmp_path / "data" / "paper").mkdir(parents=True)  # which makes it a checkout
    get_or_run("n", {}, lambda: "committed", store=tmp_path / "data" / "results")
    fn = Counted("fresh")
    assert get_or_run("n", {}, fn, store=Store.committed())["payload"] == "committed" and not fn.calls
    assert get_or_run("n", {}, fn, store=Store.fresh())["payload"] == "fresh"
    assert get_or_run("n", {}, fn, store=Store.fresh())["payload"] == "fresh" and len(fn.calls) == 1
    assert get_or_run("n", {}, fn, store=Store.committed())["payload"] == "committed"
    with pytest.raises(InputError, match="inside the committed records"):
        Store.fresh(tmp_path / "data" / "results")


# -------------------------------------------------------------------------------------------------------- run_items

ITEMS = [f"item-{i:02d}" for i in range(10)]


def test_items_in_batches_with_results_in_order(tmp_path):
    fn = Counted()
    record = run_items("n", {"x": 1}, ITEMS, fn, store=tmp_path, batch_size=4, progress=False)
    assert [len(batch) for batch in fn.calls] == [4, 4, 2]
    assert record["payload"] == {"ids": ITEMS, "results": [{"id": i, "n": 7} for i in ITEMS]}
    again = run_items("n", {"x": 1}, ITEMS, fn, store=tmp_path, batch_size=3, progress=False)
    assert again == record and len(fn.calls) == 3
    assert only_file(tmp_path).suffix == ".gz"  # the batches' own files are gone
    other = run_items("n", {"x": 1}, ITEMS[:5], fn, store=tmp_path, progress=False)
    assert other["payload"]["ids"] == ITEMS[:5]


def test_items_need_ids_of_their_own(tmp_path):
    for items, ids in (([1, 2], None), (["a", "a"], None), ([1, 2], ["a"]), ([], None), ([1, 2], [1, 2])):
        with pytest.raises(InputError, match="id"):
            run_items("n", {}, items, Counted(), store=tmp_path, ids=ids)
    with pytest.raises(InputError, match="batch_size"):
        run_items("n", {}, ITEMS, Counted(), store=tmp_path, batch_size=0)
    with pytest.raises(InputError, match="gave 1 results for 4 items"):
        run_items("n", {}, ITEMS, lambda batch: [0], store=tmp_path, batch_size=4, progress=False)


@pytest.mark.parametrize("batch_size", [4, 3])
def test_resume_after_a_failure_with_any_batch_size(tmp_path, batch_size, capfd):
    with pytest.raises(RuntimeError):
        run_items("n", {}, ITEMS, Counted(fails_at=2), store=tmp_path, batch_size=4, progress=False)
    fn = Counted()
    record = run_items("n", {}, ITEMS, fn, store=tmp_path, batch_size=batch_size)
    assert [item for batch in fn.calls for item in batch] == ITEMS[8:]
    assert record["payload"]["results"] == [{"id": i, "n": 7} for i in ITEMS]
    assert "10/10" in capfd.readouterr().err


def test_a_damaged_batch_is_noticed(tmp_path):
    with pytest.raises(RuntimeError):
        run_items("n", {}, ITEMS, Counted(fails_at=1), store=tmp_path, batch_size=4, progress=False)
    part = only_file(tmp_path)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(RecordError, match="delete it"):
        run_items("n", {}, ITEMS, Counted(), store=tmp_path, batch_size=4, progress=False)


def test_seconds_add_up_and_all_devices_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "provenance", lambda seconds, about: {"device": "GPU", "seconds": 2.0})
    with pytest.raises(RuntimeError):
        run_items("n", {}, ITEMS, Counted(fails_at=1), store=tmp_path, batch_size=5, progress=False)
    monkeypatch.setattr(store, "provenance", lambda seconds, about: {"device": "CPU", "seconds": 1.0})
    made_by = run_items("n", {}, ITEMS, Counted(), store=tmp_path, batch_size=5, progress=False)["provenance"]
    assert made_by == {"device": "GPU + CPU", "seconds": 3.0}


SLOW_RUN = """
import sys, time
from dyrate_lib.store import run_items

def slow(batch):
    time.sleep(0.1)
    return [len(item) for item in batch]

run_items("n", {}, [f"item-{i:02d}" for i in range(60)], slow, store=sys.argv[1], batch_size=2)
"""


def test_a_kill_loses_one_batch_at_most(tmp_path):
    command = [sys.executable, "-c", SLOW_RUN, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("*.json.gz"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list(tmp_path.rglob("*.json.gz")))
    assert 3 <= done < 30
    fn = Counted()
    items = [f"item-{i:02d}" for i in range(60)]
    record = run_items("n", {}, items, fn, store=tmp_path, batch_size=2, progress=False)
    assert [item for batch in fn.calls for item in batch] == items[2 * done :]
    assert record["payload"]["results"][: 2 * done] == [7] * 2 * done and len(record["payload"]["results"]) == 60


# -------------------------------------------------------------------------------------------------------- full disk


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace", "fdopen"])
def test_full_disk_loses_nothing(tmp_path, monkeypatch, call):
    get_or_run("n", {"x": 1}, lambda: "old", store=tmp_path)
    fn = Counted("new")
    with monkeypatch.context() as patched:
        patched.setattr(records.os, call, no_room)
        with pytest.raises(ResourceError, match=r"disk is full: .* make room and run again"):
            get_or_run("n", {"x": 2}, fn, store=tmp_path)
    assert only_file(tmp_path / "n")  # the old record alone, nothing half written
    assert get_or_run("n", {"x": 1}, fn, store=tmp_path)["payload"] == "old"
    assert get_or_run("n", {"x": 2}, fn, store=tmp_path)["payload"] == "new"
    assert len(fn.calls) == 1  # the result was kept in memory and only written


def test_full_disk_in_the_middle_of_items(tmp_path, monkeypatch):
    real, written = os.fsync, []

    def two_writes(handle):
        if len(written) == 2:
            no_room()
        written.append(handle)
        real(handle)

    with monkeypatch.context() as patched:
        patched.setattr(records.os, "fsync", two_writes)
        with pytest.raises(ResourceError, match="disk is full"):
            run_items("n", {}, ITEMS, Counted(), store=tmp_path, batch_size=3, progress=False)
    fn = Counted()
    run_items("n", {}, ITEMS, fn, store=tmp_path, batch_size=3, progress=False)
    assert [item for batch in fn.calls for item in batch] == ITEMS[6:]


FULL_DISK = """
import json, os, sys
from pathlib import Path
import numpy as np
from dyrate_lib.errors import ResourceError
from dyrate_lib.store import run_items

disk, calls, errors = Path(sys.argv[1]), [], []
noise = np.random.default_rng(0).integers(0, 2**31, 4000)  # more than 16 KB, hard to compress

def work(batch):
    calls.append(batch[0])
    return [noise]

(disk / "other").write_bytes(os.urandom(20_000))
for attempt in range(2):
    try:
        run_items("n", {}, ["a", "b", "c", "d", "e", "f"], work, store=disk / "s", batch_size=1, progress=False)
    except ResourceError as error:
        errors.append(str(error))
    (disk / "other").unlink(missing_ok=True)
    calls.append("--")
parts = [path.name for path in sorted(disk.rglob("*")) if path.is_file()]
print(json.dumps([calls, errors, parts]))
"""


def test_a_disk_that_is_really_full(tmp_path):
    """On a file system of 80 KiB, mounted for the test's process alone."""
    inside = 'mount -t tmpfs -o size=80k tmpfs "$0" && exec "$1" -c "$2" "$0"'
    command = ["unshare", "--mount", "sh", "-c", inside, str(tmp_path), sys.executable, FULL_DISK]
    if not shutil.which("unshare") or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a small file system of its own needs root and unshare")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    if "mount:" in done.stderr:
        pytest.skip("this machine does not let root mount a tmpfs")
    calls, errors, parts = json.loads(done.stdout)
    first, second = calls[: calls.index("--")], calls[calls.index("--") + 1 : -1]
    assert len(errors) == 2 and all("the disk is full" in error for error in errors)
    assert len(first) >= 2 and second[0] == first[-1]  # only the batch that could not be written is done again
    assert len(second) >= 2  # and with the room that was made the run got further
    assert len(parts) == len(first) + len(second) - 2 and all(name.endswith(".json.gz") for name in parts)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    fn = Counted(1)
    with pytest.raises(ResourceError, match="cannot write a record in"):
        get_or_run("n", {}, fn, store=tmp_path / "file")
    assert not fn.calls


# ----------------------------------------------------------------------------------------------------------- writers


def _write_often(folder, start, failures):
    start.wait()
    try:
        for _ in range(20):
            for path in Path(folder).glob("n/*.json.gz"):
                if read_record(path)["payload"]["ids"] != ITEMS:
                    failures.put("wrong payload")
            run_items("n", {}, ITEMS, lambda batch: [len(i) for i in batch], store=folder, batch_size=2, progress=False)
            for path in Path(folder).glob("n/*.json.gz"):
                path.unlink(missing_ok=True)
    except Exception as error:
        failures.put(repr(error))


def test_writers_of_one_record_do_not_disturb_each_other(tmp_path):
    """Four processes make, read and remove the same record again and again."""
    context = multiprocessing.get_context("fork")
    start, failures = context.Event(), context.SimpleQueue()
    workers = [context.Process(target=_write_often, args=(tmp_path, start, failures)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    found = []
    while not failures.empty():
        found.append(failures.get())
    # removing records under a reader is this test's doing: a reader may then say that the file is gone, nothing else
    assert [failure for failure in found if "No such file" not in failure] == []


def test_write_record_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "n" / f"{record_key('n', {})}.json.gz"
    record = get_or_run("n", {}, lambda: 1, store=tmp_path)
    monkeypatch.setattr(records.os, "replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_record(path, {**record, "payload": 2})
    assert only_file(tmp_path) == path and read_record(path)["payload"] == 1


def test_litter_of_a_killed_writer_is_removed_when_old(tmp_path):
    folder = tmp_path / "n"
    folder.mkdir()
    old, recent = folder / f"{records.TEMPORARY}old", folder / f"{records.TEMPORARY}recent"
    for path in (old, recent):
        path.write_bytes(b"part")
    os.utime(old, (1, 1))
    get_or_run("n", {}, lambda: 1, store=tmp_path)
    assert not old.exists() and recent.exists()


def test_files_of_other_writers_that_vanish_while_they_are_looked_at_are_no_error(tmp_path, monkeypatch):
    """Another process puts its file in place, or removes a finished record's batches, between the listing and the look."""
    folder = tmp_path / "n"
    folder.mkdir()
    real = Path.glob

    def with_a_stranger(self, pattern):
        return [*real(self, pattern), self / f"{records.TEMPORARY}gone"]

    monkeypatch.setattr(Path, "glob", with_a_stranger)
    assert get_or_run("n", {}, lambda: 1, store=tmp_path)["payload"] == 1
    records.remove_litter(folder, f"{records.TEMPORARY}*")

    def of_a_removed_folder(self, pattern):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "glob", of_a_removed_folder)
    assert Parts(tmp_path / "n" / "0.parts", "0", 3).results == {}


def test_many_writers_of_one_folder_do_not_stumble_over_each_other(tmp_path):
    """Eight threads make 25 records each in one folder: each looks for litter while the others' files come and go."""

    def work(number):
        return [get_or_run("n", {"of": number, "i": i}, lambda i=i: i, store=tmp_path)["payload"] for i in range(25)]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(work, range(8))) == [list(range(25))] * 8
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 200
