"""Shared fixtures: the authors' reference figures, a tiny random LLaVA, and a batch of unequal prompts."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

# The same examples in every run, so that a failure is a change's doing; `make soak` tries others each time.
if importlib.util.find_spec("hypothesis"):  # the GPU's tests do without
    from hypothesis import settings

    settings.register_profile("same", derandomize=True)
    settings.load_profile("default" if os.environ.get("DYRATE_SOAK") == "full" else "same")

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = (
    "Describe.",
    "What is there to be seen in this picture, please tell me?",
    "Provide a one-sentence caption for the provided image.",
    "How many circles are there? Answer the question using a single word or phrase.",
)


@pytest.fixture(scope="session")
def golden_model():
    """The tiny random LLaVA whose weights lie beside the reference figures; float32."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(
        GOLDEN / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def golden():
    """`golden("fastv")`: the reference figures of one file."""
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_inputs(golden):
    """`golden_inputs(i)`: inputs of sample i."""
    stored = golden("inputs")
    return lambda i: {key: stored[f"sample{i}.{key}"] for key in ("input_ids", "pixel_values")}


@pytest.fixture(scope="session")
def tiny():
    """`(model, processor)` of random:tiny: 8 layers, 4 heads, 36 image tokens, float32."""
    from dyrate_lib import load_vlm

    return load_vlm("random:tiny", device="cpu")


@pytest.fixture(autouse=True)
def no_engine_is_left(request):
    """What a test leaves with the shared model, another would find going: an engine is given back where it is of no use."""
    model = request.getfixturevalue("tiny")[0] if "tiny" in request.fixturenames else None
    yield
    if model is not None:
        from dyrate_lib.engine import release

        release(model)


@pytest.fixture(scope="session")
def pictures():
    """Four pictures of noise."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)) for _ in range(4)]


@pytest.fixture(scope="session")
def batch(tiny, pictures):
    """Four samples with prompts of different lengths, left-padded."""
    from dyrate_lib import chat_prompt, prepare_inputs

    return prepare_inputs(tiny[1], pictures, [chat_prompt(text) for text in PROMPTS])


@pytest.fixture(scope="session")
def alone(tiny, pictures):
    """`alone(b)`: sample b of `batch` by itself, without padding."""
    from dyrate_lib import chat_prompt, prepare_inputs

    return lambda b: prepare_inputs(tiny[1], [pictures[b]], [chat_prompt(PROMPTS[b])])


@pytest.fixture
def scores_without_java(monkeypatch):
    """A study's scores as a number made from the length of each reply."""
    from dyrate_lib.experiments.context import Study
    from dyrate_lib.metrics import CaptionScores

    def scores(self, record, role):
        values = np.array([10.0 + len(row["text"]) % 7 for row in record["payload"]])
        return CaptionScores(float(values.mean()), 1.0, 2.0, tuple(row["id"] for row in record["payload"]), values)

    monkeypatch.setattr(Study, "scores", scores)
