"""Triton's kernels without a GPU: `tests/interpreted`, in processes of their own: Triton interprets everything or nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch

from dyrate_lib import paths

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_engine_gpu.py runs the kernels as they are"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton (Linux)"),
]


def interpreted(module, marks):
    """What pytest says of a module of tests/interpreted, whose tests must all pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/interpreted/{module}.py", "-m", marks],
        cwd=paths.root(), env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=560,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0 and re.search(r"\d+ passed", str(last)), done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in str(last)
    return str(last)


def test_kernels():
    assert int(re.search(r"(\d+) passed", interpreted("kernels", "not slow"))[1]) > 50


def test_loop():
    interpreted("loop", "not slow")


@pytest.mark.slow
def test_loop_of_more_methods():
    interpreted("loop", "slow")


def test_tuning_without_a_gpu_says_so(capsys):
    from dyrate_lib.engine.tune import main

    assert main([]) == 2
    assert "CUDA device" in capsys.readouterr().err
