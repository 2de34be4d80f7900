"""No input gives anything but a result or one of our own errors: every reader, by Hypothesis and, where it is installed, atheris.

`make soak` (DYRATE_SOAK=full) runs both for longer.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyrate_lib import chat_prompt, prepare_inputs
from dyrate_lib.__main__ import main
from dyrate_lib.errors import DyRateError

from . import fuzz_targets

FULL = os.environ.get("DYRATE_SOAK") == "full"
ROOT = Path(__file__).parents[1]
LIMITS = dict(deadline=None, suppress_health_check=list(HealthCheck))
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow: make soak brings it")
TARGETS = [pytest.param(name, marks=needs_pyarrow if name == "parquet" else ()) for name in fuzz_targets.TARGETS]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([2**70, "\ud800", "\0", "../a", ""])
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4), max_leaves=10
)


def places(value, path=()):
    """Every place in a JSON value, as the keys that lead to it."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def put(value, path, new, how):
    """The value with a place replaced, taken out, or doubled."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and how == "out":
        del copy[path[0]]
    elif len(path) == 1 and how == "double" and isinstance(copy, list):
        copy.append(copy[path[0]])
    else:
        copy[path[0]] = put(copy[path[0]], path[1:], new, how)
    return copy


@st.composite
def damaged(draw, name):
    """A sound input of a target with bytes altered or, where it is JSON, with values replaced, missing or doubled; or noise."""
    content = draw(st.sampled_from(fuzz_targets.seeds(name)))
    how = draw(st.sampled_from(("bytes", "json", "noise")))
    if how == "noise":
        return draw(st.binary(max_size=200))
    try:
        document = json.loads(content) if how == "json" else None
    except ValueError:
        document = None
    if document is None:
        altered = bytearray(content)
        for _ in range(draw(st.integers(1, 6))):
            if altered:
                at = draw(st.integers(0, len(altered) - 1))
                altered[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
        return bytes(altered[: draw(st.integers(0, len(altered)))] if draw(st.booleans()) else altered)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(document))))
        document = put(document, place, draw(values), draw(st.sampled_from(("in", "out", "double"))))
    return json.dumps(document).encode()


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_gives_a_result_or_our_own_error(name):
    @settings(max_examples=3000 if FULL else 150, **LIMITS)
    @given(data=damaged(name))
    def run(data):
        fuzz_targets.TARGETS[name](data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_odd_documents_of_every_kind(name):
    for data in (
        b"",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
        b"1e999",
        b"NaN",
        b"{}",
        b"[]",
        b"null",
        b'"\\ud800"',
        b"(" * 5000,
        b"-" * 5000,
        b"{[]: 1}",
        b"1 if 1 else 2",
        b"[0] * 10**9",
        b"'a' 'b'",
        b"\xc3",
        b"a = (\n",
        b"{" * 300,
        b'{"images": [], "annotations": []}',
        json.dumps(
            {"cells": [{"cell_type": "code", "source": ["a = ("], "metadata": {"tags": ["parameters"]}}]}
        ).encode(),
        b'{"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}}]}',
        b'{"cells": [{"cell_type": "code", "source": "", "metadata": {"tags": true}}]}',
        b'{"cells": [{"cell_type": "code", "source": "", "metadata": {"tags": "parameters"}}]}',
        b'{"cells": [1]}',
        b'{"cells": {"a": 1}}',
    ):
        fuzz_targets.TARGETS[name](data)


PROMPTS = dict(
    text=st.text(st.characters(), max_size=80)
    | st.sampled_from(["<image>" * 3, "</s>", "<pad><unk>", "\ud800", "\0", "a" * 5000, "🙂" * 50]),
    pictures=st.integers(0, 2),
    templated=st.booleans(),
)


def test_any_prompt_is_read_or_refused(tiny):
    from PIL import Image

    token = tiny[1].tokenizer.convert_tokens_to_ids("<image>")

    @settings(max_examples=400 if FULL else 60, **LIMITS)
    @given(**PROMPTS)
    def run(text, pictures, templated):
        prompt = chat_prompt(text, pictures) if templated else text
        try:
            inputs = prepare_inputs(tiny[1], [[Image.new("RGB", (8, 8))] * pictures], [prompt])
        except DyRateError as error:
            assert str(error)
            return
        assert int((inputs["input_ids"] == token).sum()) == 36 * pictures

    run()


words = st.text(max_size=12) | st.sampled_from(
    [
        "--scale",
        "smoke",
        "huge",
        "--out",
        "/proc/none",
        "--model",
        "",
        "--jobs",
        "0",
        "-p",
        "seed",
        "x",
        "--layer",
        "-1",
        "1e9",
        "--rate",
        "nan",
        "--json",
        "--predictor",
        "--device",
        "cuda:99",
        "tpu",
        "--flops",
        "--max-new-tokens",
        "0",
        "99",
        "3",
        "nosuch.ipynb",
        "\ud800",
        "--tables",
        "--write",
        "bash",
    ]
)
IMPOSSIBLE = {
    "reproduce": ["--data", "nosuch:/x"],
    "run": ["-p", "no_such_parameter", "1"],
    "caption": ["/no/such/picture.png"],
    "bench": ["--model", "/no/model"],
    "fetch": ["/no/such/archive"],
    "list": ["nosuch"],
    "scoreboard": ["--tables", "/no/such/folder"],
    "completion": ["nosuch"],
}


@settings(max_examples=1000 if FULL else 80, **LIMITS)
@given(command=st.sampled_from([*IMPOSSIBLE, "nosuch", ""]), rest=st.lists(words, max_size=5))
def test_any_command_line_ends_with_an_exit_code(command, rest):
    """With something in it that cannot be, so that no study begins; argparse's own refusals leave with 2 as well."""
    try:
        status = main([command, *rest, *IMPOSSIBLE.get(command, [])])
    except SystemExit as end:
        status = end.code
    assert status in (2, 0) and (
        status == 2 or any(word.startswith(("-h", "--h", "--version", "--ve")) for word in rest)
    )


def test_nothing_reads_pickles_or_runs_foreign_code():
    """By the sources: no reader that could run code, and every from_pretrained says that it must not."""
    for file in sorted((ROOT / "dyrate_lib").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for word in (
            "import pickle",
            "torch.load(",
            "torch.save(",
            "allow_pickle=True",
            "cloudpickle",
            "yaml.load(",
            "marshal",
            "read_pickle",
            "all_gather_object",
            "trust_remote_code=True",
            "broadcast_object",
            "shell=True",
        ):
            assert word not in text, f"{file.name}: {word}"
        assert "np.load(" not in text or "allow_pickle=False" in text, file.name


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_atheris(name):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: make soak brings it")
    runs, seconds = (20_000, 120) if FULL else (300, 20)
    command = [
        sys.executable,
        "-m",
        "tests.fuzz_targets",
        name,
        f"-runs={runs}",
        f"-max_total_time={seconds}",
        "-seed=1",
        "-timeout=60",
        "-max_len=4096",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0 and "Done " in done.stderr, (done.stdout + done.stderr)[-3000:]
