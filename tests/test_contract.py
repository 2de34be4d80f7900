"""One contract for all methods, one matrix: every method in every mode, on one small model; Hypothesis for the rest.

What must hold is in the names of the tests. The methods and their settings are `cases()` of tests/contract.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyrate_lib import (
    ST3,
    VTW,
    CDPruner,
    DepthPrune,
    DivPrune,
    FastV,
    InputError,
    NoReduction,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    RandomPrune,
    RatePath,
    SparseVLM,
    VisionZip,
    generate,
)
from dyrate_lib.models import Adapter
from tests.contract import (
    GREEDY,
    IMAGE,
    ROWS,
    Shape,
    cases,
    kv_lengths,
    one_row,
    random_batch,
    repeated,
    replay,
    representatives,
    small_model,
)
from tests.test_hooks import fingerprint

TOLERANCE = 1e-4
N = 36
STEPS = 3

every_method = pytest.mark.parametrize("name", cases())
with_keep_all = pytest.mark.parametrize("name", [name for name, case in cases().items() if case.keep_all])


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def padded():
    return random_batch(6, ROWS)


@pytest.fixture(scope="module")
def single(padded):
    return one_row(padded, 1)


@pytest.fixture(autouse=True, scope="module")
def used_before(model, single):
    """transformers marks a model on its first forward pass and first generate: let that be over before any comparison."""
    model(**single)
    model.generate(**single, max_new_tokens=1, do_sample=False)


def stock(model, inputs, method, **kwargs):
    with method(model):
        return model.generate(**inputs, **{**GREEDY, "max_new_tokens": STEPS, **kwargs})


# -- the matrix: every method x {prefill only, cached decode, batch, padding, beam, sampling} ---------------------------


@every_method
def test_prefill_only(model, single, name):
    """A plain forward pass under the context gives the first token's logits, and each layer's cache holds what is kept."""
    case = cases()[name]
    with case.method(model):
        out = model(**single)
    ours = generate(model, single, case.method, max_new_tokens=1, return_logits=True)
    assert (out.logits[:, -1] - ours.logits[:, 0]).abs().max() < TOLERANCE
    text = single["input_ids"].shape[1] - N
    kept = ours.trace.kept_by_layer[0, 0].tolist()
    assert kv_lengths(out.past_key_values) == [text + n for n in kept]
    if case.kept is not None:
        assert kept == list(case.kept(N))


@every_method
def test_cached_decode(model, single, name):
    """Token for token as our loop; kept == budget == length of the keys and values, layer by layer."""
    case = cases()[name]
    out = stock(model, single, case.method)
    ours = generate(model, single, case.method, max_new_tokens=STEPS, eos_token_id=[], return_logits=True)
    assert torch.equal(out.sequences, ours.sequences)
    assert (torch.stack(out.logits, 1) - ours.logits).abs().max() < TOLERANCE
    trace, length = ours.trace, single["input_ids"].shape[1]
    assert trace.n_image.tolist() == [N] and trace.prompt_length.tolist() == [length]
    by_layer = trace.kept_by_layer[0]
    assert torch.equal(trace.kept[0], by_layer[:, trace.layer] if trace.layer < 8 else by_layer[:, -1]) or case.spare
    try:
        plan = case.method.plan(N, 8, STEPS)
    except InputError:  # how many stay depends on the content
        assert case.kept is None
    else:
        assert by_layer.tolist() == plan.tolist()
    if case.method.refresh:
        assert not out.past_key_values
        return
    held = by_layer[-1] if not case.spare else by_layer[0]
    assert kv_lengths(out.past_key_values) == [length - N + n + STEPS - 1 for n in held.tolist()]


@every_method
def test_batch_of_equal_prompts(model, name):
    """Rows without padding: each row of the batch is that row alone, under stock generate."""
    case = cases()[name]
    batch = random_batch(6, [(2, 6, True)] * 2, seed=3)
    out = stock(model, batch, case.method)
    for row in range(2):
        alone = stock(model, one_row(batch, row), case.method)
        assert torch.equal(out.sequences[row], alone.sequences[0])
        assert (torch.stack(out.logits, 1)[row] - torch.stack(alone.logits, 1)[0]).abs().max() < TOLERANCE


@every_method
def test_padding(model, padded, name):
    """Unequal prompts, one of them without a picture: each row is that row alone, in our loop and under stock generate."""
    case = cases()[name]
    out = stock(model, padded, case.method)
    logits, reply = torch.stack(out.logits, 1), out.sequences[:, padded["input_ids"].shape[1] :]
    ours = generate(model, padded, case.method, forced_tokens=reply, return_logits=True)
    assert (ours.logits - logits).abs().max() < TOLERANCE
    for row in range(len(ROWS)):
        alone = generate(model, one_row(padded, row), case.method, forced_tokens=reply[row : row + 1], return_logits=True)
        assert (alone.logits[0] - logits[row]).abs().max() < TOLERANCE
        assert torch.equal(alone.trace.kept_by_layer[0], ours.trace.kept_by_layer[row])
        for step in range(STEPS):
            assert torch.equal(alone.trace.kept_at(0, step), ours.trace.kept_at(row, step))
    plain = generate(model, one_row(padded, 2), None, forced_tokens=reply[2:], return_logits=True)
    assert (plain.logits[0] - logits[2]).abs().max() < TOLERANCE  # nothing to cut: passed through


@every_method
def test_beam(model, padded, name):
    """The score of every returned beam is what our loop gives along it: the state followed the beams."""
    method, beams = cases()[name].method, 2
    out = stock(model, padded, method, num_beams=beams, num_return_sequences=beams, output_scores=True)
    logits = replay(model, repeated(padded, beams), method, out.sequences)
    reply = out.sequences[:, padded["input_ids"].shape[1] :]
    score = torch.log_softmax(logits, -1).gather(-1, reply[..., None])[..., 0].mean(-1)
    assert (score - out.sequences_scores).abs().max() < 1e-3


@every_method
def test_sampling(model, padded, name):
    """Several sequences a prompt, drawn: every one saw the logits that our loop gives along it."""
    method = cases()[name].method
    torch.manual_seed(0)
    drawn = dict(do_sample=True, temperature=1.5, num_return_sequences=2, suppress_tokens=[IMAGE])
    out = stock(model, padded, method, **drawn)
    assert out.sequences.shape[0] == 2 * len(ROWS)
    logits = replay(model, repeated(padded, 2), method, out.sequences)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < TOLERANCE


# -- what holds beside the modes -----------------------------------------------------------------------------------


@with_keep_all
def test_keeping_all_is_the_unpruned_model(model, padded, name):
    method = cases()[name].keep_all
    plain = stock(model, padded, NoReduction())
    pruned = stock(model, padded, method)
    assert torch.equal(plain.sequences, pruned.sequences)
    assert (torch.stack(plain.logits) - torch.stack(pruned.logits)).abs().max() < TOLERANCE
    ours = generate(model, padded, method, max_new_tokens=STEPS, eos_token_id=[])
    assert torch.equal(ours.sequences, plain.sequences)
    assert bool((ours.trace.kept_by_layer == ours.trace.n_image[:, None, None]).all())


@every_method
def test_positions_are_kept_or_counted_anew(model, single, name):
    """What rotary angles each layer gets: the tokens' own positions, or 0, 1, .. where the method renumbers."""
    case, seen = cases()[name], {}
    adapter = Adapter(model)
    table = adapter.rotary(torch.arange(128)[None], torch.zeros(1))[1][0]
    length = single["input_ids"].shape[1]
    image = (single["input_ids"][0] == adapter.image_token_id).nonzero()[:, 0]
    text = [place for place in range(length) if place not in image.tolist()]

    def look(index):
        def hook(module, args, kwargs):
            sin = kwargs["position_embeddings"][1][0]
            seen.setdefault(index, []).append(torch.cdist(sin, table).argmin(-1).tolist())

        return hook

    with case.method(model):
        handles = [
            layer.self_attn.register_forward_pre_hook(look(index), with_kwargs=True)
            for index, layer in enumerate(adapter.layers)
        ]
        try:
            out = model.generate(**single, **{**GREEDY, "max_new_tokens": 3})
        finally:
            for handle in handles:
                handle.remove()
    ours = generate(model, single, case.method, forced_tokens=out.sequences[:, length:])
    kept = ours.trace.kept_by_layer[0]
    for index, passes in seen.items():
        assert len(passes) == 3
        first = passes[0]
        assert len(first) == len(text) + int(kept[0, index])
        if case.renumbered and len(first) < length:
            assert first == list(range(len(first)))
            assert [p[-1] for p in passes[1:]] == [len(first), len(first) + 1]
            continue
        assert first == sorted(set(first)) and set(text) <= set(first) <= set(range(length))
        assert [p[-1] for p in passes[1:]] == [length, length + 1]
        if not case.spare and index == ours.trace.layer:
            assert sorted(set(first) - set(text)) == image[ours.trace.kept_at(0, 0)].tolist()


@every_method
def test_accounting_agrees_with_the_flop_counter(model, single, name):
    """The language model's layers and head under stock generate, counted by torch, and the count from the trace."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    method = cases()[name].method
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = stock(model, single, method, max_new_tokens=2)
    counts = {key: sum(value.values()) for key, value in counter.get_flop_counts().items()}
    # attention and MLP apart, so that what a method computes for itself beside them does not count
    parts = re.compile(r"language_model\.layers\.\d+\.(self_attn|mlp)$")
    layers = sum(value for key, value in counts.items() if parts.search(key))
    head = next(value for key, value in counts.items() if key.endswith(".lm_head"))
    reply = out.sequences[:, single["input_ids"].shape[1] :]
    flops = generate(model, single, method, forced_tokens=reply).flops("cached")
    assert flops.by_part["prefill"] + flops.by_part.get("decode", 0.0) == pytest.approx(layers, rel=0.01)
    assert flops.by_part["head"] == head
    assert flops.ratio <= 1.0 and flops.unpruned >= float(flops)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Adapter(model).embed(single)
    pictures = counter.get_total_flops()
    assert flops.by_part["vision"] + flops.by_part["projector"] == pytest.approx(pictures, rel=0.01)


@every_method
def test_the_model_is_restored_also_after_an_exception(model, padded, name):
    method, before = cases()[name].method, fingerprint(model)
    plain = model(**padded).logits
    stock(model, padded, method, max_new_tokens=2)
    assert fingerprint(model) == before
    with pytest.raises(ZeroDivisionError), method(model):
        model.generate(**padded, **{**GREEDY, "max_new_tokens": 1})
        raise ZeroDivisionError
    assert fingerprint(model) == before
    broken = model.model.language_model.layers[6].mlp
    with pytest.raises(RuntimeError, match="inside the model"), method(model):
        handle = broken.register_forward_pre_hook(_fail)
        try:
            model.generate(**padded, **{**GREEDY, "max_new_tokens": 2})
        finally:
            handle.remove()
    assert fingerprint(model) == before
    assert torch.equal(model(**padded).logits, plain)


def _fail(*_):
    raise RuntimeError("inside the model")


@pytest.mark.parametrize("name", ["none", "fastv", *representatives()])
@pytest.mark.parametrize("other", ["fastv", "visionzip", "sparsevlm"])
def test_stacked_contexts_are_refused_before_any_work(model, single, name, other):
    method, second = cases()[name].method, cases()[other].method
    before = fingerprint(model)
    want = stock(model, single, method, max_new_tokens=2).sequences
    with method(model):
        inside = fingerprint(model)
        with pytest.raises(InputError, match="already being pruned"), second(model):
            pass
        assert fingerprint(model) == inside  # the refused one left nothing, and took nothing away
        again = model.generate(**single, **{**GREEDY, "max_new_tokens": 2}).sequences
    assert torch.equal(again, want)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", ["fastv", "random", "cdpruner", *representatives()])
def test_a_context_can_be_entered_again_and_a_method_used_on_two_models(model, single, name):
    """Nothing of one batch, one context or one model stays in the method."""
    method = cases()[name].method
    other = small_model(Shape(seed=1))
    first = stock(model, single, method, max_new_tokens=2).sequences
    stock(other, random_batch(6, [(1, 3, True)], seed=9), method, max_new_tokens=2)
    with method(other), method(model):  # two models at once do not meet
        assert torch.equal(model.generate(**single, **{**GREEDY, "max_new_tokens": 2}).sequences, first)
    assert torch.equal(stock(model, single, method, max_new_tokens=2).sequences, first)


NAN = float("nan")
BAD = [
    (FastV, dict(rate=1.5)), (FastV, dict(rate=NAN)), (RandomPrune, dict(rate="half")), (RatePath, dict(rates=())),
    (DepthPrune, dict(rates={3: 0.5, 5: 0.2})), (VisionZip, dict(dominant=0)), (VisionZip, dict(contextual=-1)),
    (VisionZip, dict(dominant=12.5)), (PruMerge, dict(ratio=0.0)), (PruMerge, dict(ratio=NAN)), (PruMerge, dict(nearest=-1)),
    (PruMergePlus, dict(ratio=2.0)), (DivPrune, dict(ratio=0.0)), (DivPrune, dict(ratio=True)), (CDPruner, dict(ratio=NAN)),
    (CDPruner, dict(tokens=0)), (CDPruner, dict(text=torch.zeros(1, 4))), (SparseVLM, dict(budget=100)),
    (SparseVLM, dict(counts=(1, 2))), (SparseVLM, dict(counts=5)), (SparseVLM, dict(counts=(-1, 2, 3))),
    (SparseVLM, dict(layers=(6, 2, 15))), (SparseVLM, dict(scale="x")), (SparseVLM, dict(merge_fraction=NAN)),
    (SparseVLM, dict(cluster_size=0)), (PyramidDrop, dict(ratios=(0.1, 0.5, 0.9))), (PyramidDrop, dict(ratios=None)),
    (PyramidDrop, dict(ratios=(0.5,))), (PyramidDrop, dict(layers=(2, 2, 3))), (ST3, dict(rho=2)), (ST3, dict(first=0)),
    (ST3, dict(decay="quadratic")), (ST3, dict(horizon=0)), (ST3, dict(decay="exponential", floor=0.0)),
]  # fmt: skip


@pytest.mark.parametrize("cls, settings", BAD, ids=lambda value: value.__name__ if isinstance(value, type) else repr(value))
def test_bad_settings_are_refused_where_they_are_given(cls, settings):
    with pytest.raises(InputError, match=cls.__name__):
        cls(**settings)


TOO_MUCH = [
    FastV(8), VTW(9), DepthPrune({3: 0.1, 9: 0.5}), VisionZip(40, 4), CDPruner(tokens=37), PyramidDrop(layers=(2, 4, 8)),
    SparseVLM(counts=(3, 2, 1), layers=(1, 3, 7)), ST3(first=8), PyramidDrop(layers=(0, 2, 4)),
]  # fmt: skip


@pytest.mark.parametrize("method", TOO_MUCH, ids=lambda method: repr(method)[:40])
def test_settings_that_the_model_cannot_meet_are_refused_before_any_work(model, single, method, monkeypatch):
    before = fingerprint(model)
    monkeypatch.setattr(type(model.model.language_model.layers[0].mlp), "forward", _fail)
    with pytest.raises(InputError):
        generate(model, single, method, max_new_tokens=1)
    with pytest.raises(InputError):
        stock(model, single, method)
    monkeypatch.undo()
    assert fingerprint(model) == before


# -- Hypothesis: shapes, rates, prompt lengths, composition of the batch -------------------------------------------------

shapes = st.sampled_from(
    [Shape(4, 2, 1, 2, 32), Shape(4, 4, 2, 3, 32), Shape(6, 4, 4, 4, 32), Shape(5, 2, 2, 5, 32), Shape(4, 4, 1, 1, 32)]
)
rows = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9), st.booleans()), min_size=1, max_size=3)
rates = st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 0.77, 0.99, 1.0])


@st.composite
def drawn_methods(draw):
    """A method with settings, and a model it fits."""
    shape = draw(shapes)
    n = shape.grid**2
    layer = draw(st.integers(1, shape.layers - 1))
    path = tuple(draw(st.lists(rates, min_size=1, max_size=4)))
    a, b = sorted((draw(rates), draw(rates)))
    share = draw(st.sampled_from([0.01, 0.1, 1 / 3, 0.5, 0.9, 1.0]))
    two = (1, draw(st.integers(2, shape.layers - 1)))
    dominant = draw(st.integers(1, max(n - 1, 1)))
    choices = [
        DivPrune(share), CDPruner(share), PyramidDrop(two, (1 - a, 1 - b)), ST3(layer, 1, 1 - a, floor=1 - b, horizon=2),
        SparseVLM(counts=(1 - a, 1 - b), layers=(0, two[1] - 1), recycle=draw(st.booleans()), cluster_size=2),
        SparseVLM(adaptive=True, layers=(0, two[1] - 1), scale=share, bias=draw(st.integers(-2, 2))),
        ST3(layer, 2, share, draw(st.sampled_from(["linear", "cosine", "exponential"])), floor=0.2, horizon=3),
    ] + ([
        VisionZip(dominant, draw(st.integers(0, n - dominant))), PruMerge(nearest=draw(st.integers(0, n + 3))),
        PruMerge(share), PruMergePlus(), PruMergePlus(share),
    ] if n > 1 else []) + [
        FastV(layer, draw(rates)), FastV(layer, draw(rates), refresh=True), VTW(layer), RandomPrune(layer, draw(rates)),
        RatePath(layer, path), RatePath(layer, path, rank="step"), RatePath(layer, path, reversible=True),
        DepthPrune({layer: a} if layer == shape.layers - 1 else {layer: a, layer + 1: b}),
    ]  # fmt: skip
    return shape, draw(st.sampled_from(choices))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=drawn_methods(), rows=rows, seed=st.integers(0, 99))
def test_any_shape_rate_and_batch(drawn, rows, seed):
    """Stock == ours, each row == that row alone, counts within bounds and never rising unless tokens may come back."""
    shape, method = drawn
    model, batch = small_model(shape), random_batch(shape.grid, rows, seed)
    out = stock(model, batch, method, max_new_tokens=3)
    logits, reply = torch.stack(out.logits, 1), out.sequences[:, batch["input_ids"].shape[1] :]
    ours = generate(model, batch, method, forced_tokens=reply, return_logits=True)
    assert (ours.logits - logits).abs().max() < TOLERANCE
    kept = ours.trace.kept_by_layer
    assert bool((kept >= 0).all()) and bool((kept <= ours.trace.n_image[:, None, None]).all())
    assert ours.flops("cached").ratio <= 1.0 + 1e-9 and ours.flops("paper").ratio <= 1.0 + 1e-9
    assert bool((kept.diff(dim=1) <= 0).all()) or method.reversible
    assert bool((kept.diff(dim=2) <= 0).all())
    for row in range(len(rows)):
        alone = generate(model, one_row(batch, row), method, forced_tokens=reply[row : row + 1], return_logits=True)
        assert (alone.logits[0] - logits[row]).abs().max() < TOLERANCE
        assert torch.equal(alone.trace.kept_by_layer[0], kept[row])
