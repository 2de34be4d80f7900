"""Where a record comes from: machine, versions, date, source revision. For people; no part of a record's key."""

from __future__ import annotations

import datetime
import functools
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from . import paths


def provenance(seconds: float, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What made a result, as plain JSON values.

    Keys: device (name of the GPU, else of the CPU), python, torch, transformers (None where not installed), date (UTC,
    to the second), seconds of work, commit (None outside a git checkout, "-dirty" appended when files were changed),
    and whatever `about` adds or overrides, e.g. {"dtype": "bfloat16"}.
    """
    return {
        "device": device_name(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(seconds, 3),
        "commit": git_commit(),
        **(about or {}),
    }


def device_name(device: str | None = None) -> str:
    """The accelerator's name, or the processor's. `device` "cpu" asks for the processor even beside a GPU."""
    if device != "cpu":
        torch = sys.modules.get("torch")  # a result made without torch was not made on its GPU
        if torch is not None and torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return _processor()


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def git_commit() -> str | None:
    """The checkout's revision, or None where there is no git or no commit."""
    command = ["git", "-C", str(paths.root()), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
