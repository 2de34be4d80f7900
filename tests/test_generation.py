"""The pruned loop: masked == discarded, batches == alone, stock == ours, kept == cache lengths, FLOPs == counted."""

from __future__ import annotations

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
    NoReduction,
    RandomPrune,
    RatePath,
    RatePredictor,
    generate,
)
from dyrate_lib.decoder import PrunedDecoder
from dyrate_lib.models import Adapter
from dyrate_lib.training import masked_logits, read_prompt_and_response

TOLERANCE = 1e-4


def lively_predictor(n_heads=4, n_rates=10, seed=0):
    """A predictor with random weights, so that rates differ between samples and steps."""
    predictor = RatePredictor(n_heads, n_rates)
    generator = torch.Generator().manual_seed(seed)
    predictor.linear.weight.data.normal_(0, 30, generator=generator)
    return predictor


METHODS = {
    "none": NoReduction(),
    "fastv": FastV(2, 0.5),
    "fastv-refresh": FastV(3, 0.7, refresh=True),
    "vtw": VTW(4),
    "random": RandomPrune(2, 0.75),
    "path": RatePath(3, (0.1, 0.3, 0.3, 0.8, 1.0)),
    "depth": DepthPrune({3: 0.4, 5: 0.8, 6: 1.0}),
    "dyrate": DyRate(lively_predictor(), 3),
    "dyrate-step": DyRate(lively_predictor(), 3, rank="step"),
    "dyrate-reversible": DyRate(lively_predictor(), 3, reversible=True),
    "dyrate-both": DyRate(lively_predictor(), 2, rank="step", reversible=True),
}
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def responses(batch_size, steps, seed=1):
    return torch.randint(5, 200, (batch_size, steps), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_masked_equals_discarded_on_random_rate_paths(tiny, batch, data):
    layer = data.draw(st.integers(1, 7), label="layer")
    steps = 6
    rate = st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.95, 1.0])
    paths = data.draw(st.lists(st.lists(rate, min_size=steps, max_size=steps), min_size=4, max_size=4), label="rates")
    reply = responses(4, steps, data.draw(st.integers(0, 1000), label="reply"))
    out = generate(tiny[0], batch, RatePath(layer, paths), forced_tokens=reply, return_logits=True)
    adapter = Adapter(tiny[0])
    forced = read_prompt_and_response(adapter, adapter.embed(batch), reply, layer)
    keep = (torch.arange(36) < out.trace.kept[..., None]).float()
    assert (masked_logits(adapter, forced, keep) - out.logits).abs().max() < TOLERANCE
    assert (forced.shares - out.trace.attention).abs().max() < 1e-5
    assert bool((out.trace.kept.diff(dim=1) <= 0).all())
    final = [36 - int(max(path) * 36 + 1e-9) for path in paths]
    assert out.trace.kept[:, -1].tolist() == final


def test_reversible_masked_equals_reads(tiny, batch):
    """In the reversible variant masks need not be nested; the masked pass must still agree."""
    path = (0.9, 0.1, 0.6, 0.0, 0.95)
    reply = responses(4, 5)
    out = generate(tiny[0], batch, RatePath(3, path, reversible=True), forced_tokens=reply, return_logits=True)
    adapter = Adapter(tiny[0])
    forced = read_prompt_and_response(adapter, adapter.embed(batch), reply, 3)
    keep = (torch.arange(36) < out.trace.kept[..., None]).float()
    assert out.trace.kept[0].tolist() == [4, 33, 15, 36, 2]
    assert (masked_logits(adapter, forced, keep) - out.logits).abs().max() < TOLERANCE


@by_method
def test_batch_of_unequal_prompts_equals_each_alone(tiny, batch, alone, method):
    reply = responses(4, 5)
    together = generate(tiny[0], batch, method, forced_tokens=reply, return_logits=True)
    for b in range(4):
        single = generate(tiny[0], alone(b), method, forced_tokens=reply[b : b + 1], return_logits=True)
        assert (together.logits[b] - single.logits[0]).abs().max() < TOLERANCE
        assert together.trace.kept[b].tolist() == single.trace.kept[0].tolist()
        for step in range(5):
            assert together.trace.kept_at(b, step).tolist() == single.trace.kept_at(0, step).tolist()


@by_method
def test_stock_generate_under_the_context_equals_our_loop(tiny, batch, method):
    model = tiny[0]
    with method(model) as pruning:
        stock = model.generate(
            **batch,
            max_new_tokens=7,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    out = generate(model, batch, method, max_new_tokens=7, eos_token_id=[], return_logits=True)
    assert torch.equal(stock.sequences, out.sequences)
    assert (torch.stack(stock.logits, 1) - out.logits).abs().max() < TOLERANCE
    if not isinstance(method, NoReduction):
        assert torch.equal(torch.stack(pruning.kept, 1), out.trace.kept)


@pytest.mark.parametrize(
    "method",
    [FastV(2, 0.0), RatePath(3, (0.0,)), DyRate(RatePredictor(4), 3), RandomPrune(2, 0.0), DepthPrune({3: 0.0})],
    ids=lambda m: m.name,
)
def test_keeping_all_is_the_unpruned_model(tiny, batch, method):
    plain = generate(tiny[0], batch, None, max_new_tokens=8, eos_token_id=[], return_logits=True)
    pruned = generate(tiny[0], batch, method, max_new_tokens=8, eos_token_id=[], return_logits=True)
    assert torch.equal(plain.sequences, pruned.sequences)
    assert (plain.logits - pruned.logits).abs().max() < TOLERANCE
    with method(tiny[0]):
        stock = tiny[0].generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(stock, plain.sequences)


@pytest.mark.parametrize("name", ["fastv", "vtw", "path", "depth", "dyrate"])
def test_kept_is_what_the_cache_is_read_for(tiny, alone, name):
    """For one sample without padding the next query reads text + kept entries, no more."""
    method, adapter = METHODS[name], Adapter(tiny[0])
    inputs = alone(0)
    prompt = adapter.embed(inputs)
    text = int(prompt.length) - 36
    decoder = PrunedDecoder(adapter, prompt, method, 6)
    decoder.prefill()
    previous = decoder.state.kept.clone()
    for step in range(6):
        lengths = decoder.kv_lengths()
        for index, length in enumerate(lengths):
            kept = 36 if index < decoder.layer else int(decoder.state.layer_kept(index))
            assert length == text + step + kept, (step, index)
        assert bool((decoder.state.kept <= previous).all())
        previous = decoder.state.kept.clone()
        if step < 5:
            decoder.decode(torch.tensor([7 + step]))


@pytest.mark.parametrize("name", ["none", "fastv", "vtw", "path", "depth", "dyrate", "fastv-refresh"])
def test_flops_agree_with_the_counter(tiny, alone, name):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    method = METHODS[name]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = generate(tiny[0], alone(2), method, max_new_tokens=5, eos_token_id=[])
    assert out.flops("cached") == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert out.flops("cached").ratio <= 1.0
    if name != "none":
        assert out.flops("paper").ratio < 1.0


def test_attention_shares_sum_to_one_and_count_types(tiny, batch):
    out = generate(tiny[0], batch, FastV(2, 0.5), max_new_tokens=4, eos_token_id=[])
    shares = out.trace.attention
    assert shares.shape == (4, 4, 4, 4)
    assert torch.allclose(shares.sum(-1), torch.ones(4, 4, 4), atol=1e-5)
    assert bool((shares[:, 0, :, 3] == 0).all()) and bool((shares[:, 1:, :, 3] > 0).all())


def test_random_pruning_differs_by_picture_and_seed(tiny, batch):
    first = generate(tiny[0], batch, RandomPrune(2, 0.5, seed=0), max_new_tokens=1).trace
    other = generate(tiny[0], batch, RandomPrune(2, 0.5, seed=1), max_new_tokens=1).trace
    kept = {tuple(first.kept_at(b, 0).tolist()) for b in range(4)}
    assert len(kept) == 4
    assert all(first.kept_at(b, 0).tolist() != other.kept_at(b, 0).tolist() for b in range(4))


def test_eos_ends_samples_one_by_one(tiny, batch):
    free = generate(tiny[0], batch, FastV(2, 0.5), max_new_tokens=10, eos_token_id=[])
    eos = int(free.new_tokens[1, 3])
    out = generate(tiny[0], batch, FastV(2, 0.5), max_new_tokens=10, eos_token_id=eos)
    for b in range(4):
        row = free.new_tokens[b].tolist()
        want = row.index(eos) + 1 if eos in row else 10
        assert int(out.lengths[b]) == min(want, out.new_tokens.shape[1])
        assert out.new_tokens[b, : int(out.lengths[b])].tolist() == row[: int(out.lengths[b])]
    assert len(out.text) == 4


def test_sampling_is_reproducible_and_varied(tiny, batch):
    def sample(seed):
        return generate(
            tiny[0], batch, FastV(2, 0.5), 6, do_sample=True, top_p=0.9, temperature=1.5, seed=seed, eos_token_id=[]
        )

    assert torch.equal(sample(3).sequences, sample(3).sequences)
    assert not torch.equal(sample(3).sequences, sample(4).sequences)
    nucleus = generate(tiny[0], batch, FastV(2, 0.5), 6, do_sample=True, top_k=1, seed=0, eos_token_id=[])
    greedy = generate(tiny[0], batch, FastV(2, 0.5), 6, eos_token_id=[])
    assert torch.equal(nucleus.sequences, greedy.sequences)


def test_text_only_prompts_pass_through(tiny):
    from dyrate_lib import chat_prompt, prepare_inputs

    inputs = prepare_inputs(tiny[1], None, [chat_prompt("Hello there.", image=False), chat_prompt("Yes?", image=False)])
    plain = generate(tiny[0], inputs, None, 5, eos_token_id=[])
    for method in (FastV(2, 0.5), VTW(4), METHODS["dyrate"], METHODS["random"]):
        assert torch.equal(generate(tiny[0], inputs, method, 5, eos_token_id=[]).sequences, plain.sequences)
        with method(tiny[0]):
            stock = tiny[0].generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(stock, plain.sequences)


def test_text_only_and_picture_in_one_batch(tiny, pictures):
    from dyrate_lib import chat_prompt, prepare_inputs

    prompts = [chat_prompt("Describe the picture."), chat_prompt("Hello.", image=False)]
    mixed = prepare_inputs(tiny[1], [pictures[0], None], prompts)
    out = generate(tiny[0], mixed, FastV(2, 0.5), 4, eos_token_id=[], return_logits=True)
    assert out.trace.kept[:, 0].tolist() == [18, 0]
    for b, picture in enumerate((pictures[0], None)):
        single = prepare_inputs(tiny[1], [picture], prompts[b : b + 1])
        want = generate(tiny[0], single, FastV(2, 0.5), 4, eos_token_id=[], return_logits=True)
        assert (out.logits[b] - want.logits[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("layer", [0, 8, -1, 99, 2.5, True])
def test_layer_out_of_range(tiny, batch, layer):
    with pytest.raises(InputError, match="layer"):
        generate(tiny[0], batch, FastV(layer, 0.5), 2)
    with pytest.raises(InputError, match="1 to 7"), FastV(layer, 0.5)(tiny[0]):
        pass


@pytest.mark.parametrize("rate", [-0.1, 1.5, "half", True, float("nan")])
def test_rate_out_of_range(rate):
    with pytest.raises(InputError, match="rate"):
        FastV(2, rate)


def test_refusals_before_any_work(tiny, batch):
    model = tiny[0]
    with pytest.raises(InputError, match="heads"):
        generate(model, batch, DyRate(RatePredictor(8), 3), 2)
    with pytest.raises(InputError, match="trained for layer 2"):
        DyRate(RatePredictor(4, layer=2), layer=3)
    with pytest.raises(InputError, match="context"):
        generate(model, batch, None, 5000)
    with pytest.raises(InputError, match="Method"):
        generate(model, batch, "fastv", 2)
    with pytest.raises(InputError, match="fall with depth"):
        DepthPrune({3: 0.5, 5: 0.2})
    with pytest.raises(InputError, match="samples"):
        generate(model, batch, RatePath(3, [[0.1], [0.2]]), 2)
    with pytest.raises(InputError, match="top_p"):
        generate(model, batch, None, 2, do_sample=True, top_p=0.0)
