"""Training the controls: what each kind of inputs is shown, how the budget is held, and rates that may fall again."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from dyrate_lib import DyRate, InputError, RatePredictor, generate, masks
from dyrate_lib.datasets import open_dataset
from dyrate_lib.models import Adapter, model_info
from dyrate_lib.predictor_inputs import BANK, INPUTS, STEPS, need_codes
from dyrate_lib.scenes import FAMILIES, NEEDS, annotated_reference
from dyrate_lib.scenes.data import response_tokens
from dyrate_lib.scenes.tokenizer import build_tokenizer
from dyrate_lib.teacher_forcing import read_prompt_and_response
from dyrate_lib.training import FlopsRatio, encode_responses, flops_table, hard_distribution, train_predictor
from dyrate_lib.training_budget import Lagrangian, Penalty
from dyrate_lib.training_features import FeatureReader, fill_bank, held, reference_needs

SETTINGS = dict(target=0.8, layer=2, batch_size=3, lr=0.05, max_new_tokens=24, progress=False)


@dataclass
class Item:
    image: object
    prompt: str = "Describe."
    references: list = field(default_factory=lambda: ["a red circle and a blue square", "two shapes"])


@pytest.fixture(scope="module")
def captions():
    return open_dataset("scenes:short:train", n=3)


@pytest.fixture(scope="module")
def trained(tiny, captions):
    """Every kind of inputs, trained alike."""
    before = {name: value.clone() for name, value in tiny[0].state_dict().items()}
    found = {kind: train_predictor(*tiny, captions, inputs=kind, steps=4, seed=3, **SETTINGS) for kind in INPUTS}
    assert all(torch.equal(value, before[name]) for name, value in tiny[0].state_dict().items())
    return found


@pytest.mark.parametrize("kind", INPUTS)
def test_only_the_predictor_learns(tiny, trained, kind):
    predictor = trained[kind].predictor
    assert predictor.inputs == kind and predictor.layer == 2 and predictor.metadata["target"] == 0.8
    assert all(p.grad is None and not p.requires_grad for p in tiny[0].parameters())
    assert not any(p.requires_grad for p in predictor.parameters())
    assert bool(predictor.linear.weight.any()) == (kind != "none") and bool(predictor.linear.bias.any())
    assert not {"inputs", "constraint", "reversible", "mu"} & set(predictor.metadata)


def test_all_kinds_start_alike(trained):
    """The same references, draws and start: before the first step of learning the loss is one number."""
    first = {tuple(result.history[0].items()) for result in trained.values()}
    assert len(first) == 1
    assert len({result.history[-1]["ce"] for result in trained.values()}) > 1


@pytest.mark.parametrize("kind", INPUTS)
def test_trained_ones_survive_their_file(tmp_path, trained, kind):
    predictor = trained[kind].predictor
    loaded = RatePredictor.load(predictor.save(tmp_path / "p.safetensors"))
    assert loaded.state_dict().keys() == predictor.state_dict().keys() and loaded.hidden == (64 if kind == "hidden" else None)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), predictor.state_dict().values(), strict=True))


def test_scaled_inputs_are_folded_into_a_plain_layer(tiny, captions, monkeypatch):
    """What was trained on scaled hidden states gives the same logits on the states themselves."""
    from dyrate_lib import training

    seen = []
    whole = training._Scaled.fold

    def fold(self):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        wanted = self(x)
        seen.append((whole(self)(x) - wanted).detach().abs().max())
        return self.predictor

    monkeypatch.setattr(training._Scaled, "fold", fold)
    train_predictor(*tiny, captions, inputs="hidden", steps=2, **SETTINGS)
    assert seen and float(seen[0]) < 1e-4


# -- what each kind is shown ----------------------------------------------------------------------------------------------


def shown(kind, n=4, steps=6, items=None, lengths=None, shares=None, seed=0):
    """Features that a reader makes of a pass of random numbers."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.rand(n, steps, 4, 4, generator=random)
    x = torch.randn(n, 9 + steps, 8, generator=random)
    prompt = SimpleNamespace(types=torch.zeros(n, 9), content_key=torch.arange(n) * 7)
    forced = SimpleNamespace(shares=drawn if shares is None else shares, x=x, steps=steps, prompt=prompt)
    reader = FeatureReader(kind, build_tokenizer(), steps, seed)
    items = [None] * n if items is None else items
    return forced, reader(forced, items, [i % 5 for i in range(n)], [steps] * n if lengths is None else lengths)


def test_what_is_shown_by_hand():
    forced, seen = shown("shares")
    assert seen is forced.shares
    assert torch.equal(shown("step")[1], torch.arange(6).expand(4, 6))
    assert shown("none")[1].shape == (4, 6, 0)
    forced, seen = shown("hidden")
    rows = forced.x[:, 8:14]  # the last prompt row predicts the first response token
    assert torch.allclose(seen, rows / rows.square().mean(-1, keepdim=True).sqrt(), atol=1e-5)


def test_foreign_is_another_rows_shares_at_the_same_step():
    turns = set()
    for seed in range(12):
        forced, seen = shown("foreign", seed=seed)
        turn = next(t for t in range(1, 4) if torch.equal(seen[0], forced.shares[t]))
        turns.add(turn)
        assert torch.equal(seen, forced.shares.roll(-turn, 0))
    assert turns == {1, 2, 3}


def test_foreign_does_not_read_its_own_row():
    forced, seen = shown("foreign")
    for row in range(4):
        other = forced.shares.clone()
        other[row] = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(9))
        _, again = shown("foreign", shares=other)
        assert torch.equal(again[row], seen[row]) and not torch.equal(again, seen)


def test_after_its_end_a_reply_keeps_its_last_shares():
    shares = torch.arange(12.0).view(2, 6, 1, 1).expand(2, 6, 4, 4)
    assert held(shares, [3, 6])[:, :, 0, 0].tolist() == [[0, 1, 2, 2, 2, 2], [6, 7, 8, 9, 10, 11]]
    _, seen = shown("foreign", n=2, lengths=[3, 6], shares=shares)
    assert seen[1, :, 0, 0].tolist() == [0, 1, 2, 2, 2, 2]


def test_the_bank_holds_the_first_pictures_once():
    predictor = RatePredictor(4, inputs="foreign")
    forced, _ = shown("shares", n=20)
    later, _ = shown("shares", n=30, seed=1)  # the first twenty keys again
    fill_bank(predictor, [(forced, [6] * 19 + [2]), (later, [6] * 30)])
    assert predictor.bank.shape == (30, STEPS, 4, 4) and predictor.bank_keys.tolist() == [7 * i for i in range(30)]
    assert torch.equal(predictor.bank[:20, :2], forced.shares[:, :2].half())
    assert torch.equal(predictor.bank[19, 2:], forced.shares[19, 1].half().expand(STEPS - 2, 4, 4))
    assert torch.equal(predictor.bank[3, 6:], forced.shares[3, 5].half().expand(STEPS - 6, 4, 4))
    many, _ = shown("shares", n=50, steps=70, seed=2)
    fill_bank(predictor, [(many, [70] * 50)])
    assert predictor.bank.shape == (BANK, STEPS, 4, 4)
    assert torch.equal(predictor.bank[31], many.shares[31, :64].half())


def test_a_trained_foreign_predictor_runs(tiny, batch, alone, trained):
    """Its bank is of the training pictures, and none of these gets its own row back."""
    predictor = trained["foreign"].predictor
    assert len(predictor.bank) == 3
    for key, row in zip(predictor.bank_keys, predictor.bank, strict=True):
        assert not torch.equal(predictor.foreign_shares(key[None], 4)[0], row[4].float())
    method = DyRate(predictor)
    together = generate(tiny[0], batch, method, max_new_tokens=5, eos_token_id=[])
    for b in range(4):
        single = generate(tiny[0], alone(b), method, forced_tokens=together.new_tokens[b : b + 1])
        assert torch.equal(single.trace.kept[0], together.trace.kept[b])


# -- the oracle's labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_needs_of_references_are_the_annotated_ones(family):
    tokenizer, data = build_tokenizer(), open_dataset(f"scenes:{family}:val", n=3)
    for item in data:
        for pick in range(5):
            needs = reference_needs(tokenizer, item, pick)
            ids, wanted = response_tokens(item.meta["scene"], family, pick)
            assert [NEEDS.index(need) for need in needs] == wanted
            assert encode_responses(tokenizer, [item.references[pick]], 64, "cpu")[0].tolist() == [ids[:64]]


def test_oracle_features_are_codes_of_the_whole_reference():
    data = open_dataset("scenes:late:val", n=4)
    _, seen = shown("oracle", items=list(data), steps=10)
    for row, item in enumerate(data):
        words = annotated_reference(item.meta["scene"], "late", row)
        assert [need for _, need in words[:10]] == ["none"] * 10
        assert seen[row].tolist() == [5] * 10  # nothing needed yet, but later, beyond what was cut off
    _, seen = shown("oracle", items=list(data), steps=64)
    row = seen[0].tolist()
    needs = reference_needs(build_tokenizer(), data[0], 0)
    assert row[: len(needs)] == need_codes(needs) and {1, 5, 4} <= set(row)


def test_parts_of_a_word_need_what_it_needs():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    item = open_dataset("scenes:narrative:val", n=1)[0]
    needs = reference_needs(PreTrainedTokenizerFast(tokenizer_object=plain), item, 1)
    wanted = []
    for word, need in annotated_reference(item.meta["scene"], "narrative", 1):
        wanted += [need] * (len(word) + (word not in ",.:"))
    assert needs == [*wanted, "none"]
    with pytest.raises(InputError, match="fast tokenizer"):
        reference_needs(SimpleNamespace(is_fast=False), item, 0)


def test_an_oracle_needs_annotated_captions(tiny, pictures, captions, monkeypatch):
    def never(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(Adapter, "embed", never)
    asked = dict(inputs="oracle", steps=1, **SETTINGS)
    for data in ([*captions, Item(pictures[0])], [Item(pictures[0])], open_dataset("scenes:questions:train", n=3)):
        with pytest.raises(InputError, match="captions of scenes"):
            train_predictor(*tiny, data, **asked)
    changed = Item(pictures[0])
    changed.meta = captions[0].meta
    with pytest.raises(InputError, match="Item 0 has other references"):
        train_predictor(*tiny, [changed], **asked)
    with pytest.raises(AssertionError, match="ran"):  # the check can fail
        train_predictor(*tiny, captions, **asked)


# -- what controls can be ------------------------------------------------------------------------------------------------


def test_nothing_trains_to_a_constant_rate_that_meets_the_budget(tiny, alone, captions):
    result = train_predictor(*tiny, captions, inputs="none", steps=70, n_rates=20, **{**SETTINGS, "max_new_tokens": 8})
    last = result.history[-1]  # neighbouring rates are 0.01 apart
    assert last["flops_ratio"] == pytest.approx(0.8, abs=0.01) and last["hard_ratio"] == pytest.approx(0.8, abs=0.01)
    out = generate(tiny[0], alone(1), DyRate(result.predictor), max_new_tokens=6, eos_token_id=[])
    assert len(out.trace.kept.unique()) == 1 and out.flops("paper").ratio == pytest.approx(0.8, abs=0.05)


def test_steps_can_become_a_rising_schedule(tiny, alone):
    """By gradient descent on its table; at inference the path is that schedule, for every picture."""
    wanted = torch.tensor([0, 0, 1, 2, 2, 5, 7, 7, 8])
    predictor = RatePredictor(4, 10, 3, inputs="step")
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.1)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(predictor(torch.arange(9)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    for b in range(2):
        out = generate(tiny[0], alone(b), DyRate(predictor), max_new_tokens=9, eos_token_id=[])
        assert out.trace.kept[0].tolist() == [36 - 36 * k // 10 for k in wanted.tolist()]


# -- the constraint --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_by", [Penalty(0.5, 7.0), Lagrangian(0.5, 7.0, 3.0, mu=-2.5), Lagrangian(0.5, 0.0, 3.0, mu=2.5)])
def test_slopes_are_the_derivatives(held_by):
    ratio = torch.tensor(0.62, requires_grad=True)
    (slope,) = torch.autograd.grad(held_by(ratio), ratio)
    assert float(slope) == pytest.approx(float(held_by.slope(ratio.detach())), rel=1e-5)


def test_the_multiplier_by_hand():
    held_by = Lagrangian(target=0.5, lam=0.0, eta=10.0)
    assert held_by.update(0.7) == {"mu": 0.0} and held_by.mu == pytest.approx(2.0)
    assert float(held_by(torch.tensor(0.7))) == pytest.approx(0.4)
    held_by.update(0.2)
    assert held_by.mu == pytest.approx(-1.0)  # an equality: below the target it goes below zero
    assert Penalty(0.5, 10.0).update(0.7) == {}


def test_a_multiplier_meets_the_budget_where_a_penalty_gives_way():
    """minimise -4 ratio + the constraint: the penalty rests where 2 lam (ratio - target) = 4, the multiplier at 4."""

    def rest(held_by):
        x = torch.zeros((), requires_grad=True)
        for _ in range(4000):
            ratio = torch.sigmoid(x)
            (slope,) = torch.autograd.grad(-4 * ratio + held_by(ratio), x)
            x.data -= 0.02 * slope
            held_by.update(float(ratio.detach()))
        return float(torch.sigmoid(x.detach()))

    assert rest(Penalty(0.3, 200.0)) == pytest.approx(0.31, abs=1e-4)
    multiplier = Lagrangian(0.3, 200.0, 1.0)
    assert rest(multiplier) == pytest.approx(0.3, abs=1e-5) and multiplier.mu == pytest.approx(4.0, abs=0.01)


def test_a_lagrangian_meets_a_reachable_budget(tiny, captions):
    result = train_predictor(*tiny, captions, constraint="lagrangian", eta=5.0, steps=30, **{**SETTINGS, "max_new_tokens": 8})
    assert abs(result.history[-1]["flops_ratio"] - 0.8) < 0.02 and abs(result.history[-1]["hard_ratio"] - 0.8) < 0.05
    mu = 0.0
    for row in result.history:
        assert row["mu"] == pytest.approx(mu)
        mu += 5.0 * (row["flops_ratio"] - 0.8)
    assert result.predictor.metadata["mu"] == pytest.approx(mu) and mu != 0
    assert result.predictor.metadata["constraint"] == "lagrangian" and result.predictor.metadata["eta"] == 5.0


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(inputs="colour"), "inputs='colour'"), (dict(constraint="barrier"), "constraint='barrier'"),
        (dict(eta=0.0), "eta=0.0"), (dict(reversible="yes"), "reversible='yes'"),
        (dict(reversible=True, convention="paper-prefill"), "paper-prefill"),
        (dict(inputs="foreign", batch_size=1), "at least 2"),
    ],
)  # fmt: skip
def test_settings_are_refused_before_the_model_runs(tiny, captions, monkeypatch, wrong, says):
    monkeypatch.setattr(Adapter, "embed", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=says):
        train_predictor(*tiny, captions, **{**SETTINGS, "steps": 1, **wrong})


# -- dropping that is not final ----------------------------------------------------------------------------------------


def test_masks_of_a_reversible_path_by_hand():
    one_hot = torch.nn.functional.one_hot(torch.tensor([[2, 0, 1]]), 3).float()
    rate_masks = masks.prefix_masks(masks.kept_counts(torch.tensor([3]), 3), 3).float()
    assert masks.select_masks(one_hot, rate_masks, reversible=True)[0].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert masks.select_masks(one_hot, rate_masks)[0].tolist() == [[1, 0, 0]] * 3


@pytest.mark.parametrize("convention", ["paper", "cached", "paper-prefill"])
def test_reversible_table_adds_up_to_the_trace(tiny, alone, convention):
    info, steps = model_info(tiny[0]), 6
    predictor = RatePredictor(4, 10)
    predictor.linear.weight.data.normal_(0, 30, generator=torch.Generator().manual_seed(0))
    out = generate(tiny[0], alone(1), DyRate(predictor, 3, reversible=True), max_new_tokens=steps, eos_token_id=[])
    assert bool((out.trace.kept.diff(dim=1) > 0).any())  # something came back
    table, whole = flops_table(info, int(out.trace.prompt_length[0]), 36, steps, 3, 10, convention, reversible=True)
    counts = masks.kept_counts(torch.tensor(36), 10).tolist()
    total = sum(float(table[t, counts.index(k)]) for t, k in enumerate(out.trace.kept[0].tolist()))
    assert total == pytest.approx(float(out.flops(convention)), rel=1e-9)
    assert whole == pytest.approx(out.flops(convention).unpruned, rel=1e-9)


def test_reversible_expectation_is_the_mean_over_draws(tiny, alone):
    adapter, info = Adapter(tiny[0]), model_info(tiny[0])
    prompt = adapter.embed(alone(0))
    random = torch.Generator().manual_seed(0)
    pi = torch.softmax(torch.randn(1, 4, 5, generator=random), -1)
    ratio = FlopsRatio(info, 3, 5, "paper", reversible=True)
    expected = float(ratio(ratio.in_force(pi), prompt, [4]))
    draws = torch.multinomial(pi[0].repeat(4000, 1, 1).flatten(0, 1), 1, generator=random).view(4000, 4)
    paths = torch.nn.functional.one_hot(draws, 5).float()
    sampled = ratio(paths, Prompts(prompt, 4000), [4] * 4000)
    assert abs(expected - float(sampled.mean())) < 5 * float(sampled.std()) / 4000**0.5


class Prompts:
    """One prompt many times over, as `FlopsRatio` reads it."""

    def __init__(self, prompt, n):
        self.length, self.n_image = prompt.length.repeat(n), prompt.n_image.repeat(n)


def test_reversible_training_is_for_what_inference_does(tiny, alone, captions):
    settings = {**SETTINGS, "target": 0.9, "max_new_tokens": 8}
    result = train_predictor(*tiny, captions, reversible=True, steps=25, **settings)
    assert abs(result.history[-1]["flops_ratio"] - 0.9) < 0.03 and result.predictor.metadata["reversible"] is True
    predictor = result.predictor
    predictor.linear.weight.data.normal_(0, 20, generator=torch.Generator().manual_seed(1))  # a path that falls and rises
    adapter, info = Adapter(tiny[0]), model_info(tiny[0])
    reply, lengths = encode_responses(tiny[1].tokenizer, ["a red circle and a large blue square"], 64, "cpu")
    forced = read_prompt_and_response(adapter, adapter.embed(alone(0)), reply, 2)
    hard = hard_distribution(predictor(forced.shares), reversible=True)
    ratio = float(FlopsRatio(info, 2, 10, "paper", reversible=True)(hard, forced.prompt, lengths))
    out = generate(tiny[0], alone(0), DyRate(predictor, reversible=True), forced_tokens=reply)
    assert len(out.trace.kept.unique()) > 1
    assert ratio == pytest.approx(out.flops("paper").ratio, rel=1e-6)
