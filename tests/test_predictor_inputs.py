"""What a rate predictor may be fed with: sizes, refusals, files, and each kind at inference in every loop."""

from __future__ import annotations

import pytest
import torch

from dyrate_lib import DyRate, InputError, RatePath, RatePredictor, generate
from dyrate_lib.engine import select
from dyrate_lib.evaluate import describe, predictor_hash
from dyrate_lib.methods.base import PrefillView, StepView
from dyrate_lib.predictor_inputs import BANK, INPUTS, STEPS, need_codes, oracle_rates, unit_rms

HEADS, HIDDEN, RATES = 4, 64, 10
PAPER_HASH = "f67c09b8d7278d16"
PAPER_HEAD = (
    '{"layer": 2, "n_heads": 4, "n_rates": 5, "sha256": "b2ac06479dacd666dd58b4a88a321599e7ed087d49919fd26947b5c1229dbad8", '
    '"target": 0.5}'
)
WIDTHS = {"shares": 16, "step": 64, "none": 0, "hidden": 64, "foreign": 16, "oracle": 6}
ONLINE = [kind for kind in INPUTS if kind != "oracle"]


def made(kind: str, scale: float = 8.0, seed: int = 0, layer: int | None = 3) -> RatePredictor:
    """A predictor with random weights, and a bank of shares where it needs one."""
    predictor = RatePredictor(HEADS, RATES, layer, inputs=kind, hidden=HIDDEN if kind == "hidden" else None)
    random = torch.Generator().manual_seed(seed)
    predictor.linear.weight.data.normal_(0, scale, generator=random)
    predictor.linear.bias.data.normal_(0, 1, generator=random)
    if kind == "foreign":
        predictor.bank = torch.rand(5, STEPS, HEADS, 4, generator=random).half()
        predictor.bank_keys = torch.arange(5) + 10
    return predictor


def features(kind: str, *lead: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    if kind in ("step", "oracle"):
        return torch.randint(WIDTHS[kind], lead, generator=random)
    shape = (HEADS, 4) if kind in ("shares", "foreign") else (WIDTHS[kind],)
    return torch.rand(*lead, *shape, generator=random)


# -- the module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INPUTS)
def test_untrained_keeps_all_and_has_the_size_it_says(kind):
    predictor = RatePredictor(HEADS, RATES, inputs=kind, hidden=HIDDEN if kind == "hidden" else None)
    assert predictor.linear.in_features == WIDTHS[kind]
    logits = predictor(features(kind, 3, 7))
    assert logits.shape == (3, 7, RATES) and logits.dtype == torch.float32 and not bool(logits.any())


@pytest.mark.parametrize("kind", INPUTS)
def test_it_is_one_linear_layer(kind):
    """Against the formula, one-hots written out."""
    predictor, x = made(kind), features(kind, 2, 3)
    rows = torch.nn.functional.one_hot(x, WIDTHS[kind]).float() if x.dtype == torch.long else x.reshape(2, 3, WIDTHS[kind])
    assert torch.allclose(predictor(x), rows @ predictor.linear.weight.T + predictor.linear.bias, atol=1e-5)


def test_flops_count_what_is_multiplied_and_added():
    counts = {kind: made(kind).flops() for kind in INPUTS}
    assert counts == {
        "shares": 2 * 16 * 10 + 10, "foreign": 2 * 16 * 10 + 10, "hidden": 2 * 64 * 10 + 10, "step": 10, "oracle": 10, "none": 0,
    }  # fmt: skip


def test_late_steps_share_the_last_row():
    predictor = made("step")
    assert torch.equal(predictor(torch.tensor([63, 64, 1000])), predictor(torch.tensor([63, 63, 63])))
    assert not torch.equal(predictor(torch.tensor(62)), predictor(torch.tensor(63)))


def test_unit_rms_takes_the_size_away():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.5], [1.0], [40.0]])
    assert torch.allclose(unit_rms(x).square().mean(-1), torch.ones(3), atol=1e-4)
    assert torch.allclose(unit_rms(x), unit_rms(7 * x), atol=1e-4) and unit_rms(x.half()).dtype == torch.float32


@pytest.mark.parametrize("kind", INPUTS)
def test_round_trip(tmp_path, kind):
    predictor, x = made(kind), features(kind, 2, 3)
    path = predictor.save(tmp_path / "p.safetensors", target=0.5)
    loaded = RatePredictor.load(path)
    assert (loaded.inputs, loaded.hidden, loaded.metadata) == (kind, predictor.hidden, {"target": 0.5})
    assert torch.equal(loaded(x), predictor(x)) and predictor_hash(loaded) == predictor_hash(predictor)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), predictor.state_dict().values(), strict=True))
    if kind in ONLINE:
        assert describe(DyRate(path))["predictor"] == predictor_hash(predictor)


def test_the_papers_files_and_hashes_are_as_they_were(tmp_path):
    """Nothing of the controls stands in a file or a hash of the paper's inputs: taken down before there were any."""
    predictor = RatePredictor(4, 5, 2, {"target": 0.5})
    predictor.linear.weight.data.copy_(torch.arange(80.0).view(5, 16))
    assert predictor_hash(predictor) == PAPER_HASH
    from safetensors import safe_open

    with safe_open(predictor.save(tmp_path / "p.safetensors"), framework="pt") as file:
        assert file.metadata()["rate_predictor"] == PAPER_HEAD and sorted(file.keys()) == ["linear.bias", "linear.weight"]


def test_hashes_tell_kinds_apart():
    shares, foreign = made("shares"), made("foreign")
    assert torch.equal(shares.linear.weight, foreign.linear.weight) and predictor_hash(shares) != predictor_hash(foreign)
    other = made("foreign")
    other.bank = other.bank.flip(0)
    assert predictor_hash(other) != predictor_hash(foreign)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(inputs="colour"), "inputs='colour'"),
        (dict(inputs="hidden"), "hidden=None"),
        (dict(inputs="step", hidden=4), "hidden=4"),
        (dict(inputs="hidden", hidden=0), "hidden=0"),
    ],
)
def test_bad_kinds_are_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        RatePredictor(4, **arguments)


@pytest.mark.parametrize(
    "kind, wrong, says",
    [
        ("shares", torch.rand(2, 5, 4), "4 heads"), ("foreign", torch.rand(2, 5, 4), "4 heads"),
        ("hidden", torch.rand(2, 63), "64 numbers"), ("none", torch.rand(2, 1), "0 numbers"),
        ("step", torch.rand(2), "int64"), ("oracle", torch.tensor([6]), "0..5"), ("oracle", torch.tensor([-1]), "0..5"),
    ],
)  # fmt: skip
def test_the_wrong_width_is_refused(kind, wrong, says):
    with pytest.raises(InputError, match=says):
        made(kind)(wrong)


def test_damaged_files_of_controls_are_refused(tmp_path):
    from safetensors.torch import save_file

    from dyrate_lib.checksums import tensors_digest

    def written(kind, **changed):
        import json

        predictor = made(kind)
        head = {"n_heads": 4, "n_rates": 10, "layer": 3, "inputs": kind, "hidden": predictor.hidden, **changed.pop("head", {})}
        tensors = {**{k: v.clone() for k, v in predictor.state_dict().items()}, **changed}
        head["sha256"] = tensors_digest(json.dumps(head, sort_keys=True), tensors)
        save_file(tensors, tmp_path / "p.safetensors", metadata={"rate_predictor": json.dumps(head, sort_keys=True)})
        return tmp_path / "p.safetensors"

    assert RatePredictor.load(written("foreign")).inputs == "foreign"
    for bad in (
        written("foreign", bank=torch.zeros(5, STEPS, HEADS + 1, 4)), written("foreign", bank_keys=torch.arange(4)),
        written("foreign", bank=torch.zeros(5, 0, HEADS, 4)), written("step", head={"inputs": "steps"}),
        written("hidden", head={"hidden": None}), written("hidden", head={"hidden": 10**12}),
        written("none", head={"inputs": "step"}),
    ):  # fmt: skip
        with pytest.raises(InputError, match="damaged"):
            RatePredictor.load(bad)


# -- another picture's shares --------------------------------------------------------------------------------------------


def test_a_foreign_predictor_never_picks_its_own_picture():
    predictor = made("foreign")
    keys = torch.arange(200)
    for step in (0, 9, 63, 64, 200):
        shares = predictor.foreign_shares(keys, step)
        own = torch.arange(5) + 10
        bank = predictor.bank[:, min(step, 63)].float()
        for key, row in zip(keys.tolist(), shares, strict=True):
            place = key % 5 if int(own[key % 5]) != key else (key % 5 + 1) % 5
            assert torch.equal(row, bank[place])
    assert len({float(row.sum()) for row in predictor.foreign_shares(keys, 3)}) == 5


def test_a_bank_is_needed():
    with pytest.raises(InputError, match="no other pictures"):
        RatePredictor(4, inputs="foreign").foreign_shares(torch.tensor([1]), 0)
    with pytest.raises(InputError, match="no other pictures"):
        made("shares").foreign_shares(torch.tensor([1]), 0)
    assert BANK >= 2


def test_foreign_does_not_look_at_its_own_shares():
    method, n = DyRate(made("foreign")), torch.tensor([36, 36, 36])
    method.prepare(8, 4, torch.device("cpu"))
    key, random = torch.tensor([3, 11, 17]), torch.Generator().manual_seed(2)
    views = []
    for _ in range(2):
        shares = torch.rand(3, 4, 4, generator=random)
        first = method.prefill(PrefillView(torch.rand(3, 36, generator=random), shares, n, key))
        views.append(torch.stack([first, *(method.step(StepView(t, shares, first, n, key)) for t in range(1, 9))]))
    assert torch.equal(*views) and len(views[0].unique()) > 2
    moved = DyRate(made("shares"))
    moved.prepare(8, 4, torch.device("cpu"))
    seen = [moved.step(StepView(1, torch.rand(3, 4, 4, generator=random), n, n)) for _ in range(2)]
    assert not torch.equal(*seen)  # the check can fail


# -- inference ----------------------------------------------------------------------------------------------------------


def ours(model, inputs, method, **kwargs):
    kwargs = {"max_new_tokens": 6, "eos_token_id": [], **kwargs}
    return generate(model, inputs, method, engine="reference", return_logits=True, **kwargs)


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("reversible", [False, True])
def test_batch_equals_each_alone(tiny, batch, alone, kind, reversible):
    predictor = made(kind, seed=1)
    if kind == "step":  # rises and falls
        predictor.linear.weight.data[:, :6] = 0
        for t, rate in enumerate((1, 4, 2, 7, 3, 9)):
            predictor.linear.weight.data[rate, t] = 100
    method = DyRate(predictor, reversible=reversible)
    whole = ours(tiny[0], batch, method)
    kept = whole.trace.kept
    for b in range(4):
        one = ours(tiny[0], alone(b), method, forced_tokens=whole.new_tokens[b : b + 1])
        assert torch.equal(one.trace.kept[0], kept[b])
        assert (one.logits[0] - whole.logits[b]).abs().max() < 1e-4
    assert bool((kept.diff(dim=1) <= 0).all()) or reversible
    if kind in ("step", "none"):
        assert bool((kept == kept[:1]).all())
    else:
        assert len({tuple(row) for row in kept.tolist()}) > 1  # it tells pictures apart
    if kind == "none":
        assert bool((kept == kept[:, :1]).all())
    if kind == "step":
        path = [36 - 36 * k // 10 for k in ((1, 4, 2, 7, 3, 9) if reversible else (1, 4, 4, 7, 7, 9))]
        assert kept[0].tolist() == path
        assert method.plan(36, 8, 6)[1:, 3].tolist() == path[1:]


def test_hidden_is_the_state_that_enters_layer_p(tiny, alone):
    """The rows that the method is shown, against transformers' own hidden states of the unpruned model."""
    shown = []

    class Watch(RatePath):
        wants_hidden = True

        def prefill(self, view):
            shown.append(view.hidden)
            return super().prefill(view)

        def step(self, view):
            shown.append(view.hidden)
            return super().step(view)

    out = ours(tiny[0], alone(1), Watch(3))
    whole = {**alone(1), "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
    whole = tiny[0](**whole, output_hidden_states=True)
    rows = whole.hidden_states[3][0, -7:-1]
    assert torch.allclose(torch.cat(shown), rows, atol=1e-4)
    ours(tiny[0], alone(1), RatePath(3))
    assert len(shown) == 6


@pytest.mark.parametrize("kind", ["step", "none", "foreign"])
def test_under_stock_generate(tiny, batch, kind):
    method = DyRate(made(kind, seed=1))
    with method(tiny[0]) as pruning:
        out = tiny[0].generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    mine = ours(tiny[0], batch, method, max_new_tokens=4)
    assert torch.equal(out, mine.sequences) and torch.equal(torch.stack(pruning.kept, 1), mine.trace.kept)
    with method(tiny[0]):
        tiny[0].generate(**batch, max_new_tokens=3, num_beams=3, do_sample=False, eos_token_id=None)


def test_stock_generate_refuses_the_hidden_state(tiny, batch):
    with pytest.raises(InputError, match="use dyrate_lib.generate"), DyRate(made("hidden"))(tiny[0]):
        pass


@pytest.mark.parametrize("kind", ["step", "none"])
def test_in_the_graph_engine(tiny, batch, kind):
    engine, method = select.eager_engine(tiny[0]), DyRate(made(kind, seed=1))
    try:
        theirs = generate(tiny[0], batch, method, 5, eos_token_id=[], engine=engine)
        mine = ours(tiny[0], batch, method, max_new_tokens=5)
        assert torch.equal(theirs.sequences, mine.sequences) and torch.equal(theirs.trace.kept, mine.trace.kept)
        method.loaded.linear.bias.data.zero_()
        method.loaded.linear.weight.data.zero_()
        assert bool((generate(tiny[0], batch, method, 2, engine=engine).trace.kept == 36).all())  # changed weights are noticed
    finally:
        engine.release()


@pytest.mark.parametrize("kind, why", [("hidden", "hidden state"), ("foreign", "another picture")])
def test_the_graph_engine_says_why_not(tiny, batch, kind, why):
    engine = select.eager_engine(tiny[0])
    try:
        with pytest.raises(InputError, match=f"{why}.*engine='reference'"):
            generate(tiny[0], batch, DyRate(made(kind)), 2, engine=engine)
    finally:
        engine.release()


def test_blind_predictors_go_with_any_heads_others_do_not():
    for kind in ("step", "none"):
        assert DyRate(made(kind)).prepare(8, 5, torch.device("cpu")) == 3
    for kind in ("shares", "hidden", "foreign"):
        with pytest.raises(InputError, match="heads"):
            DyRate(made(kind)).prepare(8, 5, torch.device("cpu"))
        with pytest.raises(InputError, match="not known beforehand"):
            DyRate(made(kind)).plan(36, 8, 2)


# -- the oracle -----------------------------------------------------------------------------------------------------------


def test_codes_by_hand():
    assert need_codes(["none", "image", "response", "image", "response", "none"]) == [5, 1, 3, 1, 2, 4]
    assert need_codes(["none", "response"]) == [4, 2] and need_codes([]) == []
    with pytest.raises(InputError, match="picture"):
        need_codes(["image", "picture"])


def test_an_oracles_rates_are_replayed_sample_by_sample(tiny, batch):
    predictor = RatePredictor(4, 10, 3, inputs="oracle")
    for code, rate in enumerate((0, 1, 9, 4, 8, 3)):  # much of the picture before what needs it, little after
        predictor.linear.weight.data[rate, code] = 5
    needs = ["none", "image", "image", "response", "none"]
    rates = oracle_rates(predictor, needs)
    assert rates == [0.3, 0.1, 0.1, 0.9, 0.8]
    paths = RatePath(3, [rates, [0.0], oracle_rates(predictor, needs[::-1]), [0.5]], reversible=True)
    out = ours(tiny[0], batch, paths, max_new_tokens=5)
    assert out.trace.kept[0].tolist() == [26, 33, 33, 4, 8]
    assert out.trace.kept[2].tolist() == [26, 22, 33, 33, 8]  # the last token of the second needs nothing any more
    with pytest.raises(InputError, match="oracle"):
        oracle_rates(made("shares"), needs)
    with pytest.raises(InputError, match="at least one"):
        oracle_rates(predictor, [])
    with pytest.raises(InputError, match="replay its rates"):
        DyRate(predictor)
