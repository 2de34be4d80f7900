"""Prompts that end with their picture: the reply starts from the last token's row, whether that token is kept or not."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyrate_lib import (
    VTW,
    DepthPrune,
    DyRate,
    FastV,
    InputError,
    RandomPrune,
    RatePath,
    RatePredictor,
    attention_shares,
    generate,
)
from dyrate_lib.engine import eager_engine
from dyrate_lib.errors import Unsupported
from dyrate_lib.models import Adapter
from dyrate_lib.training import masked_logits, read_prompt_and_response
from tests import contract
from tests.contract import IMAGE, Shape, one_row, random_batch, small_model
from tests.engine_cases import METHODS as ENGINE_METHODS
from tests.engine_cases import check_same
from tests.test_generation import METHODS, TOLERANCE, responses

GRID, N = 4, 16
ROWS = ((2, 0, True), (0, 3, True), (1, 0, True), (4, 2, False))  # words before the picture, behind it, whether there is one
PRUNING = {name: method for name, method in METHODS.items() if name != "none"}
by_method = pytest.mark.parametrize("method", PRUNING.values(), ids=PRUNING.keys())


@pytest.fixture(scope="module")
def model():
    return small_model(Shape(layers=8, heads=4, kv_heads=2, grid=GRID))


@pytest.fixture(scope="module")
def batch():
    return random_batch(GRID, ROWS, seed=3)


@pytest.fixture(scope="module")
def picture_alone():
    """A prompt of image tokens and nothing else."""
    ids = torch.full((1, N), IMAGE)
    return {**one_row(random_batch(GRID, ((0, 0, True),), seed=5), 0), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forced_pass(model, inputs, reply, layer):
    adapter = Adapter(model)
    return adapter, read_prompt_and_response(adapter, adapter.embed(inputs), reply, layer)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_masked_equals_discarded(model, batch, picture_alone, data):
    layer, reversible = data.draw(st.integers(1, 7)), data.draw(st.booleans())
    rate = st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0])
    path = data.draw(st.lists(rate, min_size=5, max_size=5))
    for inputs in (batch, picture_alone):
        reply = responses(len(inputs["input_ids"]), 5)
        out = generate(model, inputs, RatePath(layer, path, reversible=reversible), forced_tokens=reply, return_logits=True)
        adapter, forced = forced_pass(model, inputs, reply, layer)
        keep = (torch.arange(N) < out.trace.kept[..., None]).float()
        assert (masked_logits(adapter, forced, keep) - out.logits).abs().max() < TOLERANCE
        assert (forced.shares - out.trace.attention).abs().max() < 1e-5


KEEP_ALL = [
    FastV(2, 0.0), FastV(2, 0.0, refresh=True), RatePath(3, (0.0,)), DyRate(RatePredictor(4), 3), RandomPrune(2, 0.0),
    DepthPrune({3: 0.0}), DyRate(RatePredictor(4), 3, rank="step", reversible=True),
]  # fmt: skip


@pytest.mark.parametrize("method", KEEP_ALL, ids=str)
def test_keeping_all_is_the_unpruned_model(model, batch, picture_alone, method):
    for inputs in (batch, picture_alone):
        reply = responses(len(inputs["input_ids"]), 4)
        plain = generate(model, inputs, None, forced_tokens=reply, return_logits=True)
        pruned = generate(model, inputs, method, forced_tokens=reply, return_logits=True)
        assert (plain.logits - pruned.logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@by_method
def test_stock_generate_under_the_context_equals_our_loop(model, batch, picture_alone, method, attention):
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    for inputs in (batch, picture_alone):
        with method(model) as pruning:
            stock = model.generate(
                **inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        out = generate(model, inputs, method, max_new_tokens=5, eos_token_id=[], return_logits=True)
        assert (torch.stack(stock.logits, 1) - out.logits).abs().max() < TOLERANCE
        assert torch.equal(stock.sequences, out.sequences) and torch.equal(torch.stack(pruning.kept, 1), out.trace.kept)


@by_method
def test_a_batch_equals_each_alone(model, batch, method):
    reply = responses(4, 5)
    together = generate(model, batch, method, forced_tokens=reply, return_logits=True)
    for row in range(4):
        single = generate(model, one_row(batch, row), method, forced_tokens=reply[row : row + 1], return_logits=True)
        assert (together.logits[row] - single.logits[0]).abs().max() < TOLERANCE
        assert together.trace.kept[row].tolist() == single.trace.kept[0].tolist()


def test_without_any_image_token_the_last_row_still_replies(model, picture_alone):
    """VTW takes every image token away; of a picture alone there is then one row, which reads itself."""
    out = generate(model, picture_alone, VTW(4), max_new_tokens=3, eos_token_id=[])
    assert out.trace.kept.tolist() == [[0, 0, 0]]
    assert attention_shares(model, picture_alone, out.new_tokens).shape[0] == 1


def test_beams_carry_the_row_along(model, batch):
    """Under beams a sample's rows change places; scores recomputed along the chosen sequences must be those reported."""
    with FastV(2, 0.75)(model):
        found = model.generate(
            **batch, max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=None, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    logits = contract.replay(model, batch, FastV(2, 0.75), found.sequences)
    told = logits.log_softmax(-1).gather(-1, found.sequences[:, -4:, None])[..., 0].sum(-1)
    assert (told / 4 - found.sequences_scores).abs().max() < 1e-3


def test_flash_attention_refuses_what_it_cannot_mask(model, batch, monkeypatch):
    model = copy.deepcopy(model)
    with FastV(2, 0.5)(model) as pruning:
        monkeypatch.setattr(pruning, "_implementation", "flash")
        with pytest.raises(InputError, match="ends with its picture.*sdpa"):
            model.generate(**batch, max_new_tokens=2)


@pytest.mark.parametrize("name", ["none", "fastv", "vtw", "dyrate", "sparsevlm", "st3", "visionzip"])
def test_the_graph_engine_runs_it_or_says_that_it_does_not(model, batch, name):
    method, engine = ENGINE_METHODS[name], eager_engine(model)
    asked = dict(max_new_tokens=5, eos_token_id=[], return_logits=True)
    if name in ("fastv", "vtw", "dyrate"):
        with pytest.raises(Unsupported, match="ends with its picture.*reference"):
            generate(model, batch, method, engine=engine, **asked)
        method, rest = ENGINE_METHODS[name], random_batch(GRID, ((2, 1, True), (0, 3, True)), seed=3)
        check_same(generate(model, rest, method, engine=engine, **asked), generate(model, rest, method, **asked))
    else:
        check_same(generate(model, batch, method, engine=engine, **asked), generate(model, batch, method, **asked))
