"""Predictor training: FLOPs term exact, gradients right, targets reached, reproducible, refusals."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from dyrate_lib import DyRate, InputError, RatePredictor, generate, masks
from dyrate_lib.models import Adapter, model_info
from dyrate_lib.teacher_forcing import masked_attention, masked_logits, read_prompt_and_response
from dyrate_lib.training import (
    FlopsRatio,
    encode_responses,
    flops_table,
    hard_distribution,
    train_predictor,
)


@dataclass
class Item:
    image: object
    prompt: str = "Describe."
    references: list = field(default_factory=lambda: ["a red circle and a blue square", "two shapes"])


@pytest.fixture
def items(pictures):
    return [Item(picture) for picture in pictures]


@pytest.mark.parametrize("convention", ["paper", "paper-prefill", "cached"])
def test_flops_table_adds_up_to_the_accounting(tiny, alone, convention):
    info, steps = model_info(tiny[0]), 6
    predictor = RatePredictor(4, 10)
    predictor.linear.weight.data.normal_(0, 30, generator=torch.Generator().manual_seed(0))
    out = generate(tiny[0], alone(1), DyRate(predictor, 3), max_new_tokens=steps, eos_token_id=[])
    table, whole = flops_table(info, int(out.trace.prompt_length[0]), 36, steps, 3, 10, convention)
    counts = masks.kept_counts(torch.tensor(36), 10).tolist()
    path = [counts.index(k) for k in out.trace.kept[0].tolist()]
    total = sum(float(table[t, k]) for t, k in enumerate(path))
    assert total == pytest.approx(float(out.flops(convention)), rel=1e-9)
    assert whole == pytest.approx(out.flops(convention).unpruned, rel=1e-9)


def test_expected_ratio_is_the_mean_over_draws(tiny, alone):
    """The exact expectation against 4,000 sampled paths, within five standard errors."""
    adapter, info = Adapter(tiny[0]), model_info(tiny[0])
    prompt = adapter.embed(alone(0))
    pi = torch.softmax(torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0)), -1)
    ratio = FlopsRatio(info, 3, 5, "paper")
    expected = float(ratio(masks.running_rate_distribution(pi), prompt, [4]))
    draws = torch.multinomial(
        pi[0].repeat(4000, 1, 1).flatten(0, 1), 1, generator=torch.Generator().manual_seed(1)
    ).view(4000, 4)
    one_hot = torch.nn.functional.one_hot(draws.cummax(1).values, 5).double()
    table, whole = flops_table(info, int(prompt.length), 36, 4, 3, 5, "paper")
    sampled = (one_hot * table).sum((1, 2)) / whole
    assert abs(expected - float(sampled.mean())) < 5 * float(sampled.std()) / 4000**0.5


def test_gradient_of_the_masks_matches_finite_differences(tiny, alone):
    """Cross-entropy as a function of a real-valued mask: autograd against central differences, also where m = 0."""
    model = tiny[0].double()
    try:
        adapter = Adapter(model)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in alone(0).items()}
        reply = torch.tensor([[11, 12, 13]])
        forced = read_prompt_and_response(adapter, adapter.embed(inputs), reply, 3)
        keep = (torch.arange(36) < torch.tensor([20, 12, 5])[:, None]).double()[None].requires_grad_()

        def loss(mask):
            return torch.nn.functional.cross_entropy(masked_logits(adapter, forced, mask)[0], reply[0])

        (gradient,) = torch.autograd.grad(loss(keep), keep)
        for t, n in ((0, 3), (0, 30), (1, 11), (1, 12), (2, 4), (2, 20)):
            bump = torch.zeros_like(keep)
            bump[0, t, n] = 0.05  # transformers' RMSNorm is float32 inside: a smaller step drowns in its rounding
            with torch.no_grad():
                slope = (loss(keep + bump) - loss(keep - bump)) / 0.1
            assert float(gradient[0, t, n]) == pytest.approx(float(slope), rel=0.02, abs=1e-5)
        assert float(gradient[0, 0, 30]) != 0  # a dropped token still tells what keeping it would do
    finally:
        model.float()


def test_training_moves_towards_the_target_and_repeats_itself(tiny, items):
    settings = dict(target=0.8, layer=2, steps=40, batch_size=4, lr=0.05, progress=False)
    first = train_predictor(*tiny, items, **settings, seed=3)
    again = train_predictor(*tiny, items, **settings, seed=3)
    other = train_predictor(*tiny, items, **settings, seed=4)
    assert torch.equal(first.predictor.linear.weight, again.predictor.linear.weight)
    assert not torch.equal(first.predictor.linear.weight, other.predictor.linear.weight)
    start, end = first.history[0], first.history[-1]
    assert abs(end["flops_ratio"] - 0.8) < 0.05 and abs(end["hard_ratio"] - 0.8) < 0.05
    assert start["tau"] == pytest.approx(2.0) and end["tau"] == pytest.approx(0.1)
    assert first.predictor.layer == 2 and first.predictor.metadata["target"] == 0.8
    assert all(not p.requires_grad and p.grad is None for p in tiny[0].parameters())


def test_hard_ratio_is_what_inference_spends(tiny, alone, items):
    result = train_predictor(*tiny, items, target=0.8, layer=2, steps=20, batch_size=4, progress=False)
    adapter, info = Adapter(tiny[0]), model_info(tiny[0])
    inputs = alone(0)
    reply, lengths = encode_responses(tiny[1].tokenizer, ["a red circle"], 64, "cpu")
    forced = read_prompt_and_response(adapter, adapter.embed(inputs), reply, 2)
    hard = hard_distribution(result.predictor(forced.shares))
    ratio = float(FlopsRatio(info, 2, 10, "paper")(hard, forced.prompt, lengths))
    out = generate(tiny[0], inputs, DyRate(result.predictor), forced_tokens=reply)
    assert ratio == pytest.approx(out.flops("paper").ratio, rel=1e-6)


def test_refusals(tiny, items):
    for bad, word in (
        (dict(target=0.0), "target"),
        (dict(layer=0), "layer"),
        (dict(steps=0), "steps"),
        (dict(tau=(1.0, 0.0)), "temperatures"),
    ):
        with pytest.raises(InputError, match=word):
            train_predictor(*tiny, items, progress=False, **bad)
    with pytest.raises(InputError, match="empty"):
        train_predictor(*tiny, [], steps=1, progress=False)


def _plain_masked_attention(q, k, v, mask):
    """The formula of eq. 6, left to autograd."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    top = scores.masked_fill(~causal, -torch.inf).amax(-1, keepdim=True).detach()
    weights = torch.exp((scores - top).clamp(max=0.0)) * mask[:, None]
    return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_masked_attention_and_its_gradients_are_those_of_the_formula(kv_heads):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = make(2, 4, 7, 3), make(2, kv_heads, 7, 3), make(2, kv_heads, 7, 3)
    mask = (torch.rand(2, 7, 7, generator=generator) < 0.6).double()
    mask = torch.maximum(mask, torch.eye(7)).tril()  # zeros and ones, as in training
    inputs = [x.requires_grad_() for x in (q, k, v, mask)]
    upstream = make(2, 4, 7, 3)
    ours = masked_attention(*inputs)
    groups = 4 // kv_heads
    plain = _plain_masked_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), mask)
    assert torch.allclose(ours, plain, atol=1e-12)
    tril = torch.ones(7, 7).tril().double()  # entries above the diagonal are no part of the mask
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True):
        a, b = (a * tril, b * tril) if a.shape[-1] == 7 and a.ndim == 3 else (a, b)
        assert torch.allclose(a, b, atol=1e-12)


def test_the_bias_alone_meets_the_budget_before_training(tiny, items):
    """With a learning rate of almost nothing the predictor stays where training starts: at the asked cost, expected."""
    result = train_predictor(
        *tiny, items, target=0.8, layer=2, steps=1, batch_size=2, lr=1e-9, max_new_tokens=8, progress=False
    )
    assert result.history[0]["flops_ratio"] == pytest.approx(0.8, abs=0.02)
