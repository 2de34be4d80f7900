"""`generate(engine=...)`: who runs what, what is refused and how, and that a model is left as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dyrate_lib import ST3, FastV, InputError, NoReduction, RatePath, RatePredictor, ResourceError, VisionZip, generate
from dyrate_lib import generation as generation_module
from dyrate_lib.engine import Engine, eager_engine, engine_of, release, select, unsupported
from dyrate_lib.errors import Unsupported
from dyrate_lib.methods.base import Method
from tests.contract import Shape, random_batch, small_model
from tests.engine_cases import METHODS, ROWS, check_same


@pytest.fixture(scope="module")
def model():
    return copy.deepcopy(small_model(Shape(layers=4, heads=2, kv_heads=2, grid=3, width=32)))


@pytest.fixture(scope="module")
def batch():
    return random_batch(3, ROWS, seed=1)


@pytest.fixture(scope="module")
def engine(model):
    return eager_engine(model)


@pytest.fixture
def has_graph(monkeypatch):
    """The graph engine as if there were a GPU: by the twins, nothing captured. Tells how often it was made."""
    made = []

    def make(model):
        if vars(model).get(select._HELD) is None:
            vars(model)[select._HELD] = eager_engine(model)
            made.append(model)
        return vars(model)[select._HELD]

    monkeypatch.setattr(select, "engine_of", make)
    monkeypatch.setattr(generation_module, "_said", set())
    yield made
    for model in made:
        release(model)


@dataclass
class ByContent(Method):
    """How many stay depends on what is seen, by a rule that no engine can know."""

    layer: int = 2
    name: ClassVar[str] = "by-content"

    def prefill(self, view):
        return (view.scores > view.scores[view.scores > -torch.inf].mean()).sum(-1)


@dataclass
class OwnDecoder(FastV):
    """Has a decoder of its own."""

    def runner(self, adapter, prompt, capacity):
        return super().runner(adapter, prompt, capacity + 1)


# -- who runs what ------------------------------------------------------------------------------------------------------


def test_auto_falls_back_and_says_so_once(model, batch, caplog, monkeypatch):
    monkeypatch.setattr(generation_module, "_said", set())
    wanted = generate(model, batch, FastV(2, 0.5), 3, engine="reference")
    with caplog.at_level("WARNING"):
        check_same(generate(model, batch, FastV(2, 0.5), 3), wanted)
        assert not caplog.records  # the default says nothing
        for _ in range(2):
            check_same(generate(model, batch, FastV(2, 0.5), 3, engine="auto"), wanted)
    assert len(caplog.records) == 1 and "CUDA device, the model is on cpu" in caplog.text
    assert "engine='reference'" in caplog.text
    with pytest.raises(InputError, match="needs a CUDA device"):
        generate(model, batch, FastV(2, 0.5), 3, engine="graph")
    with pytest.raises(InputError, match="choose one of auto, graph, reference"):
        generate(model, batch, FastV(2, 0.5), 3, engine="fast")


@pytest.mark.parametrize("name", [None, "auto", "graph"])
def test_the_graph_is_taken_where_it_can_run(model, batch, has_graph, caplog, name):
    out = generate(model, batch, FastV(2, 0.5), 3, engine=name)
    check_same(out, generate(model, batch, FastV(2, 0.5), 3, engine="reference"))
    generate(model, batch, FastV(2, 0.5), 3, engine=name)
    assert has_graph == [model] and not caplog.records  # made once, kept with the model
    release(model)
    assert select._HELD not in vars(model)


@pytest.mark.parametrize(
    "method, kwargs, why",
    [
        (FastV(2, 0.5, refresh=True), {}, "runs the whole sequence anew"),
        (ByContent(), {}, "depends on what it sees"),
        (OwnDecoder(2, 0.5), {}, "decoder of its own"),
        (FastV(2, 0.5), {"eos_token_id": list(range(100))}, "up to 64 end tokens"),
    ],
    ids=["refresh", "by content", "decoder", "ends"],
)
def test_what_a_graph_cannot_hold(model, batch, has_graph, method, kwargs, why, caplog):
    """ "graph" refuses with the reason; the default takes the reference without a word, "auto" with one."""
    with pytest.raises(InputError, match=why) as refused:
        generate(model, batch, method, 3, engine="graph", **kwargs)
    assert "Use engine='reference'" in str(refused.value)
    wanted = generate(model, batch, method, 3, engine="reference", **kwargs)
    check_same(generate(model, batch, method, 3, **kwargs), wanted)
    assert not caplog.records
    with caplog.at_level("WARNING"):
        check_same(generate(model, batch, method, 3, engine="auto", **kwargs), wanted)
    assert why in caplog.text


def test_an_engine_serves_its_own_model_only(model, batch, engine):
    other = copy.deepcopy(model)
    with pytest.raises(InputError, match="another model"):
        generate(other, batch, None, 2, engine=engine)
    gone = eager_engine(other)
    gone.release()
    with pytest.raises(InputError, match="released"):
        generate(other, batch, None, 2, engine=gone)


def test_nothing_needs_triton_before_a_graph_is_asked_for():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not there
        "import dyrate_lib, dyrate_lib.engine\n"
        "from tests.contract import random_batch, small_model\n"
        "from tests.contract import Shape\n"
        "model = small_model(Shape(layers=2, heads=2, kv_heads=2, grid=3, width=32))\n"
        "batch = random_batch(3, ((2, 3, True),))\n"
        "print(dyrate_lib.generate(model, batch, None, 2, engine=dyrate_lib.engine.eager_engine(model)).sequences.shape)\n"
        "assert not [name for name in sys.modules if name.endswith('_kernel') or name.endswith('triton_ops')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "torch.Size([1, 17])" in done.stdout, done.stderr[-2000:]


def test_the_command_line_passes_it_on(tmp_path, capsys, pictures):
    from dyrate_lib.__main__ import main

    pictures[0].save(tmp_path / "picture.png")
    common = [
        "caption",
        str(tmp_path / "picture.png"),
        "--model",
        "random:tiny",
        "--method",
        "fastv",
        "--device",
        "cpu",
    ]
    assert main([*common, "--engine", "graph", "--max-new-tokens", "2", "--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert main([*common, "--engine", "reference", "--max-new-tokens", "2", "--out", str(tmp_path)]) == 0


# -- bad input ----------------------------------------------------------------------------------------------------------

BAD = {
    "method": dict(method="fastv"),
    "rate path": dict(method=RatePath(2, [[0.1], [0.2]])),
    "layer": dict(method=FastV(9, 0.5), max_new_tokens=9999, temperature=-1.0, do_sample=True),
    "no token": dict(max_new_tokens=0),
    "context": dict(max_new_tokens=9999, top_p=0.0, do_sample=True),
    "temperature": dict(do_sample=True, temperature=0.0),
    "top_p": dict(do_sample=True, top_p=1.5),
    "top_k": dict(do_sample=True, top_k=-1),
    "penalty": dict(repetition_penalty=0.0),
    "copies": dict(num_return_sequences=2),
    "no copy": dict(num_return_sequences=0, do_sample=True),
    "forced": dict(forced_tokens=torch.ones(3, 2, dtype=torch.long)),
    "forced, flat": dict(forced_tokens=torch.ones(4, dtype=torch.long)),
    "forced, empty": dict(forced_tokens=torch.ones(4, 0, dtype=torch.long)),
    "several": dict(method=7, max_new_tokens=0, repetition_penalty=0.0),
}
BAD_INPUTS = {
    "no ids": lambda batch: {"pixel_values": batch["pixel_values"]},
    "ids of one row": lambda batch: {**batch, "input_ids": batch["input_ids"][0]},
    "a picture too many": lambda batch: {**batch, "pixel_values": batch["pixel_values"][[0, 1, 2, 2]]},
    "no picture": lambda batch: {key: value for key, value in batch.items() if key != "pixel_values"},
    "padded on the right": lambda batch: {key: value.flip(-1) for key, value in batch.items() if key != "pixel_values"},
    "mask of another shape": lambda batch: {**batch, "attention_mask": batch["attention_mask"][:, 1:]},
}


def refusal(*args, **kwargs):
    with pytest.raises(InputError) as refused:
        generate(*args, **kwargs)
    return str(refused.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_alike(model, batch, engine, name):
    """The reference, the graph's name on a machine without one, and an engine at work say the same."""
    wanted = refusal(model, batch, engine="reference", **BAD[name])
    assert refusal(model, batch, engine=engine, **BAD[name]) == wanted
    assert refusal(model, batch, **BAD[name]) == wanted
    if name != "rate path":  # told by the batch, which the graph does not come to see here
        assert refusal(model, batch, engine="graph", **BAD[name]) == wanted


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("method", [FastV(2, 0.5), VisionZip(4, 2)], ids=["fastv", "visionzip"])
def test_bad_inputs_are_refused_alike(model, batch, engine, name, method):
    inputs = BAD_INPUTS[name](batch)
    wanted = refusal(model, inputs, method, 2, engine="reference")
    assert refusal(model, inputs, method, 2, engine=engine) == wanted
    check_same(  # and nothing is left of it
        generate(model, batch, method, 3, engine=engine), generate(model, batch, method, 3, engine="reference")
    )


def test_heads_of_a_predictor(model, batch, engine):
    from dyrate_lib import DyRate

    method = DyRate(RatePredictor(8), 2)
    assert "heads" in refusal(model, batch, method, 2, engine=engine)
    assert refusal(model, batch, method, 2, engine=engine) == refusal(model, batch, method, 2, engine="reference")


def test_a_model_that_is_being_pruned(model, batch, engine):
    with FastV(2, 0.5)(model):
        for one in (None, "reference", engine):
            assert "pruned by a context" in refusal(model, batch, None, 2, engine=one)


# -- models that the graph cannot run -----------------------------------------------------------------------------------


def changed(model, change):
    """A copy of the model as if it were on a GPU, changed."""
    model = copy.deepcopy(model)
    change(model.model.language_model.layers[1], model)
    return model


def swap(module, name, new):
    setattr(module, name, new)


ODD = {
    "quantised": (lambda layer, model: swap(layer.self_attn, "q_proj", Odd(layer.self_attn.q_proj)), "is a Odd, not"),
    "norm": (lambda layer, model: swap(layer, "input_layernorm", torch.nn.LayerNorm(32)), "norm is a LayerNorm"),
    "last norm": (lambda layer, model: swap(model.model.language_model, "norm", torch.nn.LayerNorm(32)), "last norm"),
    "head": (lambda layer, model: swap(model, "lm_head", torch.nn.Linear(32, 200)), "output head"),
    "mlp": (lambda layer, model: swap(layer.mlp, "up_proj", torch.nn.Linear(32, 96)), "MLP has biases"),
    "bias": (lambda layer, model: swap(layer.self_attn, "k_proj", torch.nn.Linear(32, 32)), "only some of"),
    "hook": (lambda layer, model: layer.mlp.register_forward_hook(print), "forward hooks"),
    "types": (lambda layer, model: layer.mlp.down_proj.double(), "several types"),
    "activation": (lambda layer, model: swap(model.config.text_config, "hidden_act", "gelu"), "not SiLU"),
    "rotary": (
        lambda layer, model: swap(model.config.text_config, "rope_parameters", {"rope_type": "dynamic"}),
        "'dynamic'",
    ),
}


class Odd(torch.nn.Module):
    """A projection with more to it than a matrix."""

    def __init__(self, inner):
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_refused_with_the_reason(model, name):
    change, why = ODD[name]
    with pytest.raises(Unsupported, match=why) as refused:
        Engine(changed(model, change), select.TorchOps(), capture=False)
    assert "Use engine='reference'" in str(refused.value)


def test_unsupported_names_type_size_and_package(model, monkeypatch):
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)

    def there(model):
        """`unsupported` of a model whose first parameter is said to be on a GPU."""
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "parameters", lambda self, recurse=True: iter([on_gpu]))
            return unsupported(model)

    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(select, "check_model", lambda adapter: None)
    assert there(model) is None
    assert "not torch.float64" in there(copy.deepcopy(model).double())
    odd = small_model(Shape(layers=2, heads=4, kv_heads=4, grid=3, width=32))
    assert "head sizes" in there(odd) and "the model has 8" in there(odd)
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in there(model)
    assert "CUDA device, the model is on cpu" in unsupported(model)


# -- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [NoReduction(), FastV(2, 0.5), ST3(1, 2)], ids=lambda method: method.name)
def test_says_how_many_samples_fit_before_allocating(model, batch, monkeypatch, method):
    from dyrate_lib.engine import cache, runner

    seen, check_fit = [], cache.check_fit
    monkeypatch.setattr(runner, "check_fit", lambda *args: seen.append(args) or check_fit(*args))
    engine = eager_engine(model)
    generate(model, batch, method, 30, engine=engine)
    info, n, rows, entries, _, dtype, _ = seen[0]
    if method.name == "st3":  # which takes over the reference decoder's caches, all of the prompt's rows in every layer
        assert sum(entries) >= 4 * (rows + 30) + 4 * rows

    def need(samples):
        return samples * cache.cache_bytes(info, entries, dtype) + cache.prefill_bytes(info, samples, rows, dtype)

    assert n == 4 and need(4) >= (engine.low.room() + engine.tail.room()) * dtype.itemsize
    engine.reset()
    for free, fitting in ((need(4) - 1, 3), (need(3), 3), (need(3) - 1, 2), (need(1), 1), (need(1) - 1, 0), (0, 0)):
        monkeypatch.setattr(cache, "free_memory", lambda device, free=free: free)
        with pytest.raises(ResourceError, match="A batch of 4 needs") as refused:
            generate(model, batch, method, 30, engine=engine)
        assert (f"a batch of {fitting} would fit" if fitting else "not even one sample") in str(refused.value)
        assert engine.low.room() == engine.tail.room() == 0
    monkeypatch.setattr(cache, "free_memory", lambda device: need(4))
    generate(model, batch, method, 30, engine=engine)
    engine.release()


def test_room_is_made_at_the_cost_of_older_plans(model, batch, monkeypatch):
    from dyrate_lib.engine import runner

    engine, asked = eager_engine(model), []
    wanted = generate(model, batch, FastV(2, 0.5), 6, engine="reference")
    generate(model, batch, NoReduction(), 3, engine=engine)

    def check_fit(*args):
        asked.append(len(engine.plans))
        if len(engine.plans) > 0 and len(asked) == 1:
            raise ResourceError("full")

    monkeypatch.setattr(runner, "check_fit", check_fit)
    check_same(generate(model, batch, FastV(2, 0.5), 6, engine=engine), wanted)
    assert asked[:2] == [1, 0]
    engine.release()


# -- the model is left as it was ----------------------------------------------------------------------------------------


def test_fusing_and_releasing_leave_the_model_as_it_was(tmp_path):
    model = copy.deepcopy(small_model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = eager_engine(model)
    assert engine.usable()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    projection = model.model.language_model.layers[0].self_attn.k_proj
    assert projection.weight.untyped_storage().nbytes() > projection.weight.nbytes
    vars(model)[select._HELD] = engine
    assert vars(copy.deepcopy(model))[select._HELD] is None
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in before.items())
    release(model)
    assert projection.weight.untyped_storage().nbytes() == projection.weight.nbytes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not engine.usable()


def test_weights_changed_in_place_are_the_engines_too(batch):
    """Training goes on with a fused model; biases are fused as well."""
    from tests.test_families import ROWS as FAMILY_ROWS
    from tests.tiny_families import FAMILIES, model_of

    model, inputs = copy.deepcopy(model_of("qwen2.5-vl")), FAMILIES["qwen2.5-vl"].inputs(FAMILY_ROWS)
    engine = eager_engine(model)
    first = generate(model, inputs, None, 2, engine=engine, return_logits=True)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert engine.usable()
    ours = generate(model, inputs, None, 2, engine=engine, return_logits=True, eos_token_id=[])
    check_same(ours, generate(model, inputs, None, 2, engine="reference", return_logits=True, eos_token_id=[]))
    assert not torch.allclose(ours.logits[:, 0], first.logits[:, 0], atol=1e-2)


CHANGES = {
    "cast": lambda model, layer: model.double().float(),
    "weight": lambda model, layer: swap_data(layer.self_attn.o_proj.weight),
    "parameter": lambda model, layer: swap(layer.mlp.up_proj, "weight", clone(layer.mlp.up_proj.weight)),
    "bias": lambda model, layer: swap(layer.self_attn.o_proj, "bias", torch.nn.Parameter(torch.ones(32))),
    "module": lambda model, layer: swap(layer.self_attn, "q_proj", Odd(layer.self_attn.q_proj)),
    "attention": lambda model, layer: swap(layer, "self_attn", copy.deepcopy(layer.self_attn)),
    "layer": lambda model, layer: model.model.language_model.layers.__setitem__(2, copy.deepcopy(layer)),
    "layers": lambda model, layer: swap(model.model.language_model, "layers", copy.deepcopy(model.model.language_model.layers)),
    "hook": lambda model, layer: layer.mlp.register_forward_hook(lambda *args: None),
    "head": lambda model, layer: swap(model, "lm_head", torch.nn.Linear(32, 200, bias=False)),
    "embeddings": lambda model, layer: model.set_input_embeddings(torch.nn.Embedding(200, 32)),
    "embeddings, resized": lambda model, layer: model.resize_token_embeddings(210, mean_resizing=False),
    "language model": lambda model, layer: swap(model.model, "language_model", copy.deepcopy(model.model.language_model)),
}


def clone(parameter):
    return torch.nn.Parameter(parameter.detach().clone())


def swap_data(parameter):
    parameter.data = parameter.data.clone()


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_model_is_noticed(model, what):
    model = copy.deepcopy(model)
    engine, layer = eager_engine(model), model.model.language_model.layers[2]
    assert engine.usable()
    CHANGES[what](model, layer)
    assert not engine.usable()


def test_hidden_states_asked_of_the_model_are_no_change(model, batch):
    """transformers then hooks its layers by itself, for good."""
    model = copy.deepcopy(model)
    engine = eager_engine(model)
    with torch.no_grad():
        model(**batch, output_hidden_states=True, output_attentions=False)
    assert engine.usable()
    engine.release()


def test_inference_mode_leaves_no_trace(model, batch):
    """An engine made and used in inference mode serves, and its model trains, outside of it."""
    model = copy.deepcopy(model)
    with torch.inference_mode():
        engine = eager_engine(model)
        first = generate(model, batch, METHODS["none"], 4, engine=engine)
    check_same(generate(model, batch, METHODS["none"], 4, engine=engine), first)
    model.requires_grad_(True)
    model(**batch).logits.sum().backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad is not None


def test_engines_are_made_by_name_only_where_they_run(model):
    with pytest.raises(Unsupported, match="CUDA"):
        engine_of(model)
    assert select._HELD not in vars(model)
