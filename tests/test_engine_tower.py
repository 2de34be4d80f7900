"""The engine's vision tower against the stock modules: features, precision, what it refuses, and what it notices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dyrate_lib import generate
from dyrate_lib.engine import eager_engine
from dyrate_lib.engine.ops import TorchOps
from dyrate_lib.engine.tower import Tower
from dyrate_lib.models import Adapter
from tests.contract import random_batch
from tests.engine_cases import check_same, error, lively_tower, stock_features

CPU = torch.device("cpu")


def pixels(pictures: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(pictures, 3, 42, 42, generator=torch.Generator().manual_seed(seed))


def tower_of(model, dtype: torch.dtype = torch.float32) -> Tower:
    return Tower(Adapter(model), CPU, dtype)


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("layer", [-2, -1, 0, 1, -4])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_same_as_stock(strategy, layer, pictures):
    model, x = lively_tower(strategy, layer), pixels(pictures)
    hidden = model.model.vision_tower(x, output_hidden_states=True).hidden_states[layer]
    wanted = stock_features(model, x)
    tower = tower_of(model)
    assert tower.odd is None and len(tower.layers) == layer % 4
    with torch.no_grad():
        found, features = tower.patches(x, TorchOps()), tower.features(x, TorchOps())
    hidden = hidden[:, 1:] if strategy == "default" else hidden
    for mine, true in ((found, hidden), (features, wanted)):
        assert float((mine - true).abs().max()) <= 1e-5 * float(true.abs().max())
    assert features.shape == (pictures * (9 if strategy == "default" else 10), 32)


def test_only_the_layers_that_are_read_run():
    """What stands behind `vision_feature_layer` is not touched, the last norm included."""
    model = lively_tower()
    wanted = stock_features(model, pixels())
    clip = Adapter(model)._clip
    for parameter in (*clip.encoder.layers[-1].parameters(), *clip.post_layernorm.parameters()):
        parameter.data.fill_(torch.nan)
    torch.testing.assert_close(tower_of(model).features(pixels(), TorchOps()), wanted, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_as_close_to_float32_as_stock():
    """Over several weights and pictures, so that chance does not decide."""
    ours, theirs = [], []
    for seed in range(6):
        wide = lively_tower()
        for parameter in wide.model.vision_tower.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        wide = wide.to(torch.bfloat16).double()  # weights that bfloat16 holds
        narrow, x = copy.deepcopy(wide).to(torch.bfloat16), pixels(2, seed).to(torch.bfloat16)
        with torch.no_grad():
            true = stock_features(wide, x.double())
            theirs.append(error(stock_features(narrow, x), true))
            ours.append(error(tower_of(narrow, torch.bfloat16).features(x, TorchOps()), true))
    assert sum(ours) <= 1.02 * sum(theirs), (ours, theirs)
    assert max(ours) < 0.05


def test_weights_are_held_once_and_given_back():
    model = lively_tower()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    addresses = {name: p.data_ptr() for name, p in model.model.vision_tower.named_parameters() if "proj" not in name}
    tower = tower_of(model)
    attention = Adapter(model).vision_layers[0].self_attn
    whole = tower.layers[0].qkv[0]
    for row, name in enumerate(("q_proj", "k_proj", "v_proj")):
        assert getattr(attention, name).weight.data_ptr() == whole[32 * row].data_ptr()
    assert all(
        p.data_ptr() == addresses[name] for name, p in model.model.vision_tower.named_parameters() if name in addresses
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tower.release()
    assert attention.q_proj.weight.untyped_storage().nbytes() == attention.q_proj.weight.nbytes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def activation(model):
    Adapter(model).vision_layers[0].mlp.activation_fn = nn.GELU()


def several(model):
    model.config.vision_feature_layer = [-2, -1]
    model.model.multi_modal_projector.linear_1 = nn.Linear(64, 32)


def wrapped(model):
    attention = Adapter(model).vision_layers[1].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    attention.q_proj.weight, attention.q_proj.bias = attention.q_proj[0].weight, attention.q_proj[0].bias


def other_layer(model):
    layers = Adapter(model).vision_layers
    layers[0].__class__ = type("OtherLayer", (type(layers[0]),), {})


def seeing(model):
    return model.model.vision_tower, model.model.multi_modal_projector


ODD = {
    "activation": (activation, "GELU"), "layers": (several, "several"), "wrapped": (wrapped, "Sequential"),
    "layer": (other_layer, "OtherLayer"),
    "type": (lambda model: [part.double() for part in seeing(model)], "language model's type"),
    "norm": (lambda model: setattr(Adapter(model)._clip, "pre_layrnorm", nn.RMSNorm(32)), "RMSNorm"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_towers_run_by_their_own_modules(name):
    change, why = ODD[name]
    model = lively_tower()
    change(model)
    x = pixels()
    wanted = stock_features(model, x)
    tower = tower_of(model)
    assert tower.odd is not None and why in tower.odd
    assert torch.equal(tower.features(x, TorchOps()), wanted)


def test_hooks_of_the_tower_are_called():
    model, calls = lively_tower(), []
    engine = eager_engine(model)
    engine.see(pixels())
    handle = Adapter(model).vision_layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    found = engine.see(pixels())  # transformers has hooks of its own from here on, which are no reason to run the stock tower
    assert len(calls) == 1 and engine.tower.hooked
    handle.remove()
    torch.testing.assert_close(engine.see(pixels()), found, atol=1e-5, rtol=1e-5)
    assert len(calls) == 1 and not engine.tower.hooked
    engine.release()


def test_pictures_of_another_size_are_refused_as_by_stock():
    model = lively_tower()
    with pytest.raises(ValueError, match="doesn't match model"):
        tower_of(model).features(torch.zeros(1, 3, 56, 56), TorchOps())


CHANGES = {
    "in place": lambda clip, model: clip.encoder.layers[0].self_attn.k_proj.weight.data.mul_(-1.5),
    "data": lambda clip, model: swap_data(clip.encoder.layers[0].mlp.fc1.weight),
    "parameter": lambda clip, model: setattr(clip.pre_layrnorm, "weight", nn.Parameter(torch.full((32,), 3.0))),
    "module": lambda clip, model: setattr(clip.encoder.layers[1], "layer_norm2", nn.LayerNorm(32)),
    "layer": lambda clip, model: clip.encoder.layers.__setitem__(1, copy.deepcopy(clip.encoder.layers[0])),
    "projector": lambda clip, model: setattr(model.model, "multi_modal_projector", Half(model)),
}


class Half(nn.Module):
    """Another projector."""

    def __init__(self, model):
        super().__init__()
        self.inner = copy.deepcopy(model.model.multi_modal_projector)

    def forward(self, x):
        return 0.5 * self.inner(x)


def swap_data(parameter):
    parameter.data = -parameter.data


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_in_the_tower_counts(what):
    model, batch = lively_tower(), random_batch(3, ((2, 5, True), (0, 4, True)), seed=1)
    engine = eager_engine(model)
    kwargs = dict(max_new_tokens=4, eos_token_id=[], return_logits=True)
    before = generate(model, batch, None, engine=engine, **kwargs)
    CHANGES[what](Adapter(model)._clip, model)
    assert engine.usable()  # the language model is as it was
    ours = generate(model, batch, None, engine=engine, **kwargs)
    check_same(ours, generate(model, batch, None, engine="reference", **kwargs))
    assert not torch.allclose(ours.logits[:, 0], before.logits[:, 0], atol=1e-4)
    engine.release()


def test_tower_of_the_prompts_that_the_engine_lays_out_is_its_own(monkeypatch):
    """The stock tower does not run where the engine's can."""
    model, batch = lively_tower(), random_batch(3, ((2, 5, True),), seed=1)
    engine = eager_engine(model)
    monkeypatch.setattr(type(model.model), "get_image_features", lambda *_, **__: pytest.fail("the stock tower ran"))
    generate(model, batch, None, 2, engine=engine)
    engine.release()
