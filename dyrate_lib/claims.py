"""Claims on work: which of several processes makes a record, so that two at once do not make it twice.

A claim saves work, it does not keep records sound: those are written in one step whether or not anybody claimed them. So
where a file system knows no locks, is full, or the folder goes away under a claim, the work is simply done.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import filelock

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between two looks at a claim that another process holds


@contextlib.contextmanager
def claimed(file: Path, what: str, wait: bool = True) -> Iterator[bool]:
    """Holds the claim that `file` stands for, in a folder that exists; the system ends it with the process, a killed one too.

    Args:
        file: an empty file, made for the claim and taken away after it.
        what: named in the log while another process is waited for.
        wait: until another process lets go; False yields False at once where another holds it.
    """
    lock = filelock.FileLock(file, timeout=0, poll_interval=POLL, thread_local=False, fallback_to_soft=False)
    held = _acquired(lock, what, wait)
    try:
        yield held is not False
    finally:
        if held:
            # Taken away while held: who waits for this very file sees that it is gone and asks for a new one.
            with contextlib.suppress(OSError):
                file.unlink()
            lock.release()


def _acquired(lock: filelock.BaseFileLock, what: str, wait: bool) -> bool | None:
    """True; False where another process holds it; None where there can be no lock."""
    try:
        try:
            lock.acquire()
        except filelock.Timeout:
            if not wait:
                return False
            log.info("another process is at work on %s: waiting for it", what)
            lock.acquire(timeout=-1)
    except (OSError, NotImplementedError) as error:
        log.debug("no claim on %s: %s", what, error)
        return None
    return True
