"""RelookRate: which tokens, how many a layer, and that a pass under masks tells the same as the loop that reads less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib import (
    DyRate,
    InputError,
    RatePath,
    RatePredictor,
    RelookRate,
    budget,
    chat_prompt,
    generate,
    masks,
    prepare_inputs,
)
from dyrate_lib.accounting import flops
from dyrate_lib.attention import causal_layer, image_scores, padding_allowed, row_attention, with_response
from dyrate_lib.engine import select
from dyrate_lib.evaluate import beam_records, describe, predictor_hash
from dyrate_lib.masks import PAD
from dyrate_lib.models import Adapter, model_info
from dyrate_lib.teacher_forcing import masked_attention
from tests.contract import lively_predictor, random_batch, repeated, small_model

LAYERS, N, STEPS = 8, 36, 6
RATES = (0.9, 0.2, 0.6, 0.5, 0.95, 0.4)


def reply(rows, seed=3):
    return torch.randint(5, 200, (rows, STEPS), generator=torch.Generator().manual_seed(seed))


def ours(model, inputs, method, **kwargs):
    return generate(model, inputs, method, engine="reference", return_logits=True, **kwargs)


# -- how many a layer reads ----------------------------------------------------------------------------------------------


@given(st.integers(0, 600), st.floats(0, 1), st.floats(-1, 1), st.integers(1, 10), st.integers(1, 30))
def test_counts_of_the_layers(n, share, tilt, layer, more):
    method = RelookRate(rates=(0.5,), layer=layer, tilt=tilt)
    method.prepare(layer + more, 4, torch.device("cpu"))
    k = int(share * n)
    counts = [int(method.at_layer(i, torch.tensor([k]), torch.tensor([n]))[0]) for i in range(layer, layer + more)]
    assert sum(counts) == k * more and 0 <= min(counts) and max(counts) <= n
    steps = [b - a for a, b in zip(counts, counts[1:], strict=False)]
    assert all(step * tilt <= 0 for step in steps)
    if tilt == 0 or k in (0, n):
        assert set(counts) == {k}


def test_counts_by_hand():
    method = RelookRate(rates=(0.75,), layer=3, tilt=1.0)
    method.prepare(8, 4, torch.device("cpu"))
    assert method.plan(36, 8, 2).tolist() == [[36] * 8, [36] * 3 + [18, 13, 9, 5, 0]]
    method.tilt = -0.5
    assert method.plan(36, 8, 2)[1].tolist() == [36] * 3 + [5, 7, 9, 11, 13]


# -- which tokens --------------------------------------------------------------------------------------------------------


def rows_scores(model, inputs, forced, layer):
    """[steps, B, N]: importance by each query row; layers below P read everything, so no method changes it."""
    adapter = Adapter(model)
    prompt = adapter.embed(inputs)
    x, types, positions = with_response(adapter, prompt, forced)
    rotary, allowed = adapter.rotary(positions, x), padding_allowed(types)
    for index in range(layer):
        x, q, k, _ = causal_layer(adapter, index, x, rotary, allowed)
    out = []
    for step in range(forced.shape[1]):
        row = prompt.types.shape[1] - 1 + step
        attention = row_attention(q[:, :, row : row + 1], k[:, :, : row + 1], types[:, : row + 1] != PAD)
        out.append(image_scores(attention, prompt.image_index))
    return torch.stack(out)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("window", [1, 3])
def test_tokens_are_those_the_newest_rows_look_at(tiny, batch, pool, window):
    forced = reply(4)
    out = ours(tiny[0], batch, RelookRate(rates=RATES, window=window, pool=pool), forced_tokens=forced)
    scores = rows_scores(tiny[0], batch, forced, 3)
    for step, rate in enumerate(RATES):
        rows = scores[max(0, step - window + 1) : step + 1]
        top = (rows.mean(0) if pool == "mean" else rows.amax(0)).topk(36 - int(36 * rate)).indices
        for b in range(4):
            assert out.trace.kept_at(b, step).tolist() == sorted(top[b].tolist())
    back = [set(out.trace.kept_at(0, t).tolist()) - set(out.trace.kept_at(0, t - 1).tolist()) for t in range(1, STEPS)]
    assert all(back[i] for i in (0, 2, 4))  # where the rate falls tokens come back


def test_one_row_and_no_tilt_is_dyrate_reranked_and_reversible(tiny, batch):
    predictor = lively_predictor()
    mine = ours(tiny[0], batch, RelookRate(predictor, layer=3, window=1), max_new_tokens=STEPS, eos_token_id=[])
    theirs = ours(
        tiny[0], batch, DyRate(predictor, 3, rank="step", reversible=True), max_new_tokens=STEPS, eos_token_id=[]
    )
    assert torch.equal(mine.logits, theirs.logits) and torch.equal(mine.trace.kept_by_layer, theirs.trace.kept_by_layer)
    wide = ours(tiny[0], batch, RelookRate(predictor, layer=3), forced_tokens=mine.new_tokens)
    assert not torch.equal(mine.logits, wide.logits) and torch.equal(mine.trace.kept, wide.trace.kept)


# -- masked == read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [0.0, 0.6, -1.0])
def test_masked_equals_reads(tiny, batch, tilt):
    """Every layer under a mask of its own, teacher-forced, against the loop that reads only what stays."""
    forced, window = reply(4, seed=5), 3
    method = RelookRate(rates=RATES, window=window, tilt=tilt)
    out = ours(tiny[0], batch, method, forced_tokens=forced)
    adapter, scores = Adapter(tiny[0]), rows_scores(tiny[0], batch, forced, 3)
    prompt = adapter.embed(batch)
    x, types, positions = with_response(adapter, prompt, forced)
    rotary, allowed = adapter.rotary(positions, x), padding_allowed(types)
    for index in range(3):
        x, *_ = causal_layer(adapter, index, x, rotary, allowed)
    for index in range(3, LAYERS):
        keep = torch.zeros(4, STEPS + 1, N)
        for step in range(STEPS):
            order = masks.rank_tokens(scores[max(0, step - window + 1) : step + 1].mean(0))
            count = method.at_layer(index, out.trace.kept[:, step], out.trace.n_image)
            assert step == 0 or torch.equal(count, out.trace.kept_by_layer[:, step, index])
            keep[:, step] = masks.ranking_to_tokens(masks.prefix_masks(count, N), order).float()
        keep[:, -1] = keep[:, -2]
        mask = masks.response_mask(keep, prompt.image_index, prompt.types, STEPS)
        q, k, v = adapter.project(index, adapter.normed_input(index, x), rotary)
        x = adapter.finish(index, x, masked_attention(q, k, v, mask))
    start = prompt.types.shape[1] - 1
    assert (adapter.logits(x[:, start : start + STEPS]) - out.logits).abs().max() < 1e-4
    assert bool((out.trace.kept_by_layer[:, 0] == N).all())  # the prompt is read in full


@pytest.mark.parametrize("kind", ["step", "none", "hidden", "foreign"])
def test_any_predictor_sets_the_rate(tiny, batch, alone, kind):
    predictor = RatePredictor(4, 10, 3, inputs=kind, hidden=64 if kind == "hidden" else None)
    random = torch.Generator().manual_seed(2)
    predictor.linear.weight.data.normal_(0, 5, generator=random)
    predictor.linear.bias.data.normal_(0, 1, generator=random)
    if kind == "foreign":
        predictor.bank, predictor.bank_keys = torch.rand(3, 64, 4, 4, generator=random).half(), torch.arange(3)
    method = RelookRate(predictor, tilt=0.3)
    whole = ours(tiny[0], batch, method, max_new_tokens=STEPS, eos_token_id=[])
    for b in range(4):
        one = ours(tiny[0], alone(b), method, forced_tokens=whole.new_tokens[b : b + 1])
        assert (one.logits[0] - whole.logits[b]).abs().max() < 1e-4
        assert torch.equal(one.trace.kept_by_layer[0], whole.trace.kept_by_layer[b])
    if kind in ("step", "none"):
        assert method.plan(36, 8, STEPS).tolist() == whole.trace.kept_by_layer[0].tolist()
    else:
        with pytest.raises(InputError, match="not known beforehand"):
            method.plan(36, 8, STEPS)


# -- around it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, says",
    [
        ({}, "one of the two"), (dict(predictor=lively_predictor(), rates=(0.5,)), "one of the two"),
        (dict(rates=(0.5,), window=0), "window=0"), (dict(rates=(0.5,), window=2.5), "window=2.5"),
        (dict(rates=(0.5,), pool="median"), "pool='median'"), (dict(rates=(0.5,), tilt=1.5), "tilt=1.5"),
        (dict(rates=(0.5,), tilt=float("nan")), "tilt=nan"), (dict(rates=(0.5,), tilt=True), "tilt=True"),
        (dict(rates=(1.5,)), "rate=1.5"), (dict(predictor=RatePredictor(4, inputs="oracle")), "replay its rates"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        RelookRate(**settings)


def test_it_describes_itself(tmp_path):
    predictor = RatePredictor(4, layer=2)
    method = RelookRate(predictor.save(tmp_path / "p.safetensors"), tilt=0.25)
    assert describe(method) == {
        "method": "relook", "predictor": predictor_hash(predictor), "rates": None, "layer": 2, "window": 4, "pool": "mean",
        "tilt": 0.25,
    }  # fmt: skip
    assert describe(RelookRate(rates=(0.1, 0.2)))["rates"] == [0.1, 0.2]


def test_a_schedule_is_searched_for_a_budget(tiny):
    asked = RelookRate(rates=(0.5, 0.9), tilt=0.5)
    found = budget(asked, tiny[0], flops=0.8, convention="paper", prompt_length=50, steps=20)
    cost = flops(model_info(tiny[0]), 50, 36, found.plan(36, 8, 20), "paper")
    assert found.tilt == 0.5 and cost.ratio == pytest.approx(0.8, abs=0.01)
    with pytest.raises(InputError, match="set in training"):
        budget(RelookRate(lively_predictor()), tiny[0], flops=0.9, prompt_length=50)


def test_the_graph_engine_says_why_not(tiny, batch):
    engine = select.eager_engine(tiny[0])
    try:
        for method in (RelookRate(rates=(0.5,), window=1), RelookRate(lively_predictor(), tilt=0.5)):
            with pytest.raises(InputError, match="RelookRate.*engine='reference'"):
                generate(tiny[0], batch, method, 2, engine=engine)
    finally:
        engine.release()


def test_plans_of_reversible_methods_read_the_prompt_in_full(tiny, alone):
    path = RatePath(3, (0.5, 0.9, 0.2), reversible=True)
    out = ours(tiny[0], alone(1), path, forced_tokens=reply(1)[:, :3])
    assert out.trace.kept_by_layer[0].tolist() == [[36] * 8, *([36] * 3 + [n] * 5 for n in (4, 29))]
    assert path.plan(36, 8, 3).tolist() == out.trace.kept_by_layer[0].tolist()


def test_beams_of_reversible_methods_are_counted_with_the_whole_prompt(tiny, pictures):
    """As our own loop counts the same path."""
    inputs = prepare_inputs(tiny[1], pictures[:1], [chat_prompt("Describe.")])
    method = RelookRate(rates=(0.5, 0.9, 0.2), tilt=0.5)
    record = beam_records(*tiny, inputs, method, 3, {"num_beams": 2}, ["a"])[0]
    assert record["flops"]["paper-prefill"] == 1.0
    out = ours(tiny[0], inputs, method, forced_tokens=torch.tensor([record["tokens"]]))
    assert record["flops"]["paper"] == pytest.approx(out.flops("paper").ratio, abs=1e-6)


class Leaning(RatePath):
    """Ranked once, tokens may come back, and odd layers read half: what `at_layer` is for without ranking anew."""

    reversible = True

    def at_layer(self, layer, kept, n_image):
        return kept // 2 if layer % 2 else kept


def test_layers_of_their_own_follow_the_beams():
    """Under stock beams every hypothesis saw what our loop reads along it, layer by layer."""
    model, inputs = small_model(), random_batch(6, ((3, 5, True), (1, 12, True)))
    method = Leaning(3, (0.2, 0.7, 0.4, 0.6), reversible=True)
    with method(model):
        out = model.generate(
            **inputs, max_new_tokens=4, num_beams=3, num_return_sequences=3, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    replies = out.sequences[:, inputs["input_ids"].shape[1] :]
    mine = ours(model, repeated(inputs, 3), method, forced_tokens=replies)
    score = torch.log_softmax(mine.logits, -1).gather(-1, replies[..., None])[..., 0].mean(-1)
    assert (score - out.sequences_scores).abs().max() < 1e-3
    assert mine.trace.kept_by_layer[0].tolist() == [[36] * 8, *([36] * 3 + [n // 2, n] * 2 + [n // 2] for n in (11, 22, 15))]
