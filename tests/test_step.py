"""The decode step by the weights themselves against the adapter's modules, and when it is not taken."""

import pytest
import torch
from torch import nn

from dyrate_lib import DyRate, FastV, NoReduction, generate
from dyrate_lib.masks import IMG
from dyrate_lib.methods import PyramidDrop
from dyrate_lib.methods.prune_state import PruneState
from dyrate_lib.models import Adapter
from dyrate_lib.predictor import RatePredictor
from dyrate_lib.step import DirectStep, ModuleStep, step_for
from tests.tiny_families import FAMILIES, model_of


def both(model, batch: int, seed: int = 0):
    adapter, random = Adapter(model), torch.Generator().manual_seed(seed)
    like = torch.zeros(batch, 3, model.config.text_config.hidden_size)
    return adapter, ModuleStep(adapter, like), DirectStep(adapter, like), random


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_is_that_of_the_modules(name, rows):
    """Biases (Qwen), grouped heads, several axes of positions: all families."""
    adapter, modules, direct, random = both(model_of(name), rows)
    assert type(step_for(adapter, modules.like)) is DirectStep
    token = torch.randint(9, 100, (rows,), generator=random)
    axes = (3,) if name.startswith("qwen") else ()
    last = torch.randint(5, 60, (rows, 1, *axes), generator=random)
    with torch.no_grad():
        x, y = modules.embed(token), direct.embed(token)
        assert torch.equal(x[:, 0], y)
        for index in range(adapter.n_layers):
            ours = direct.project(index, y, direct.reply_rotary(last, 1 + index, 9))
            stock = modules.project(index, x, modules.reply_rotary(last, 1 + index, 9))
            for a, b in zip(ours, stock, strict=True):
                assert a.shape == b.shape
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            attended = torch.randn(stock[0].shape, generator=random)
            x, y = modules.finish(index, x, attended), direct.finish(index, y, attended)
            torch.testing.assert_close(y, x[:, 0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(direct.logits(y), modules.logits(x), rtol=1e-5, atol=1e-4)


METHODS = {
    "none": NoReduction,
    "fastv": lambda: FastV(2, 0.5),
    "staged": lambda: PyramidDrop(layers=(2, 4, 6)),
    "dyrate": lambda: DyRate(_predictor()),
    "dyrate-step": lambda: DyRate(_predictor(), rank="step"),
    "dyrate-reversible": lambda: DyRate(_predictor(), reversible=True),
}


def _predictor() -> RatePredictor:
    """One whose rate differs by sample and step."""
    made = RatePredictor(4, layer=3)
    with torch.no_grad():
        made.linear.weight.copy_(torch.randn(made.linear.weight.shape, generator=torch.Generator().manual_seed(3)) * 9)
    return made


@pytest.mark.parametrize("name", sorted(METHODS))
def test_generation_is_the_same_by_either_step(tiny, batch, monkeypatch, name):
    model, _ = tiny
    taken = []

    def forced(kind):
        return lambda adapter, like: taken.append(kind) or kind(adapter, like)

    def run(kind):
        monkeypatch.setattr("dyrate_lib.decoder.step_for", forced(kind))
        monkeypatch.setattr("dyrate_lib.staged_decoder.step_for", forced(kind))
        return generate(model, batch, METHODS[name](), 12, eos_token_id=[], return_logits=True, engine="reference")

    ours, stock = run(DirectStep), run(ModuleStep)
    assert taken == [DirectStep, ModuleStep]
    assert torch.equal(ours.sequences, stock.sequences)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.trace.attention, stock.trace.attention, rtol=0, atol=1e-6)
    assert torch.equal(ours.trace.kept_by_layer, stock.trace.kept_by_layer)


@pytest.mark.parametrize("asked_before", [True, False])
def test_reordered_samples_keep_their_own_tokens(asked_before):
    """What is read is made when somebody asks: before or after samples change places, it goes with its sample."""
    n, order = 6, torch.tensor([1, 2, 0])
    random = torch.Generator().manual_seed(0)
    shares, scores = torch.rand(3, 4, 4, generator=random), torch.rand(3, n, generator=random)
    columns = torch.arange(n).expand(3, n)
    states = [PruneState(FastV(2, 0.5), 2, 4, torch.full((3, n), IMG), columns, torch.arange(3)) for _ in range(2)]
    for state in states:
        state.start(shares, scores)
    if asked_before:
        assert states[1].reads.sum(-1).tolist() == [3, 3, 3]
    states[1].select(order)
    assert torch.equal(states[1].reads, states[0].reads[order])
    assert not torch.equal(states[1].reads, states[0].reads[order[order]])


def test_the_tables_of_the_reply_are_made_once(tiny, monkeypatch):
    adapter, _, direct, _ = both(tiny[0], 2)
    asked, rotary = [], adapter.rotary
    monkeypatch.setattr(adapter, "rotary", lambda p, like: asked.append(p.shape[1]) or rotary(p, like))
    last = torch.tensor([[4], [7]])
    tables = [direct.reply_rotary(last, step, 6) for step in range(1, 7)]
    assert asked == [6]
    for ahead, table in enumerate(tables, 1):
        for a, b in zip(table, direct.rotary(last + ahead), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    direct._static = False  # frequencies that hang on the length are asked for at every step
    asked.clear()
    direct.reply_rotary(last, 1, 6), direct.reply_rotary(last, 2, 6)
    assert asked == [1, 1]


class Quantised(nn.Linear):
    pass


def _hook(layer):
    handle = layer.mlp.register_forward_hook(lambda *a: None)
    return handle.remove


def _other_linear(layer):
    old = layer.self_attn.q_proj
    new = Quantised(old.in_features, old.out_features, bias=False)
    new.load_state_dict(old.state_dict())
    layer.self_attn.q_proj = new.requires_grad_(False)
    return lambda: setattr(layer.self_attn, "q_proj", old)


def _own_forward(layer):
    layer.mlp.down_proj.forward = lambda x: x
    return lambda: delattr(layer.mlp.down_proj, "forward")


def _gelu(layer):
    old, layer.mlp.act_fn = layer.mlp.act_fn, nn.GELU()
    return lambda: setattr(layer.mlp, "act_fn", old)


def _half(layer):
    layer.input_layernorm.bfloat16()
    return layer.input_layernorm.float


@pytest.mark.parametrize("change", [_hook, _other_linear, _own_forward, _gelu, _half])
def test_anything_but_plain_modules_is_left_to_the_modules(tiny, change):
    adapter = Adapter(tiny[0])
    like = torch.zeros(1, 2, adapter.info().hidden)
    assert type(step_for(adapter, like)) is DirectStep
    undo = change(adapter.layers[2])
    try:
        assert type(step_for(adapter, like)) is ModuleStep
    finally:
        undo()
    assert type(step_for(adapter, like)) is DirectStep


def test_other_precisions_autocast_and_families_with_layers_of_their_own(tiny, monkeypatch):
    adapter = Adapter(tiny[0])
    like = torch.zeros(1, 2, adapter.info().hidden)
    assert type(step_for(adapter, like.bfloat16())) is ModuleStep
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert type(step_for(adapter, like)) is ModuleStep
    for name in ("project", "normed_input", "finish", "logits"):
        own = type("Own", (type(adapter),), {name: lambda *a: None})
        monkeypatch.setattr(adapter, "__class__", own)
        assert type(step_for(adapter, like)) is ModuleStep
        monkeypatch.undo()
    assert type(step_for(adapter, like)) is DirectStep
