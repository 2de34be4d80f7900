"""Kills, full disks and a second run at once, done to `soak_study` in processes of its own; prints what was found as JSON.

    python -m tests.soak_kills FOLDER KILLS SEED

One process loads everything and makes the study undisturbed; the studies that are killed are its children, so that every
kill meets the work and not an import.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a child of a process with threads would wait for them for ever

import errno
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyrate_lib.errors import ResourceError

from . import soak_study

FULL = 28  # exit status of a child that met a full disk and said so


def child(out: Path, before: Callable[[], Any] = lambda: None) -> int:
    """The process id of a study at work on a folder, after `before`."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        before()
        soak_study.compute(soak_study.open_small(out))
        status = 0
    except ResourceError as error:
        status = FULL if "disk is full" in str(error) or "No space left" in str(error) else 1
        if status == 1:
            print(error, file=sys.stderr, flush=True)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def ended(process: int) -> int:
    """The exit status; -9 for one that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at_random(folder: Path, good: dict[str, str], kills: int, seconds: float, seed: int) -> dict[str, Any]:
    """SIGKILL at `kills` random moments; each study is resumed until it is whole, then another is begun."""
    moments = random.Random(seed)
    found: dict[str, Any] = {"kills": 0, "studies": 0, "differ": [], "resumed_with": []}
    while found["kills"] < kills:
        out = folder / f"killed-{found['studies']}"
        whole = False
        while not whole:
            process, deadline = child(out), time.monotonic() + moments.uniform(0, 0.8 * seconds)
            if found["kills"] >= kills:
                deadline = float("inf")
            while not whole and time.monotonic() < deadline:
                done, status = os.waitpid(process, os.WNOHANG)
                whole = done != 0
                if whole and status:
                    raise SystemExit(f"a resumed study failed with status {status}")
                time.sleep(0.005)
            if not whole:
                os.kill(process, signal.SIGKILL)
                status = ended(process)
                whole = status == 0  # on a busy machine it may have come to its end since it was last asked
                if not whole:
                    assert status == -signal.SIGKILL, status
                    found["kills"] += 1
                    found["resumed_with"].append(len(list(out.rglob("*.json.gz"))))
        found["differ"] += differences(out, good)
        found["studies"] += 1
        shutil.rmtree(out)
    return found


def die_at_call(n: int) -> Callable[[], None]:
    """Makes the n-th of all calls that flush, rename or remove a file the process's last, just before it is made."""

    def patch() -> None:
        calls = [0]
        for name in ("fsync", "replace", "unlink"):
            real = getattr(os, name)

            def counted(*args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
                calls[0] += 1
                if calls[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(os, name, counted)

    return patch


def kill_at_every_write(folder: Path, good: dict[str, str], limit: int) -> dict[str, Any]:
    """A study that dies just before its n-th file operation, resumed, n = 1, 2, 3, 4 in turn: at most `limit` deaths."""
    out, deaths = folder / "writes", 0
    while (
        status := ended(child(out, die_at_call(1 + deaths % 4) if deaths < limit else lambda: None))
    ) == -signal.SIGKILL:
        deaths += 1
    found = {"deaths": deaths, "status": status, "differ": differences(out, good)}
    shutil.rmtree(out)
    return found


def no_room_after(n: int) -> Callable[[], None]:
    """Lets n files be flushed; then the disk is full."""

    def patch() -> None:
        calls, real = [0], os.fsync

        def full(handle: int) -> None:
            calls[0] += 1
            if calls[0] > n:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        os.fsync = full

    return patch


def fill_the_disk(folder: Path, good: dict[str, str], times: int) -> dict[str, Any]:
    """The disk is full after 0, 1, .. flushes, then there is room again."""
    out, statuses = folder / "full", []
    for n in range(times):
        statuses.append(ended(child(out, no_room_after(n))))
    last = ended(child(out))
    found = {"statuses": statuses, "last": last, "differ": differences(out, good)}
    shutil.rmtree(out)
    return found


def two_at_once(folder: Path, good: dict[str, str]) -> dict[str, Any]:
    """Two studies on one folder, and a third that is killed beside them."""
    out = folder / "two"
    first, second, third = child(out), child(out), child(out)
    time.sleep(1.0)
    os.kill(third, signal.SIGKILL)
    found = {"statuses": [ended(first), ended(second)], "third": ended(third), "differ": differences(out, good)}
    shutil.rmtree(out)
    return found


def differences(out: Path, good: dict[str, str]) -> list[str]:
    """Files that are not byte for byte those of the undisturbed study: altered, missing, or left over."""
    here = soak_study.files(out)
    return sorted(name for name in here.keys() | good.keys() if here.get(name) != good.get(name))


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    soak_study.stop_the_clock()
    alone = folder / "alone"
    soak_study.compute(soak_study.open_small(folder / "warm"))
    start = time.monotonic()
    assert ended(child(alone)) == 0
    seconds, good = time.monotonic() - start, soak_study.files(alone)
    return {
        "seconds": round(seconds, 2), "files": len(good), "again": differences(folder / "warm", good),
        "killed": kill_at_random(folder, good, kills, seconds, seed),
        "writes": kill_at_every_write(folder, good, 3 * kills),
        "full": fill_the_disk(folder, good, min(kills, 8)),
        "two": two_at_once(folder, good),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
