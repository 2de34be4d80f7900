"""LayerTopK: every layer reads the image tokens that its own newest row weighs most, nothing else, and is counted so."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dyrate_lib import FastV, InputError, LayerTopK, NoReduction, budget, generate
from dyrate_lib.accounting import flops
from dyrate_lib.attention import attend
from dyrate_lib.budgets import cost_ratio, fit_budget
from dyrate_lib.engine import select
from dyrate_lib.evaluate import beam_records, describe
from dyrate_lib.layerwise_decoder import attend_top
from dyrate_lib.masks import IMG
from dyrate_lib.models import Adapter, model_info
from tests.contract import GROUPED, ROWS, Shape, one_row, random_batch, run, small_model, some_reply, two_pictures
from tests.tiny_families import FAMILIES, model_of

LAYERS, N, STEPS = 8, 36, 4
reply = functools.partial(some_reply, steps=STEPS)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def padded():
    return random_batch(6, ROWS)


# -- against a loop that is written out -------------------------------------------------------------------------------------


def heaviest(weights, candidates, count):
    """The `count` of `candidates` with the largest weight, the earlier first among equals."""
    return sorted(sorted(candidates, key=lambda column: (-float(weights[column]), column))[:count])


def written_out(model, inputs, method, forced):
    """Logits [steps, vocab] of one sample without padding, and what each layer read: {(step, layer): columns}."""
    adapter = Adapter(model)
    prompt = adapter.embed(inputs)
    image, heads = (prompt.types[0] == IMG).nonzero()[:, 0].tolist(), adapter.n_heads
    first = method.prepare(adapter.n_layers, heads, prompt.embeds.device)
    caches: dict[int, tuple] = {}
    logits, chosen = [], {}
    for step in range(forced.shape[1]):
        x = prompt.embeds if step == 0 else adapter.embed_tokens(forced[:, step - 1 : step]).to(prompt.embeds.dtype)
        rotary = adapter.rotary(prompt.position_ids if step == 0 else prompt.last_position + step, x)
        for layer in range(adapter.n_layers):
            q, k, v = adapter.project(layer, adapter.normed_input(layer, x), rotary)
            k, v = (part.repeat_interleave(heads // part.shape[1], 1) for part in (k, v))
            if step:
                k, v = torch.cat((caches[layer][0], k), 2), torch.cat((caches[layer][1], v), 2)
            caches[layer] = (k, v)
            scores = q[0] @ k[0].transpose(1, 2) * q.shape[-1] ** -0.5  # [H, R, T]
            read = list(range(k.shape[2]))
            if step == 0:
                scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
            elif layer >= first:
                weights = torch.softmax(scores, -1)[:, 0]
                pooled = weights.amax(0) if method.pool == "max" else weights.mean(0)
                n = torch.tensor([len(image)])
                count = int(method.at_layer(layer, method.counts(n), n))
                keep = heaviest(pooled, image, count)
                chosen[step, layer] = [image.index(column) for column in keep]
                read = [column for column in read if column in keep or column not in image]
            out = torch.softmax(scores[:, :, read], -1) @ v[0][:, read]
            x = adapter.finish(layer, x, out[None])
        logits.append(adapter.logits(x[:, -1])[0])
    return torch.stack(logits), chosen


@pytest.mark.parametrize("shape", [Shape(), GROUPED], ids=["heads", "grouped"])
@pytest.mark.parametrize(
    "method",
    [LayerTopK(1, 7), LayerTopK(2, rate=0.75, pool="mean", tilt=0.6), LayerTopK(3, 0), LayerTopK(1, 20, tilt=-1.0)],
    ids=["max", "mean, leaning", "none read", "leaning back"],
)
def test_the_loop_is_the_rule_written_out(shape, method):
    """In float64, sample by sample of a padded batch; and which tokens each layer read."""
    model = small_model(shape).double()
    try:
        padded = {k: v.double() if v.is_floating_point() else v for k, v in random_batch(6, ROWS).items()}
        forced = reply(3)
        adapter = Adapter(model)
        runner = method.runner(adapter, adapter.embed(padded), STEPS)
        steps, reads = [runner.prefill()], []
        for step in range(STEPS - 1):
            steps.append(runner.decode(forced[:, step]))
            reads.append(dict(runner.layer_reads))
        logits = torch.stack(steps, 1)
        for row in range(3):
            want, chosen = written_out(model, one_row(padded, row), method, forced[row : row + 1])
            assert (logits[row] - want).abs().max() < 1e-9
            for (step, layer), tokens in chosen.items():
                assert reads[step - 1][layer][row].nonzero()[:, 0].tolist() == tokens
        if method.tokens == 7:  # the point of it: layers do not agree
            assert not torch.equal(reads[0][2][0], reads[0][6][0])
    finally:
        model.float()


def test_pictures_of_a_prompt_are_ranked_together(model):
    inputs, method, forced = two_pictures(), LayerTopK(1, 9), reply(1)
    out = run(model, inputs, method, forced)
    want, chosen = written_out(model, inputs, method, forced)
    assert (out.logits[0] - want).abs().max() < 1e-4
    assert out.trace.n_image.tolist() == [2 * N]
    assert out.trace.kept_at(0, 1).tolist() == chosen[1, 1]


# -- what holds beside ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Shape(), GROUPED], ids=["heads", "grouped"])
def test_reading_all_is_the_unpruned_loop(shape, padded):
    model, forced = small_model(shape), reply(3)
    plain = run(model, padded, NoReduction(), forced)
    for method in (LayerTopK(1, N), LayerTopK(2, 500, tilt=1.0), LayerTopK(1, rate=0.0, pool="mean")):
        out = run(model, padded, method, forced)
        assert torch.equal(out.logits, plain.logits)
        assert torch.equal(out.trace.kept_by_layer, plain.trace.kept_by_layer)
        assert float(out.flops("cached")) == float(plain.flops("cached"))
    assert (run(model, padded, LayerTopK(1, 5), forced).logits - plain.logits)[:2, 1:].abs().max() > 1e-2


@pytest.mark.parametrize("shape", [Shape(), GROUPED], ids=["heads", "grouped"])
def test_a_row_of_a_batch_is_that_row_alone(shape, padded):
    model, method, forced = small_model(shape), LayerTopK(1, 8, tilt=0.4), reply(3)
    out = run(model, padded, method, forced)
    for row in range(3):
        one = run(model, one_row(padded, row), method, forced[row : row + 1])
        assert (one.logits[0] - out.logits[row]).abs().max() < 1e-4
        assert torch.equal(one.trace.kept_by_layer[0], out.trace.kept_by_layer[row])
        assert all(torch.equal(one.trace.kept_at(0, t), out.trace.kept_at(row, t)) for t in range(STEPS))
    text = run(model, one_row(padded, 2), None, forced[2:])  # nothing to choose from: passed through
    assert (text.logits[0] - out.logits[2]).abs().max() < 1e-4


def test_only_the_values_chosen_are_read(model, padded):
    """What is not chosen may be anything: NaN in its place changes no bit; what is chosen may not."""
    method, adapter, token = LayerTopK(2, 6), Adapter(model), torch.tensor([9, 10, 11])
    prompt = adapter.embed(padded)

    def step(spoil=None):
        runner = method.runner(adapter, prompt, STEPS)
        runner.prefill()
        for layer, tokens in ({} if spoil is None else spoil).items():
            for row in range(3):
                runner._caches[layer][1][row][:, prompt.image_index[row][tokens[row] & runner.state.present[row]]] = torch.nan
        return runner.decode(token), runner.layer_reads

    want, reads = step()
    assert set(reads) == set(range(2, LAYERS)) and [int(each.sum()) for each in reads.values()] == [12] * 6
    assert torch.equal(step({layer: ~each for layer, each in reads.items()})[0], want)
    assert step({5: reads[5]})[0][:2].isnan().all()


@given(st.integers(0, 2**31), st.integers(1, 3), st.sampled_from([1, 2]), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_attention_over_the_heaviest(seed, batch, kv_heads, largest, data):
    """Against plain `attend` under a mask: keys that repeat, so that many weights are equal, and padding."""
    random, heads, length, width = torch.Generator().manual_seed(seed), 4, 12, 4
    k = torch.randn(batch, kv_heads, 4, width, generator=random, dtype=torch.float64).repeat(1, 1, length // 4, 1)
    q = torch.randn(batch, heads, 1, width, generator=random, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, length, width, generator=random, dtype=torch.float64)
    pad = torch.tensor([data.draw(st.integers(0, 2)) for _ in range(batch)])
    unread = torch.arange(length) < pad[:, None]
    image_index = torch.full((batch, 6), -1)
    for row in range(batch):
        n = data.draw(st.integers(0, 6))
        image_index[row, :n] = torch.arange(3, 3 + n)
    counts = torch.tensor([data.draw(st.integers(0, int((row >= 0).sum()))) for row in image_index])
    is_image = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        is_image[row, image_index[row][image_index[row] >= 0]] = True
    others = torch.arange(length).expand(batch, -1)
    pool = "max" if largest else "mean"
    attended, reads = attend_top(
        q, k, v, image_index, counts, int(counts.max()), others, ~is_image & ~unread, unread, pool
    )
    repeated = k.repeat_interleave(heads // kv_heads, 1)
    scores = (q @ repeated.transpose(-1, -2))[:, :, 0] / width**0.5
    weights = torch.softmax(scores.masked_fill(unread[:, None], -torch.inf), -1)
    allowed = ~is_image & ~unread
    for row in range(batch):
        weight = weights[row].amax(0) if largest else weights[row].mean(0)
        image = image_index[row][image_index[row] >= 0].tolist()
        kept = heaviest(weight, image, int(counts[row]))
        # equal weights may differ in the last bit: what is kept must weigh as much, and be first among those exactly equal
        found = image_index[row][reads[row]].tolist()
        assert [float(weight[c]) for c in sorted(found)] == pytest.approx([float(weight[c]) for c in kept], abs=1e-12)
        allowed[row, found] = True
    assert torch.equal(reads.sum(-1), counts)
    assert (attended - attend(q, k, v, allowed[:, None, None])).abs().max() < 1e-12


def test_the_earlier_of_equals_is_read():
    q, k = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 8, 4)
    _, reads = attend_top(
        q, k, k, torch.arange(1, 7)[None], torch.tensor([3]), 3, torch.tensor([[0, 7]]), torch.ones(1, 2, dtype=torch.bool)
    )
    assert reads[0].tolist() == [True] * 3 + [False] * 3


# -- what is counted --------------------------------------------------------------------------------------------------------


def test_trace_and_plan(model, padded):
    method = LayerTopK(3, 10, tilt=1.0)
    out = run(model, padded, method, reply(3))
    trace = out.trace
    assert trace.layer == 3 and trace.kept.tolist() == [[N] + [10] * 3] * 2 + [[0] * 4]
    assert trace.kept_by_layer[0].tolist() == [[N] * 8, *[[N] * 3 + [20, 15, 10, 5, 0]] * 3]
    assert method.plan(N, LAYERS, STEPS).tolist() == trace.kept_by_layer[1].tolist()
    assert trace.kept_at(0, 0).tolist() == list(range(N)) and len(trace.kept_at(0, 2)) == 20
    theirs = run(model, padded, FastV(3, 0.5), reply(3)).trace.attention  # of layer 2 too, which no method reaches
    assert trace.attention.shape == (3, STEPS, 4, 4) and (trace.attention - theirs).abs().max() < 1e-5


def test_flops_by_hand_and_by_torchs_counter(model, padded):
    """One step less an unpruned one: 4 heads of 16, layers 2..7 read 36 - 10 tokens fewer, and score them all the same."""
    single, token, adapter = one_row(padded, 1), torch.tensor([9]), Adapter(model)

    def counted(method):
        runner = method.runner(adapter, adapter.embed(single), STEPS)
        runner.prefill()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            runner.decode(token)
        return counter.get_total_flops()

    saved = 6 * 26 * 2 * 4 * 16  # of the values' products alone
    assert counted(NoReduction()) - counted(LayerTopK(2, 10)) == saved
    count = run(model, single, LayerTopK(2, 10), reply(1)).flops("cached")
    assert count.unpruned_by_part["decode"] - count.by_part["decode"] == 3 * saved
    assert count.by_part["prefill"] == count.unpruned_by_part["prefill"]
    info, length = model_info(model), single["input_ids"].shape[1]
    plan = LayerTopK(2, 10).plan(N, LAYERS, STEPS)
    without = flops(info, length, N, plan, "cached")
    assert float(count) - float(without) == 3 * saved
    assert count.ratio == cost_ratio(LayerTopK(2, 10), info, convention="cached", prompt_length=length, steps=STEPS)
    paper = run(model, single, LayerTopK(2, 10), reply(1)).flops("paper")
    assert paper.ratio == flops(info, length, N, plan, "paper", scores_all=True).ratio < 1


def test_a_budget_sets_the_tokens(model):
    found = budget(LayerTopK(2, tilt=0.5, pool="mean"), model, flops=0.6, prompt_length=50, steps=20)
    assert dataclasses.replace(found, tokens=86) == LayerTopK(2, tilt=0.5, pool="mean")
    assert cost_ratio(found, model, prompt_length=50, steps=20) == pytest.approx(0.6, rel=0.02)
    found = budget("layer-topk", flops=0.3)
    assert found.layer == 1 and abs(found.tokens - 86) <= 2
    told = [cost_ratio(LayerTopK(), prompt_length=576 + text) for text in (20, 64)]  # as the method's text has them
    assert told == pytest.approx([0.25, 0.298], abs=1e-3)
    assert cost_ratio(LayerTopK(), convention="cached") == pytest.approx(0.999, abs=5e-4)
    rate = fit_budget(LayerTopK(rate=0.9), tokens=300, steps=2)
    assert (rate.method.tokens, rate.method.rate) == (6, None)  # (576 + (576 + 31 * 6) / 32) / 2 = 299.9
    with pytest.raises(InputError, match="below what it can reach"):
        budget("layer-topk", tokens=288, steps=1)  # the prompt's pass reads all


# -- settings, and where it does not run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(tokens=3, rate=0.5), "one of the two"), (dict(tokens=-1), "tokens=-1"), (dict(tokens=2.5), "tokens=2.5"),
        (dict(tokens=True), "tokens=True"), (dict(rate=1.5), "rate=1.5"), (dict(pool="sum"), "pool='sum'"),
        (dict(tilt=2), "LayerTopK: tilt=2"), (dict(tilt=float("nan")), "tilt=nan"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        LayerTopK(**wrong)


def test_it_describes_itself():
    assert describe(LayerTopK()) == {
        "method": "layer-topk", "layer": 1, "tokens": 86, "rate": None, "pool": "max", "tilt": 0.0,
    }  # fmt: skip
    assert describe(LayerTopK(2, rate=0.5))["tokens"] is None


def test_stock_generate_and_beams_are_refused(model, padded):
    with pytest.raises(InputError, match=r"dyrate_lib\.generate\(\)"), LayerTopK()(model):
        pass
    with pytest.raises(InputError, match="beams"):
        beam_records(model, None, padded, LayerTopK(), 3, {"num_beams": 2}, ["a"] * 3)
    with pytest.raises(InputError, match="1 to 7"):
        generate(model, padded, LayerTopK(8), 2)


def test_the_graph_engine_says_why_not(tiny, batch):
    engine = select.eager_engine(tiny[0])
    try:
        for method in (LayerTopK(1, 5), LayerTopK(1, 500)):
            with pytest.raises(InputError, match="LayerTopK.*engine='reference'"):
                generate(tiny[0], batch, method, 2, engine=engine)
    finally:
        engine.release()


def test_sampling_and_several_sequences(model, padded):
    """Every sequence drawn saw the logits of the loop along it."""
    out = generate(
        model, padded, LayerTopK(1, 6), 5, do_sample=True, seed=1, num_return_sequences=2, return_logits=True, eos_token_id=[]
    )
    twice = {key: value.repeat_interleave(2, 0) for key, value in padded.items()}
    again = run(model, twice, LayerTopK(1, 6), out.new_tokens)
    assert (out.logits - again.logits).abs().max() < 1e-4 and not torch.equal(out.new_tokens[0], out.new_tokens[1])


def test_half_precision(model, padded):
    """bfloat16: scores are made in float32, so the choice is that of the same numbers in float32; the answer is in bfloat16."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, rows, 8, generator=random).bfloat16() for heads, rows in ((4, 1), (2, 40), (2, 40)))
    where = torch.arange(2, 38).expand(2, -1), torch.tensor([9, 4]), 9, torch.tensor([[0, 1, 38, 39]] * 2), torch.ones(2, 4) > 0
    half, reads = attend_top(q, k, v, *where)
    exact, same = attend_top(q.float(), k.float(), v.float(), *where)
    assert half.dtype == torch.bfloat16 and torch.equal(reads, same) and (half.float() - exact).abs().max() < 0.02
    out = run(copy.deepcopy(model).to(torch.bfloat16), padded, LayerTopK(1, 12), reply(3))
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all() and out.trace.kept[:, 1].tolist() == [12, 12, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """One picture, two, none, one again in a batch: each row as the loop written out answers it alone."""
    model, rows, method = model_of(name), (((0,), 6), ((1, 2), 9), ((), 12), ((3,), 3)), LayerTopK(1, 5)
    forced = reply(4, steps=3) % 90 + 3
    batch = FAMILIES[name].inputs(rows)
    together = run(model, batch, method, forced)
    for row, spec in enumerate(rows):
        alone = FAMILIES[name].inputs([spec])
        alone["input_ids"][0, -spec[1] :] = batch["input_ids"][row, -spec[1] :]  # a row's words depend on its number
        want, _ = written_out(model, alone, method, forced[row : row + 1])
        assert (together.logits[row] - want).abs().max() < 1e-4
    assert together.trace.kept[:, 1].tolist() == together.trace.n_image.clamp(max=5).tolist()
