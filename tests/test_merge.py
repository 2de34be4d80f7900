"""MergeRate: what is dropped joins what stays, and a kept token weighs what it stands for, as if its group were still there."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib import (
    DyRate,
    FastV,
    InputError,
    MergeRate,
    NoReduction,
    RatePath,
    attention,
    budget,
    generate,
    masks,
    merging,
)
from dyrate_lib.budgets import cost_ratio
from dyrate_lib.engine import select
from dyrate_lib.evaluate import describe, predictor_hash
from dyrate_lib.masks import IMG, INS
from dyrate_lib.models import Adapter
from tests.contract import (
    GROUPED,
    ROWS,
    Shape,
    lively_predictor,
    one_row,
    random_batch,
    run,
    small_model,
    some_reply,
    two_pictures,
)
from tests.tiny_families import FAMILIES, model_of

LAYERS, N, STEPS = 8, 36, 5
reply = functools.partial(some_reply, steps=STEPS)
FALLING = (0.5, 0.5, 0.8, 0.9, 0.9)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def padded():
    return random_batch(6, ROWS)


# -- the rule written out: groups as lists, and keys that are really repeated ------------------------------------------------


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def picked(scores, tokens, count, spread):
    """Tokens one by one: the highest score left, or the one whose nearest among those picked is farthest."""
    out: list[int] = []
    for j in range(count):
        left = [i for i in range(len(scores)) if i not in out]
        if int((j + 1) * spread + 1e-9) > int(j * spread + 1e-9):
            out.append(max(left, key=lambda i: (min([1 - cosine(tokens[i], tokens[o]) for o in out] or [2.0]), -i)))
        else:
            out.append(max(left, key=lambda i: (float(scores[i]), -i)))
    return out


def grouped(tokens, centres, pictures):
    """For every token the centre that it joins."""
    return [
        i if i in centres else max(centres, key=lambda c: (pictures[c] == pictures[i], cosine(tokens[i], tokens[c])))
        for i in range(len(tokens))
    ]


def written_out(model, inputs, method, forced):
    """Logits [steps, vocab] of one sample without padding."""
    adapter = Adapter(model)
    prompt = adapter.embed(inputs)
    image, heads = (prompt.types[0] == IMG).nonzero()[:, 0].tolist(), adapter.n_heads
    pictures = [0] * len(image) if prompt.picture_index is None else prompt.picture_index[0, : len(image)].tolist()
    first, length, n = method.layer, prompt.types.shape[1], len(image)
    kept = [n - int(method.rates[min(t, len(method.rates) - 1)] * n + 1e-9) for t in range(forced.shape[1])]
    caches: dict[int, list] = {}
    logits, centres, tokens, groups, q = [], [], [], [], None

    def attend(index, q, k, v, columns, sizes):
        """Each key as many times as it stands for; `columns` order what is in the caches, a row reads up to its own."""
        k, v = (part.repeat_interleave(heads // part.shape[1], 1)[0] for part in (k, v))
        again = torch.tensor([sizes.get(column, 1) if index >= first else 1 for column in columns])
        where = torch.tensor(columns).repeat_interleave(again)
        scores = q[0] @ k.repeat_interleave(again, 1).transpose(1, 2) * q.shape[-1] ** -0.5
        rows = torch.tensor(columns[-q.shape[2] :])
        scores = scores.masked_fill(where[None] > rows[:, None], -torch.inf)
        return (torch.softmax(scores, -1) @ v.repeat_interleave(again, 1))[None]

    for step in range(forced.shape[1]):
        x = prompt.embeds if step == 0 else adapter.embed_tokens(forced[:, step - 1 : step]).to(prompt.embeds.dtype)
        positions = prompt.position_ids if step == 0 else prompt.last_position + step
        columns = list(range(length)) if step == 0 else [length + step - 1]
        sizes: dict[int, int] = {}
        if step and n:  # what leaves now joins again, whole groups at a time
            stays = list(range(kept[step]))
            joins = grouped(tokens, stays, [pictures[c] for c in centres]) if stays else []
            for rank, to in enumerate(joins):
                sizes[image[centres[to]]] = sizes.get(image[centres[to]], 0) + groups[rank]
        for layer in range(adapter.n_layers):
            if layer == first and step == 0 and n:
                k_last = caches[first - 1][0].repeat_interleave(heads // caches[first - 1][0].shape[1], 1)
                scores = q[0] @ k_last[0].transpose(1, 2) * q.shape[-1] ** -0.5
                scores = torch.softmax(scores.masked_fill(torch.ones(scores.shape[1:]).triu(1) > 0, -torch.inf), -1)
                asks = [i for i in range(length) if int(prompt.types[0, i]) == INS] or [length - 1]
                weights = scores.amax(0)[asks].mean(0) if method.rated_by == "text" else scores[:, -1].mean(0)
                states = x[0, image]
                centres = picked(weights[image], states, kept[0], method.spread)
                owner = grouped(states, centres, pictures) if centres else []
                groups = [owner.count(c) for c in centres]
                tokens = [states[c] for c in centres]
                if method.average:
                    tokens = [states[[i for i in range(n) if owner[i] == c]].mean(0) for c in centres]
                x = x.clone()
                for c, state in zip(centres, tokens, strict=True):
                    x[0, image[c]] = state
                left = [column for column in range(length) if column not in image or image.index(column) in centres]
                x, positions, columns = x[:, left], positions[:, left], left
                sizes = {image[c]: size for c, size in zip(centres, groups, strict=True)}
            if not method.weigh:
                sizes = {}
            q, k, v = adapter.project(layer, adapter.normed_input(layer, x), adapter.rotary(positions, x))
            seen = columns
            if step:
                k, v = torch.cat((caches[layer][0], k), 2), torch.cat((caches[layer][1], v), 2)
                seen = caches[layer][2] + columns
            caches[layer] = [k, v, seen]
            if layer >= first and step and n:
                gone = {image[c] for c in centres[kept[step] :]}
                stay = [place for place, column in enumerate(seen) if column not in gone]
                k, v, seen = k[:, :, stay], v[:, :, stay], [seen[place] for place in stay]
            x = adapter.finish(layer, x, attend(layer, q, k, v, seen, sizes))
        logits.append(adapter.logits(x[:, -1])[0])
    return torch.stack(logits)


METHODS = {
    "in turns": MergeRate(rates=(0.8,), layer=2, spread=0.5),
    "falling": MergeRate(rates=FALLING, layer=1),
    "by the last row": MergeRate(rates=(0.6, 0.8), layer=2, rated_by="last", spread=0.5),
    "by attention, not averaged": MergeRate(rates=(0.7, 0.9), layer=3, spread=0.0, average=False),
    "by distance, not weighed": MergeRate(rates=(0.75,), layer=1, spread=1.0, weigh=False),
    "to none": MergeRate(rates=(0.5, 0.5, 1.0), layer=2, spread=0.3),
}


@pytest.mark.parametrize("shape", [Shape(), GROUPED], ids=["heads", "grouped"])
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_the_loop_is_the_rule_written_out(shape, method):
    """In float64, sample by sample of a padded batch, with keys and values repeated as often as their groups are large."""
    model = small_model(shape).double()
    try:
        padded = {k: v.double() if v.is_floating_point() else v for k, v in random_batch(6, ROWS).items()}
        forced = reply(3)
        out = run(model, padded, method, forced)
        for row in range(3):
            want = written_out(model, one_row(padded, row), method, forced[row : row + 1])
            assert (out.logits[row] - want).abs().max() < 1e-5
    finally:
        model.float()


def test_pictures_of_a_prompt_keep_their_tokens_to_themselves(model):
    inputs, forced = two_pictures(), reply(1)
    for method in (MergeRate(rates=(0.9,), layer=1), MergeRate(rates=FALLING, layer=2, spread=1.0)):
        out = run(model, inputs, method, forced)
        assert (out.logits[0] - written_out(model, inputs, method, forced)).abs().max() < 1e-4
    tokens, ranking = torch.randn(1, 8, 4), torch.tensor([[1, 6, 3, 0, 2, 4, 5, 7]])
    pictures = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    found = merging.owners(tokens, ranking[:, :2], torch.tensor([2]), pictures)
    assert found.tolist() == [[0] * 4 + [1] * 4]
    assert merging.owners(tokens, ranking[:, :2], torch.tensor([1]), pictures).tolist() == [[0] * 8]  # none of its own is left


# -- the tensor functions --------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 14), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.data())
@settings(max_examples=60, deadline=None)
def test_orders_and_groups(seed, n, spread, data):
    """Against lists; absent tokens last; any beginning is what a shorter order begins with."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, n, 5, generator=random, dtype=torch.float64)
    scores, there = torch.rand(2, n, generator=random), [data.draw(st.integers(0, n)) for _ in range(2)]
    for row in range(2):
        scores[row, there[row] :] = -torch.inf
    most = data.draw(st.integers(0, n))
    order = merging.spread_order(scores, tokens, most, spread)
    assert [sorted(row) for row in order.tolist()] == [list(range(n))] * 2
    shorter = merging.spread_order(scores, tokens, most // 2, spread)
    assert torch.equal(order[:, : most // 2], shorter[:, : most // 2])
    kept = torch.tensor([min(most, count) for count in there])
    owner = merging.owners(tokens, order[:, :most], kept) if most else torch.zeros(2, n, dtype=torch.long)
    sizes = merging.sizes(owner, torch.isfinite(scores), max(most, 1))
    for row in range(2):
        real = there[row]
        assert set(order[row, :real].tolist()) == set(range(real))
        want = picked(scores[row, :real], tokens[row, :real], int(kept[row]), spread)
        assert order[row, : kept[row]].tolist() == want
        if want:
            joined = grouped(tokens[row, :real], want, [0] * real)
            assert [want[rank] for rank in owner[row, :real].tolist()] == joined
            assert sizes[row, : kept[row]].tolist() == [joined.count(c) for c in want]
            assert float(sizes[row].sum()) == real
    if most:
        means = merging.averages(tokens, owner, torch.isfinite(scores), most)
        if kept[0]:
            members = tokens[0, : there[0]][owner[0, : there[0]] == 0]
            assert (means[0, 0] - members.mean(0)).abs().max() < 1e-5
    if spread == 0:
        assert torch.equal(order, masks.rank_tokens(scores, torch.isfinite(scores)))


def test_a_long_question_is_read_in_parts(model, padded, monkeypatch):
    """However many of its rows are held at once, the same."""
    whole = run(model, padded, MergeRate(rates=FALLING), reply(3)).logits
    monkeypatch.setattr(attention, "ROWS", 5)
    assert (run(model, padded, MergeRate(rates=FALLING), reply(3)).logits - whole).abs().max() < 1e-4


def test_equals_go_in_order():
    order = merging.spread_order(torch.ones(1, 6), torch.ones(1, 6, 3), 4, 0.5)
    assert order.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert merging.owners(torch.ones(1, 6, 3), order[:, :2], torch.tensor([2])).tolist() == [[0, 1, 0, 0, 0, 0]]


# -- what holds beside ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [Shape(), GROUPED], ids=["heads", "grouped"])
def test_keeping_all_is_the_unpruned_loop(shape, padded):
    model, forced = small_model(shape), reply(3)
    plain = run(model, padded, NoReduction(), forced)
    for method in (MergeRate(rates=(0.0,)), MergeRate(rates=(0.0,), layer=4, spread=1.0)):
        out = run(model, padded, method, forced)
        assert (out.logits - plain.logits).abs().max() < 1e-4
        assert torch.equal(out.trace.kept_by_layer, plain.trace.kept_by_layer)
        assert float(out.flops("cached")) == float(plain.flops("cached"))


@pytest.mark.parametrize("shape", [Shape(), GROUPED], ids=["heads", "grouped"])
def test_without_its_parts_it_is_the_path_that_drops(shape, padded):
    model, forced = small_model(shape), reply(3)
    bare = run(model, padded, MergeRate(rates=FALLING, layer=2, rated_by="last", spread=0.0, weigh=False, average=False), forced)
    path = run(model, padded, RatePath(2, FALLING), forced)
    assert torch.equal(bare.logits, path.logits) and torch.equal(bare.trace.kept_by_layer, path.trace.kept_by_layer)
    none = {"rated_by": "last", "spread": 0.0, "weigh": False, "average": False}
    for part in (dict(rated_by="text"), dict(spread=0.5), dict(weigh=True), dict(average=True)):
        other = MergeRate(rates=FALLING, layer=2, **{**none, **part})
        assert (run(model, padded, other, forced).logits - path.logits)[:2].abs().max() > 1e-3


def test_a_predictor_sets_the_rate(model, padded):
    """The counts are DyRate's own: the rule that sets them sees the same, as long as the layers below P do."""
    predictor, forced = lively_predictor(), reply(3)
    mine = run(model, padded, MergeRate(predictor, layer=3), forced)
    theirs = run(model, padded, DyRate(predictor, layer=3), forced)
    assert torch.equal(mine.trace.kept[:, 0], theirs.trace.kept[:, 0])
    assert bool((mine.trace.kept[:, 1:] <= mine.trace.kept[:, :-1]).all()) and len(set(mine.trace.kept[0].tolist())) > 1
    counts = zip(mine.trace.kept.tolist(), mine.trace.n_image.tolist(), strict=True)
    replayed = [[1 - k / max(n, 1) for k in kept] for kept, n in counts]
    again = run(model, padded, MergeRate(rates=replayed, layer=3), forced)
    assert (again.logits - mine.logits).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [Shape(), GROUPED], ids=["heads", "grouped"])
def test_a_row_of_a_batch_is_that_row_alone(shape, padded):
    model, method, forced = small_model(shape), MergeRate(rates=FALLING, layer=2), reply(3)
    out = run(model, padded, method, forced)
    for row in range(3):
        one = run(model, one_row(padded, row), method, forced[row : row + 1])
        assert (one.logits[0] - out.logits[row]).abs().max() < 1e-4
        assert torch.equal(one.trace.kept_by_layer[0], out.trace.kept_by_layer[row])
        assert all(torch.equal(one.trace.kept_at(0, t), out.trace.kept_at(row, t)) for t in range(STEPS))
    text = run(model, one_row(padded, 2), None, forced[2:])  # nothing to merge: passed through
    assert (text.logits[0] - out.logits[2]).abs().max() < 1e-4


def test_rows_that_keep_different_numbers(model, padded):
    method = MergeRate(rates=[(0.5, 0.9), (0.9, 0.9), (0.0, 0.0)], layer=2)
    out = run(model, padded, method, reply(3))
    for row, rates in enumerate(method.rates):
        one = run(model, one_row(padded, row), MergeRate(rates=rates, layer=2), reply(3)[row : row + 1])
        assert (one.logits[0] - out.logits[row]).abs().max() < 1e-4


# -- what is counted, settings, and where it does not run -----------------------------------------------------------------------


def test_trace_plan_and_flops(model, padded):
    """Counted as the same rates without merging: the prompt's pass is cut too."""
    method = MergeRate(rates=FALLING, layer=2)
    out, path = (run(model, padded, m, reply(3)) for m in (method, RatePath(2, FALLING)))
    assert out.trace.layer == 2 and out.trace.kept[0].tolist() == [18, 18, 8, 4, 4]
    assert method.plan(N, LAYERS, STEPS).tolist() == out.trace.kept_by_layer[1].tolist()
    for convention in ("paper", "cached"):
        assert float(out.flops(convention)) == float(path.flops(convention)) < out.flops(convention).unpruned
    assert len(out.trace.kept_at(0, 2)) == 8 and out.trace.kept_at(0, 2).tolist() == sorted(out.trace.kept_at(0, 2).tolist())


def test_a_budget_scales_the_rates(model):
    found = budget(MergeRate(rates=(0.5,), spread=0.25), model, flops=0.6, prompt_length=50, steps=20)
    assert (found.layer, found.spread, found.weigh) == (1, 0.25, True)
    assert cost_ratio(found, model, prompt_length=50, steps=20) == pytest.approx(0.6, rel=0.02)
    with pytest.raises(InputError, match="MergeRate: a predictor"):
        budget(MergeRate(lively_predictor()), model, flops=0.9, prompt_length=50)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(predictor=lively_predictor(), rates=(0.5,)), "one of the two"),
        (dict(rates=(0.5,), spread=1.5), "spread=1.5"), (dict(rates=(0.5,), spread=True), "spread=True"),
        (dict(rates=(0.5,), spread="half"), "spread='half'"),
        (dict(rates=(0.5,), rated_by="first"), "rated_by='first'"), (dict(rates=(0.5,), weigh=1), "weigh=1"),
        (dict(rates=(0.5,), average="yes"), "average='yes'"), (dict(rates=(1.5,)), "1.5"), (dict(rates="0.5"), "rates='0.5'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        MergeRate(**wrong)


def test_it_describes_itself():
    assert MergeRate() == MergeRate(rates=(0.8,)) and cost_ratio(MergeRate()) == pytest.approx(0.33, abs=0.005)
    assert describe(MergeRate(rates=(0.1, 0.2))) == {
        "method": "merge", "predictor": None, "rates": [0.1, 0.2], "layer": 1, "rated_by": "text", "spread": 0.4,
        "weigh": True, "average": True,
    }  # fmt: skip
    predictor = lively_predictor()
    assert describe(MergeRate(predictor, layer=2))["predictor"] == predictor_hash(predictor)


def test_the_graph_engine_and_a_layer_too_deep_are_refused(model, padded, tiny, batch):
    method = MergeRate(rates=(0.5,))
    with pytest.raises(InputError, match="1 to 7"):
        generate(model, padded, MergeRate(rates=(0.5,), layer=8), 2)
    engine = select.eager_engine(tiny[0])
    try:
        with pytest.raises(InputError, match="MergeRate.*engine='reference'"):
            generate(tiny[0], batch, method, 2, engine=engine)
    finally:
        engine.release()


def test_sampling_and_several_sequences(model, padded):
    """Every sequence drawn saw the logits of the loop along it."""
    method = MergeRate(rates=FALLING)
    out = generate(model, padded, method, 5, do_sample=True, seed=1, num_return_sequences=2, return_logits=True, eos_token_id=[])
    twice = {key: value.repeat_interleave(2, 0) for key, value in padded.items()}
    again = run(model, twice, method, out.new_tokens)
    assert (out.logits - again.logits).abs().max() < 1e-4 and not torch.equal(out.new_tokens[0], out.new_tokens[1])


def test_half_precision(model, padded):
    half = copy.deepcopy(model).to(torch.bfloat16)
    out, plain = (run(half, padded, method, reply(3)) for method in (MergeRate(rates=FALLING), None))
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    assert out.trace.kept[0].tolist() == [18, 18, 8, 4, 4]
    all_kept = run(half, padded, MergeRate(rates=(0.0,)), reply(3)).logits.float()
    assert (all_kept - plain.logits.float()).norm() < 0.05 * plain.logits.float().norm()


def test_a_picture_at_the_end(model):
    """The last row is an image token: it answers whether it is kept or not."""
    batch = random_batch(6, [(2, 0, True)], seed=5)
    plain = run(model, batch, None, reply(1))
    kept = run(model, batch, MergeRate(rates=(0.0,), layer=2), reply(1))
    assert (kept.logits - plain.logits).abs().max() < 1e-4
    assert run(model, batch, MergeRate(rates=(0.9,), layer=2), reply(1)).logits.isfinite().all()
    bare = MergeRate(rates=(0.9,), layer=2, rated_by="last", spread=0.0, weigh=False, average=False)
    assert torch.equal(run(model, batch, bare, reply(1)).logits, run(model, batch, RatePath(2, (0.9,)), reply(1)).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """One picture, two, none, one again in a batch: each row as the loop written out answers it alone."""
    model, rows, method = model_of(name), (((0,), 6), ((1, 2), 9), ((), 12), ((3,), 3)), MergeRate(rates=(0.6, 0.8), layer=1)
    forced = reply(4, steps=3) % 90 + 3
    batch = FAMILIES[name].inputs(rows)
    together = run(model, batch, method, forced)
    for row, spec in enumerate(rows):
        alone = FAMILIES[name].inputs([spec])
        alone["input_ids"][0, -spec[1] :] = batch["input_ids"][row, -spec[1] :]  # a row's words depend on its number
        want = written_out(model, alone, method, forced[row : row + 1])
        assert (together.logits[row] - want).abs().max() < 1e-4


def test_what_it_is_for(model, padded):
    """On random weights too: merged and weighed, the logits stay nearer the unpruned model's than FastV's do."""
    forced = reply(3)
    plain, dropped, merged = (run(model, padded, m, forced).logits for m in (None, FastV(1, 0.75), MergeRate(rates=(0.75,))))
    assert (merged - plain)[:2].norm() < (dropped - plain)[:2].norm()
