"""Methods that cut at several layers: batches == alone, stock == ours, beams, counts, annealing, their pure functions."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dyrate_lib import ST3, CDPruner, FastV, InputError, PyramidDrop, SparseVLM, generate
from dyrate_lib.clustering import cluster_and_merge
from dyrate_lib.engine import eager_engine
from dyrate_lib.masks import IMG, INS, PAD, SYS
from dyrate_lib.methods.sparsevlm import rank_deficit, text_raters
from dyrate_lib.methods.staged import Staged, keep_best, scale_cuts
from dyrate_lib.models import Adapter
from dyrate_lib.staged_decoder import StagedDecoder
from tests.contract import random_batch, small_model
from tests.tiny_families import FAMILIES, model_of, stock_inputs

TOLERANCE = 1e-4
COUNTS = dict(counts=(0.6, 0.35, 0.2), layers=(1, 3, 5))
METHODS = {
    "sparsevlm": SparseVLM(**COUNTS),
    "sparsevlm-fixed": SparseVLM(counts=(20, 12, 6), layers=(1, 3, 5)),
    "sparsevlm-drop": SparseVLM(**COUNTS, recycle=False),
    "sparsevlm-clusters": SparseVLM(counts=(9, 5, 0), layers=(0, 2, 6), cluster_size=3, merge_fraction=0.8),
    "sparsevlm-rank": SparseVLM(adaptive=True, layers=(0, 1, 3, 5), scale=0.7, bias=-2.0),
    "sparsevlm-rank-drop": SparseVLM(adaptive=True, scale=0.5, recycle=False),
    "sparsevlm-positions": SparseVLM(**COUNTS, renumber=False),
    "pyramiddrop": PyramidDrop(),
    "pyramiddrop-positions": PyramidDrop(renumber=False),
    "pyramiddrop-none": PyramidDrop(layers=(1, 2), ratios=(0.4, 0.0)),
    "st3": ST3(2, 2, 0.7, horizon=4),
    "st3-cosine": ST3(1, 3, 0.6, "cosine", floor=0.25, horizon=5),
    "st3-exponential": ST3(decay="exponential", floor=0.05, horizon=6),
}
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def forced(batch_size, steps, seed=1):
    return torch.randint(5, 200, (batch_size, steps), generator=torch.Generator().manual_seed(seed))


def stacked(rows):
    """Samples of their own as one left-padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    ids = [torch.nn.functional.pad(row["input_ids"], (width - row["input_ids"].shape[1], 0)) for row in rows]
    real = [
        torch.nn.functional.pad(torch.ones_like(row["input_ids"]), (width - row["input_ids"].shape[1], 0))
        for row in rows
    ]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(real)} | (
        {"pixel_values": torch.cat(pixels)} if pixels else {}
    )


@pytest.fixture(scope="module")
def ragged(tiny, alone):
    """Four samples: a picture, none, two pictures with a word between, a picture that nothing follows."""
    image = Adapter(tiny[0]).image_token_id
    rows = [{key: alone(b)[key] for key in ("input_ids", "pixel_values")} for b in range(4)]
    for row, keep in ((1, None), (3, "end")):
        ids = rows[row]["input_ids"][0]
        ids = ids[ids != image] if keep is None else ids[: int((ids == image).nonzero()[-1]) + 1]
        rows[row]["input_ids"] = ids[None]
    del rows[1]["pixel_values"]
    ids = rows[2]["input_ids"][0]
    last = int((ids == image).nonzero()[-1]) + 1
    block = torch.cat((ids[last : last + 1], ids[ids == image]))
    rows[2] = {
        "input_ids": torch.cat((ids[:last], block, ids[last:]))[None],
        "pixel_values": torch.cat((alone(2)["pixel_values"], alone(1)["pixel_values"])),
    }
    return rows


@by_method
def test_a_prompt_that_ends_with_its_picture_keeps_its_last_token_last(tiny, ragged, method):
    """Its row predicts the reply: a merged token must not come to stand behind it, nor a later cut take it away."""
    adapter = Adapter(tiny[0])
    runner = method.runner(adapter, adapter.embed(ragged[3]), 4)
    runner.prefill()
    rows = runner.state.rows
    assert int(rows.original[0, -1]) == int(rows.original.max()) and bool(rows.asked[0, -1])


@by_method
@pytest.mark.parametrize("kind", ["unequal", "ragged"])
def test_batch_equals_each_alone(tiny, batch, alone, ragged, method, kind):
    model, reply = tiny[0], forced(4, 6)
    rows = ragged if kind == "ragged" else [alone(b) for b in range(4)]
    together = generate(
        model, stacked(rows) if kind == "ragged" else batch, method, forced_tokens=reply, return_logits=True
    )
    for b in range(4):
        single = generate(model, rows[b], method, forced_tokens=reply[b : b + 1], return_logits=True)
        assert (together.logits[b] - single.logits[0]).abs().max() < TOLERANCE
        assert torch.equal(together.trace.kept_by_layer[b], single.trace.kept_by_layer[0])
        assert (together.trace.attention[b] - single.trace.attention[0]).abs().max() < 1e-5
        for step in range(6):
            assert together.trace.kept_at(b, step).tolist() == single.trace.kept_at(0, step).tolist()
    if kind == "ragged":  # nothing to cut: the row passes through
        plain = generate(model, rows[1], None, forced_tokens=reply[1:2], return_logits=True)
        assert (together.logits[1] - plain.logits[0]).abs().max() < TOLERANCE
        assert together.trace.kept_by_layer[1].sum() == 0


@by_method
@pytest.mark.parametrize("kind", ["unequal", "ragged"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stock_generate_equals_our_loop(tiny, batch, ragged, method, kind, attention):
    model = tiny[0]
    inputs = stacked(ragged) if kind == "ragged" else batch
    model.set_attn_implementation(attention)
    settings = dict(
        max_new_tokens=7, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    try:
        with method(model) as pruning:
            stock = model.generate(**inputs, **settings)
    finally:
        model.set_attn_implementation("sdpa")
    out = generate(model, inputs, method, max_new_tokens=7, eos_token_id=[], return_logits=True)
    assert torch.equal(stock.sequences, out.sequences)
    assert (torch.stack(stock.logits, 1) - out.logits).abs().max() < TOLERANCE
    assert torch.equal(torch.stack(pruning.kept, 1), out.trace.kept)


@by_method
def test_caches_hold_what_the_trace_says(tiny, alone, method):
    model, adapter = tiny[0], Adapter(tiny[0])
    prompt = adapter.embed(alone(0))
    text = int(prompt.length) - 36
    runner = StagedDecoder(adapter, prompt, method, 7)
    runner.prefill()
    reply = forced(1, 6)[0]
    for step in range(1, 7):
        runner.decode(reply[step - 1 : step])
        want = [text + step + n for n in runner.snapshot().by_layer[0].tolist()]
        assert runner.kv_lengths() == want
    with method(model):
        stock = model.generate(
            **alone(0), max_new_tokens=7, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
    trace = generate(model, alone(0), method, max_new_tokens=7, eos_token_id=[]).trace
    lengths = [layer.keys.shape[2] for layer in stock.past_key_values.layers]
    assert lengths == (trace.kept_by_layer[0, -1] + text + 6).tolist()


@by_method
@pytest.mark.parametrize("kind", ["alone", "ragged"])
def test_beam_scores_are_those_of_their_own_sequences(tiny, alone, ragged, method, kind):
    """The winning beam's score must be what our loop, forced along it, gives: so state followed the beams."""
    model = tiny[0]
    inputs = stacked(ragged) if kind == "ragged" else alone(2)
    with method(model):
        out = model.generate(
            **inputs, max_new_tokens=6, num_beams=2, num_return_sequences=2, do_sample=False, eos_token_id=None,
            length_penalty=1.0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    replies = out.sequences[:, inputs["input_ids"].shape[1] :]
    for beam in range(2):
        reply = replies[beam::2]
        along = generate(model, inputs, method, forced_tokens=reply, return_logits=True)
        logp = torch.log_softmax(along.logits, -1).gather(-1, reply[..., None])[..., 0].mean(-1)
        assert torch.allclose(logp, out.sequences_scores[beam::2], atol=1e-3)


FAMILY_METHODS = {
    "sparsevlm": SparseVLM(counts=(0.6, 0.35, 0.2)),
    "sparsevlm-rank": SparseVLM(adaptive=True, scale=0.6, bias=2.0),
    "pyramiddrop": PyramidDrop(),
    "st3": ST3(horizon=4),
}


@pytest.mark.parametrize("method", FAMILY_METHODS.values(), ids=FAMILY_METHODS.keys())
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, method):
    """One picture, none, two, one: alone == batch, stock == ours."""
    model, family, rows = model_of(name), FAMILIES[name], (((0,), 5), ((), 7), ((1, 2), 4), ((3,), 9))
    inputs, reply = family.inputs(rows), forced(4, 5)
    reply = reply % 80 + 20
    together = generate(model, inputs, method, forced_tokens=reply, return_logits=True)
    assert bool((together.trace.kept_by_layer[0, 0] < together.trace.n_image[0]).any())
    for row in range(4):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        single = {**family.inputs([rows[row]]), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        alone = generate(model, single, method, forced_tokens=reply[row : row + 1], return_logits=True)
        assert (alone.logits[0] - together.logits[row]).abs().max() < TOLERANCE
    out = generate(model, inputs, method, 5, eos_token_id=[], return_logits=True)
    with method(model):
        stock = model.generate(
            **stock_inputs(name, inputs), max_new_tokens=5, do_sample=False, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert torch.equal(stock.sequences, out.sequences)
    assert (torch.stack(stock.logits, 1) - out.logits).abs().max() < TOLERANCE


def test_sampling_several_sequences_per_prompt(tiny, batch):
    method = SparseVLM(adaptive=True, scale=0.5)
    torch.manual_seed(0)
    with method(tiny[0]) as pruning:
        out = tiny[0].generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=3, eos_token_id=None)
    kept = generate(tiny[0], batch, method, 1).trace.kept[:, 0]
    assert out.shape[0] == 12 and all(torch.equal(now, kept.repeat_interleave(3)) for now in pruning.kept)


KEEP_ALL = [
    SparseVLM(counts=(36, 36, 36), layers=(1, 3, 5)),
    SparseVLM(counts=(1.0, 1.0, 1.0)),
    SparseVLM(),
    SparseVLM(adaptive=True, scale=0.0),
    PyramidDrop(ratios=(1.0, 1.0, 1.0)),
    ST3(rho=1.0, floor=1.0),
]


@pytest.mark.parametrize("method", KEEP_ALL, ids=["whole", "share", "released-192-of-36", "rank", "pyramiddrop", "st3"])
def test_keeping_all_is_the_unpruned_model(tiny, batch, method):
    plain = generate(tiny[0], batch, None, max_new_tokens=8, eos_token_id=[], return_logits=True)
    pruned = generate(tiny[0], batch, method, max_new_tokens=8, eos_token_id=[], return_logits=True)
    assert torch.equal(plain.sequences, pruned.sequences)
    assert (plain.logits - pruned.logits).abs().max() < TOLERANCE
    assert bool((pruned.trace.kept_by_layer == 36).all())
    with method(tiny[0]):
        stock = tiny[0].generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(stock, plain.sequences)


@pytest.mark.parametrize("name", [n for n in METHODS if "rank" not in n])
def test_plan_is_what_happens(tiny, ragged, name):
    trace = generate(tiny[0], stacked(ragged), METHODS[name], max_new_tokens=7, eos_token_id=[]).trace
    for row in range(3):  # the fourth prompt ends in its picture, whose last token stays whatever the counts
        plan = METHODS[name].plan(int(trace.n_image[row]), 8, 7)
        assert plan.dtype == np.int64 and np.array_equal(plan, trace.kept_by_layer[row].numpy())
    assert bool((trace.kept_by_layer[0] < 36).any())


@by_method
def test_flops_are_those_of_the_counter(tiny, alone, method, monkeypatch):
    """The language model's own work; what a method computes to score and to merge is no part of it."""
    import dyrate_lib.methods.sparsevlm as sparsevlm
    import dyrate_lib.staged_decoder as decoder
    import dyrate_lib.staged_state as state

    aside = []

    def apart(function):
        def wrapped(*args, **kwargs):
            with FlopCounterMode(display=False) as own:
                result = function(*args, **kwargs)
            aside.append(own.get_total_flops())
            return result

        return wrapped

    owners = [(state.StagedState, name) for name in ("look", "cut", "leaving")]
    for owner, name in [*owners, (sparsevlm, "text_raters"), (decoder, "row_attention")]:
        monkeypatch.setattr(owner, name, apart(getattr(owner, name)))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = generate(tiny[0], alone(2), method, max_new_tokens=5, eos_token_id=[])
    assert out.flops("cached") == pytest.approx(counter.get_total_flops() - sum(aside), rel=0.001)
    # choosing costs least where one row is asked; with raters and merging somewhat more
    assert 0 < sum(aside) < 0.03 * counter.get_total_flops()
    assert out.flops("cached").ratio < 1.0 and out.flops("paper").ratio < 1.0


# -- ST3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["linear", "cosine", "exponential"])
def test_st3_share_falls_to_its_floor(decay):
    method = ST3(decay=decay, floor=0.2, horizon=10)
    shares = [method.read_share(step) for step in range(15)]
    assert shares[0] == 1.0 and all(b <= a for a, b in zip(shares, shares[1:]))
    assert shares[10:] == pytest.approx([0.2] * 5) and min(shares[:10]) > 0.2
    if decay == "linear":
        assert shares[5] == pytest.approx(0.6)


def test_st3_leaves_thirty_percent_on_32_layers():
    """The published figure, for both settings: image KV that the prompt leaves, over all layers."""
    for method in (ST3(3, 7, 0.5), ST3(3, 3, 0.7), ST3()):
        share = method.plan(576, 32, 1).sum() / (576 * 32)
        assert share == pytest.approx(0.30, abs=0.01), method
    assert ST3().cuts(32) == (3, 10, 17, 24, 31) and ST3().cuts(16) == (2, 6, 10, 14) and ST3().cuts(8) == (1, 3, 5, 7)


def test_st3_dropping_is_final_and_follows_the_newest_query(tiny, alone):
    method = ST3(3, 7, 1.0, floor=0.2, horizon=6)
    trace = generate(tiny[0], alone(1), method, max_new_tokens=9, eos_token_id=[]).trace
    sets = [set(trace.kept_at(0, step).tolist()) for step in range(9)]
    assert all(later < earlier for earlier, later in zip(sets[:6], sets[1:7])) and sets[6] == sets[8]
    assert [len(kept) for kept in sets] == method.plan(36, 8, 9)[:, 3].tolist() and len(sets[8]) == 8
    other = generate(tiny[0], alone(1), method, forced_tokens=forced(1, 9, seed=5)).trace
    assert set(other.kept_at(0, 6).tolist()) != sets[6]  # another reply, other tokens
    assert other.kept_at(0, 0).tolist() == trace.kept_at(0, 0).tolist()


def test_st3_keeps_the_earlier_of_equal_tokens():
    """Queries of zero attend to all alike: at the cuts and in every loop the first tokens of the picture stay."""
    model = copy.deepcopy(small_model())  # which others share
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    batch = random_batch(6, [(3, 4, True), (5, 1, False), (7, 9, True)], seed=1)
    method, engine = ST3(2, 3, 0.7, floor=0.2, horizon=5), eager_engine(model)
    try:
        for loop in ("reference", engine):
            trace = generate(model, batch, method, 7, eos_token_id=[], engine=loop).trace
            counts = method.plan(36, 8, 7)[:, 2].tolist()
            for row, n in ((0, 1), (1, 0), (2, 1)):
                assert [trace.kept_at(row, t).tolist() for t in range(7)] == [list(range(n * count)) for count in counts]
        out = generate(model, batch, method, 7, eos_token_id=[], engine="reference")
    finally:
        engine.release()
    with method(model):
        stock = model.generate(**batch, max_new_tokens=7, do_sample=False, eos_token_id=None)
    assert torch.equal(stock, out.sequences)


# -- what a model or a caller cannot have --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SparseVLM(budget=100), "no released list"),
        (lambda: SparseVLM(counts=(3, 2)), "2 counts for 3 layers"),
        (lambda: SparseVLM(counts=(3, 2, -1)), "whole numbers"),
        (lambda: SparseVLM(counts=(3, 2, 1.5)), "whole numbers"),
        (lambda: SparseVLM(counts=(3, 2, 1), layers=(5, 3, 1)), "rising"),
        (lambda: SparseVLM(cluster_size=0), "cluster_size"),
        (lambda: SparseVLM(adaptive=True).plan(576, 32), "not known in advance"),
        (lambda: PyramidDrop(ratios=(0.5,)), "1 ratios for 3 layers"),
        (lambda: PyramidDrop(ratios=(0.1, 0.5, 0.6)), "do not rise"),
        (lambda: PyramidDrop(layers=[]), "rising"),
        (lambda: PyramidDrop(layers=(1.5, 2, 3)), "rising"),
        (lambda: ST3(rho=1.5), "rho"),
        (lambda: ST3(first=0), "first"),
        (lambda: ST3(horizon=None), "horizon"),
        (lambda: ST3(decay="square"), "not known"),
        (lambda: ST3(decay="exponential", floor=0), "exponential"),
        (lambda: PyramidDrop().plan(-1, 8), "n_image"),
        (lambda: PyramidDrop().plan(36, 3), "too shallow"),
        (lambda: ST3(first=8).plan(36, 8), "can be cut"),
    ],
)
def test_bad_settings_are_refused(make, match):
    with pytest.raises(InputError, match=match):
        make()


@pytest.mark.parametrize(
    "method",
    [SparseVLM(layers=(2, 6, 15)), PyramidDrop(layers=(8, 16, 24)), PyramidDrop((0, 2), (0.5, 0.1)), ST3(first=8)],
)
def test_settings_beyond_the_depth_are_refused_before_any_work(tiny, batch, method):
    with pytest.raises(InputError, match="can be cut before layers 1 to 7"):
        generate(tiny[0], batch, method, max_new_tokens=1)
    with pytest.raises(InputError, match="can be cut before layers 1 to 7"), method(tiny[0]):
        pass
    assert not hasattr(tiny[0], "_dyrate_pruning")


def test_a_method_of_one_s_own_needs_two_bodies(tiny, batch):
    @dataclass
    class Halves(Staged):
        def cuts(self, n_layers):
            return tuple(range(2, n_layers, 2))

        def keeps(self, stage, current, n_image):
            return current // 2

    out = generate(tiny[0], batch, Halves(), max_new_tokens=2)
    assert out.trace.kept_by_layer[0, 0].tolist() == [36, 36, 18, 18, 9, 9, 4, 4]
    with pytest.raises(InputError, match="define cuts"):
        generate(tiny[0], batch, Staged(), max_new_tokens=1)


# -- pure functions ----------------------------------------------------------------------------------------------------


def test_released_settings_at_the_released_depth():
    assert SparseVLM().cuts(32) == (3, 7, 16) and SparseVLM(adaptive=True).cuts(32) == (3, 7, 16, 20)
    assert PyramidDrop().cuts(32) == (8, 16, 24) and PyramidDrop().cuts(40) == (10, 20, 30)
    for budget, real in ((192, 206.5), (128, 145.4), (64, 82.25)):  # nominal and real tokens at layer inputs
        assert SparseVLM(budget=budget).plan(576, 32).mean() == pytest.approx(real, abs=0.05)
    assert PyramidDrop().plan(576, 32)[0].tolist() == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert SparseVLM().cuts(12) == (1, 3, 6) and SparseVLM().cuts(4) == (1, 2, 3)


@given(st.lists(st.integers(1, 31), min_size=1, max_size=5, unique=True).map(sorted), st.integers(2, 80))
def test_scaled_cuts_rise_and_fit(cuts, n_layers):
    try:
        scaled = scale_cuts(cuts, n_layers)
    except InputError:
        assert n_layers < 64
        return
    assert all(b > a for a, b in zip(scaled, scaled[1:])) and scaled[0] >= 1 and scaled[-1] < n_layers
    assert n_layers != 32 or scaled == tuple(cuts)


@given(st.integers(1, 24), st.data())
def test_keep_best_keeps_as_many_and_the_best(n, data):
    scores = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9]), min_size=n, max_size=n)))
    count = data.draw(st.integers(0, n))
    keep = keep_best(scores[None], [count])[0]
    assert int(keep.sum()) == count
    if 0 < count < n:
        assert scores[keep].min() >= scores[~keep].max()


@settings(deadline=None)
@given(st.integers(1, 20), st.data(), st.integers(0, 1000))
def test_clusters_partition_and_average(n, data, seed):
    c = data.draw(st.integers(1, n))
    x = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed))
    found = cluster_and_merge(x, c)
    assert found.output.shape == (2, c, 6) and bool(((found.assignment >= 0) & (found.assignment < c)).all())
    for row in range(2):
        centres = found.centres[row].tolist()
        assert len(set(centres)) == c and found.assignment[row, centres].tolist() == list(range(c))
        for k in range(c):
            members = x[row][found.assignment[row] == k]
            assert torch.allclose(found.output[row, k], members.mean(0), atol=1e-5)
        single = cluster_and_merge(x[row : row + 1], c)
        assert torch.equal(single.assignment[0], found.assignment[row])
    if c == n:
        assert torch.allclose(found.output.sum(1), x.sum(1), atol=1e-4)


def test_clustering_refuses():
    x = torch.zeros(1, 3, 4)
    for c in (0, 4):
        with pytest.raises(InputError, match="clusters"):
            cluster_and_merge(x, c)
    with pytest.raises(InputError, match="noise"):
        cluster_and_merge(x, 1, torch.zeros(5))


def test_raters_are_text_above_the_average_or_the_last_column():
    types = torch.tensor(
        [[SYS, IMG, IMG, INS, INS, INS], [PAD, SYS, IMG, IMG, INS, IMG], [PAD, INS, INS, INS, INS, INS]]
    )
    embeds = torch.zeros(3, 6, 2)
    embeds[:, :, 0] = 1.0
    embeds[0, 4] = torch.tensor([3.0, 0.0])  # the word that the picture resembles
    chosen = text_raters(embeds, types)
    assert chosen[0].nonzero()[:, 0].tolist() == [4]
    assert chosen[1].nonzero()[:, 0].tolist() == [5] and chosen[2].nonzero()[:, 0].tolist() == [5]


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 100))
def test_rank_deficit(raters, n, seed):
    random = torch.Generator().manual_seed(seed)
    assert rank_deficit(torch.randn(raters, n, generator=random)) == n - min(raters, n)
    assert rank_deficit(torch.rand(raters, 1, generator=random).add(0.1).expand(raters, n)) == n - 1
    assert rank_deficit(torch.zeros(raters, n)) == n


def test_adaptive_counts_follow_the_rank(tiny, batch):
    trace = generate(tiny[0], batch, SparseVLM(adaptive=True, scale=0.5, recycle=False), max_new_tokens=2).trace
    counts = trace.kept_by_layer[:, 0]
    assert len({tuple(row.tolist()) for row in counts}) > 1  # samples differ
    everything = SparseVLM(adaptive=True, scale=5.0, recycle=False)
    assert generate(tiny[0], batch, everything, max_new_tokens=1).trace.kept_by_layer[:, 0, -1].tolist() == [0] * 4


def test_equal_cluster_scores_come_in_the_order_of_the_authors_topk():
    """With two clusters and no noise the two densest tokens tie; equal tokens tie all."""
    for seed in range(8):
        x = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(seed))
        found = cluster_and_merge(x, 2)
        assert torch.equal(found.centres[0], found.score[0].topk(2).indices)
    equal = cluster_and_merge(torch.ones(1, 5, 4), 1)
    assert torch.equal(equal.centres[0], equal.score[0].topk(1).indices)


def test_settings_may_be_arrays():
    listed = SparseVLM(counts=[5, 4, 2], layers=[1, 3, 5])
    assert SparseVLM(counts=torch.tensor([5, 4, 2]), layers=torch.tensor([1, 3, 5])) == listed
    assert PyramidDrop(ratios=np.array([0.5, 0.25, 0.125])).ratios == [0.5, 0.25, 0.125]
    assert CDPruner(tokens=np.int64(9)).kept_count(36) == 9 and FastV(2, np.float32(0.5)).rate == 0.5
