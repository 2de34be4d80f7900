"""The engine's bookkeeping, run eagerly by the twins: the same tokens and traces as the reference loop, in float32."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

from dyrate_lib import DepthPrune, DyRate, RatePath, generate
from dyrate_lib.engine import eager_engine
from dyrate_lib.engine.runner import Run
from tests.contract import lively_predictor, random_batch, small_model
from tests.engine_cases import METHODS, ROWS, SETTINGS, check_same, methods_and

STEPS = 12
BATCHES = {"ragged": (ROWS, 1), "single": (ROWS[1:2], 2)}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module", params=[False, True], ids=["exact", "buckets"])
def engine(model, request):
    made = eager_engine(model, buckets=request.param)
    yield made
    made.release()


@functools.cache
def batch_of(size):
    rows, seed = BATCHES[size]
    return random_batch(6, rows, seed=seed)


@pytest.fixture
def batch():
    return batch_of("ragged")


@functools.cache
def wanted(name, size, setting=None):
    """The reference's output, computed once for both kinds of engine."""
    kwargs = dict(max_new_tokens=20) | SETTINGS[setting] if setting else dict(max_new_tokens=STEPS, eos_token_id=[])
    return generate(small_model(), batch_of(size), METHODS[name], engine="reference", return_logits=True, **kwargs)


@pytest.mark.parametrize("name, size", methods_and(BATCHES))
def test_same_as_the_reference(model, engine, name, size):
    ours = generate(model, batch_of(size), METHODS[name], STEPS, engine=engine, eos_token_id=[], return_logits=True)
    check_same(ours, wanted(name, size))


@with_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_batches_and_rates(model, engine, data):
    """Any lengths, rows with and without a picture, rates from keeping all to keeping none, counts that differ by layer."""
    row = st.tuples(st.integers(0, 20), st.integers(1, 20), st.booleans())
    rows = data.draw(st.lists(row, min_size=1, max_size=5), label="rows")
    rate = st.sampled_from([0.0, 0.03, 0.3, 0.5, 0.55, 0.97, 1.0])
    layer = data.draw(st.integers(1, 7), label="layer")
    if data.draw(st.booleans(), label="by depth"):
        layers = sorted(data.draw(st.sets(st.integers(layer, 7), min_size=1, max_size=4), label="layers"))
        rates = sorted(data.draw(st.lists(rate, min_size=len(layers), max_size=len(layers)), label="rates"))
        method = DepthPrune(dict(zip(layers, rates, strict=True)))
    else:
        path = st.lists(rate, min_size=1, max_size=5)
        paths = data.draw(st.lists(path, min_size=len(rows), max_size=len(rows)), label="paths")
        method = RatePath(layer, paths, rank=data.draw(st.sampled_from(["prefill", "step"]), label="rank"))
    batch = random_batch(6, rows, seed=data.draw(st.integers(0, 99), label="seed"))
    kwargs = dict(max_new_tokens=5, eos_token_id=[], return_logits=True)
    check_same(
        generate(model, batch, method, engine=engine, **kwargs),
        generate(model, batch, method, engine="reference", **kwargs),
    )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["dyrate", "none", "fastv", "st3"])
def test_settings(model, engine, batch, setting, name):
    kwargs = dict(max_new_tokens=20, return_logits=True) | SETTINGS[setting]
    ours = generate(model, batch, METHODS[name], engine=engine, **kwargs)
    check_same(ours, wanted(name, "ragged", setting))
    if setting == "eos":
        assert int(ours.lengths.max()) < 20 and len(set(ours.lengths.tolist())) > 1
    if "sampl" in setting:
        other = generate(model, batch, METHODS[name], engine=engine, **(kwargs | {"seed": 77}))
        assert not torch.equal(other.new_tokens, ours.new_tokens)


def test_one_token(model, engine, batch):
    check_same(
        generate(model, batch, METHODS["dyrate"], 1, engine=engine),
        generate(model, batch, METHODS["dyrate"], 1, engine="reference"),
    )


def test_stopping_criteria_and_streamer(model, engine, batch):
    class Stop:
        def __call__(self, ids, scores, **kwargs):
            return ids[:, -1] % 3 == 0

    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.clone())

        def end(self):
            self.seen.append(None)

    outs, streams = [], []
    for one in ("reference", engine):
        streams.append(Streamer())
        kwargs = dict(stopping_criteria=Stop(), streamer=streams[-1], eos_token_id=[], engine=one)
        outs.append(generate(model, batch, METHODS["dyrate"], 20, **kwargs))
    check_same(outs[1], outs[0])
    assert 1 < int(outs[0].lengths.max()) < 20 and streams[0].seen.pop() is None and streams[1].seen.pop() is None
    assert len(streams[0].seen) == len(streams[1].seen) == outs[0].new_tokens.shape[1] + 1
    assert all(torch.equal(a, b) for a, b in zip(*(stream.seen for stream in streams), strict=True))


def test_methods_take_turns_in_the_same_buffers(model, engine, batch):
    single = random_batch(6, ROWS[3:], seed=9)
    for name in ("dyrate", "fastv", "dyrate", "vtw", "st3", "none", "dyrate"):
        for inputs in (batch, single):
            check_same(
                generate(model, inputs, METHODS[name], 5, engine=engine),
                generate(model, inputs, METHODS[name], 5, engine="reference"),
            )


def test_output_is_not_overwritten_by_the_next_run(model, engine, batch):
    first = generate(model, batch, METHODS["dyrate"], 6, engine=engine)
    kept, tokens = first.trace.kept.clone(), first.sequences.clone()
    generate(model, {**batch, "input_ids": batch["input_ids"].clone()}, METHODS["path"], 6, engine=engine)
    generate(model, batch, DyRate(lively_predictor(seed=8), 3), 6, engine=engine)
    assert torch.equal(first.trace.kept, kept) and torch.equal(first.sequences, tokens)


def test_plans_and_graphs_kept_are_few(model, batch, monkeypatch):
    """Many shapes in turn: the oldest plans go, and what is left still computes."""
    from dyrate_lib.engine import runner

    monkeypatch.setattr(runner, "PLANS", 2)
    engine = eager_engine(model)
    for steps in (3, 4, 5, 6, 3):
        for name in ("dyrate", "st3"):
            ours = generate(model, batch, METHODS[name], steps, engine=engine, eos_token_id=[])
            check_same(ours, generate(model, batch, METHODS[name], steps, engine="reference", eos_token_id=[]))
    assert len(engine.plans) == 2 and len(engine.held) <= 2
    engine.release()


# -- what must not be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dyrate", "depth", "st3"])
def test_caches_are_not_read_where_nothing_was_written(model, batch, name):
    engine = eager_engine(model, buckets=True)
    reference = generate(model, batch, METHODS[name], 8, engine="reference", eos_token_id=[])
    for _ in range(2):
        check_same(generate(model, batch, METHODS[name], 8, engine=engine, eos_token_id=[]), reference)
        for arena in (engine.low, engine.tail):
            if arena._block is not None:
                arena._block.fill_(torch.nan)
    engine.release()


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("name", ["dyrate", "path", "depth"])
def test_dropped_tokens_are_never_read(model, batch, name, buckets, monkeypatch):
    """Keys and values beyond every sample's count are spoilt after each pass: nothing changes."""
    engine, decode = eager_engine(model, buckets=buckets), Run.decode

    def spoil_and_decode(self):
        for at, (keys, values) in enumerate(self.state.tail):
            for row, n in enumerate(self.state.kept[self.plan.layer + at].tolist()):
                for cache in (keys, values):
                    cache[row, :, n : self.state.shapes[at].slots] = torch.nan
        decode(self)

    monkeypatch.setattr(Run, "decode", spoil_and_decode)
    ours = generate(model, batch, METHODS[name], 10, engine=engine, eos_token_id=[])
    check_same(ours, generate(model, batch, METHODS[name], 10, engine="reference", eos_token_id=[]))
    assert 0 < int(ours.trace.kept_by_layer[..., 4].max()) < 36
    engine.release()


@pytest.mark.parametrize("name", ["fastv", "vtw", "dyrate", "none"])
def test_golden_model(golden_model, golden_inputs, name):
    """On the model and inputs of the authors' reference figures."""
    engine = eager_engine(golden_model)
    try:
        for sample in range(2):
            kwargs = dict(max_new_tokens=10, return_logits=True)
            check_same(
                generate(golden_model, golden_inputs(sample), METHODS[name], engine=engine, **kwargs),
                generate(golden_model, golden_inputs(sample), METHODS[name], engine="reference", **kwargs),
            )
    finally:
        engine.release()


@pytest.mark.parametrize("sampled", [False, True])
def test_penalised_prompts_of_other_lengths_keep_their_buffer(model, sampled):
    """A graph holds the address of the ids that a penalty looks at: prompts that share a plan share it too."""
    engine = eager_engine(model, buckets=True)
    kwargs = dict(max_new_tokens=6, eos_token_id=[], repetition_penalty=1.5, do_sample=sampled, seed=0)
    addresses = set()
    for after in (3, 7, 5):
        batch = random_batch(6, ((2, after, True), (1, 4, True)), seed=after)
        ours = generate(model, batch, METHODS["dyrate"], engine=engine, **kwargs)
        check_same(ours, generate(model, batch, METHODS["dyrate"], engine="reference", **kwargs))
        addresses |= {run.state.said.data_ptr() for run in engine.plans.values()}
    assert len(engine.plans) == len(addresses) == 1
    engine.release()
