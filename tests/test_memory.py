"""The memory plan of predictor training: against the live bytes of a real step, and what it decides."""

import dataclasses
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dyrate_lib import InputError, ResourceError, load_vlm, masks, memory, model_info
from dyrate_lib.dimensions import llava_dimensions
from dyrate_lib.memory import largest_batch, parameter_count, training_memory
from dyrate_lib.models import Adapter
from dyrate_lib.teacher_forcing import masked_logits, read_prompt_and_response
from dyrate_lib.training import FlopsRatio, predictor_loss


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside that are still alive, a model's weights not counted: now, and at most."""

    def __init__(self, model):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}
        self.weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage._cdata
                if place not in self.known and place not in self.weights:
                    self.known[place] = size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, place, size)
        return out

    def gone(self, place, size):
        if self.known.pop(place, None) is not None:
            self.now -= size


def step(model, inputs, response, layer, n_rates=4):
    """Peak of live bytes in one step of training, from the embedded prompt to the gradient of the predictor's logits."""
    adapter, info = Adapter(model), model_info(model)
    batch, longest = response.shape
    logits = torch.zeros(batch, longest, n_rates, requires_grad=True)
    with LiveBytes(model) as live:
        forced = read_prompt_and_response(adapter, adapter.embed(inputs), response, layer)
        before = live.now
        live.peak = live.now
        _, loss = predictor_loss(
            adapter, logits * 1.0, forced, response, [longest] * batch, FlopsRatio(info, layer, n_rates, "paper"), 1.0, 0.5, 1.0,
            torch.Generator().manual_seed(0),
        )  # fmt: skip
        loss.backward()
    return live.peak, before, logits.grad


@pytest.fixture(scope="module")
def long_model():
    """Eight layers whose attention maps matter: 144 image tokens, 8 heads of 16."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=168, patch_size=14,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=1024, eos_token_id=2, bos_token_id=1, pad_token_id=0,
        ),
        image_token_id=500, image_seq_length=144, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def batch_of(model, size, text=40):
    ids = torch.randint(3, 499, (size, 144 + text))
    ids[:, 8:152] = 500
    pixels = torch.randn(size, 3, 168, 168)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}


@pytest.mark.parametrize(
    "size, response, again, dtype",
    [
        (1, 32, False, torch.float32),
        (4, 24, True, torch.float32),
        (2, 16, False, torch.bfloat16),
        (2, 64, True, torch.bfloat16),
    ],
)
def test_the_plan_is_near_what_a_step_holds(long_model, monkeypatch, size, response, again, dtype):
    monkeypatch.setattr("dyrate_lib.teacher_forcing.computed_again", lambda *args: again)
    model = long_model.to(dtype)
    inputs = batch_of(model, size)
    reply = torch.randint(3, 499, (size, response))
    peak, _, _ = step(model, inputs, reply, layer=2)
    plan = training_memory(
        model_info(model), size, prompt_length=inputs["input_ids"].shape[1], response=response, layer=2,
        bytes_each=dtype.itemsize, checkpoint=again,
    )  # fmt: skip
    assert 0.9 < plan.activations / peak < 1.15, (plan, peak)


def test_computing_again_changes_no_gradient(long_model, monkeypatch):
    model = long_model.float()
    inputs, reply = batch_of(model, 2), torch.randint(3, 499, (2, 16))
    found = []
    for again in (False, True):
        monkeypatch.setattr("dyrate_lib.teacher_forcing.computed_again", lambda *args, again=again: again)
        found.append(step(model, inputs, reply, layer=3))
    assert torch.equal(found[0][2], found[1][2]) and float(found[0][2].abs().sum()) > 0
    assert found[1][0] < 0.5 * found[0][0]


def test_parameters_are_counted(long_model):
    assert parameter_count(model_info(long_model)) == sum(p.numel() for p in long_model.parameters())
    for size in ("7b", "13b"):
        model = load_vlm(f"random:llava-1.5-{size}", device="meta")[0]
        assert parameter_count(llava_dimensions(size)) == sum(p.numel() for p in model.parameters())


def test_what_fits_a_card_of_24_gb():
    seven = llava_dimensions("7b")
    assert 14.0e9 < training_memory(seven, 1).weights < 14.3e9
    assert largest_batch(seven, 24 * 10**9, layer=2) == 1  # activations kept
    assert 12 <= largest_batch(seven, 24 * 10**9, layer=2, checkpoint=True) <= 20  # the study trains with 12
    assert largest_batch(llava_dimensions("13b"), 24 * 10**9, checkpoint=True) == 0


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 64), response=st.integers(1, 128), text=st.integers(0, 300), layer=st.integers(1, 31))
def test_the_plan_grows_with_everything(batch, response, text, layer):
    info = llava_dimensions("7b")
    options = {"prompt_length": 576 + text, "response": response, "layer": layer}
    here = training_memory(info, batch, **options)
    assert here.total == here.weights + here.activations
    assert training_memory(info, batch + 1, **options).activations > here.activations
    assert training_memory(info, batch, **{**options, "prompt_length": 577 + text}).activations > here.activations
    if layer < 30:  # with two layers or more, one of them is cheaper than all
        assert training_memory(info, batch, checkpoint=True, **options).saved < here.saved


def test_the_decision(monkeypatch):
    info = llava_dimensions("7b")
    x, mask = torch.empty(2, 704, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(2, 704, 704, device="meta")
    kept, again = (training_memory(info, 2, layer=2, checkpoint=c).activations for c in (False, True))
    for free, expected in ((2 * kept, False), (kept, True), (2 * again, True), (None, False)):
        monkeypatch.setattr(memory, "room", lambda device, free=free: free)
        assert memory.computed_again(info, x, mask, 2, 64) is expected
    monkeypatch.setattr(memory, "room", lambda device: int(0.6 * again))
    with pytest.raises(ResourceError, match=r"a batch of 2 needs .* about 1 samples fit"):
        memory.computed_again(info, x, mask, 2, 64)
    assert memory.computed_again(dataclasses.replace(info, n_image_tokens=0), x, mask, 2, 64) is False


@pytest.mark.parametrize(
    "options", [{"batch": 0}, {"response": 0}, {"prompt_length": 500}, {"layer": 0}, {"layer": 32}, {"bytes_each": 3}]
)
def test_impossible_plans_are_refused(options):
    with pytest.raises(InputError, match="no such training"):
        training_memory(llava_dimensions("7b"), **{"batch": 2, **options})
    with pytest.raises(InputError, match="no plan for a batch"):
        training_memory(dataclasses.replace(llava_dimensions("7b"), n_image_tokens=0), 1)


def test_masked_logits_without_gradients_keep_nothing(long_model, monkeypatch):
    monkeypatch.setattr(
        "dyrate_lib.teacher_forcing.computed_again", lambda *args: pytest.fail("asked for without need")
    )
    model = long_model.float()
    adapter = Adapter(model)
    forced = read_prompt_and_response(adapter, adapter.embed(batch_of(model, 1)), torch.randint(3, 499, (1, 4)), 2)
    keep = masks.prefix_masks(torch.full((1, 4), 50), 144).float()
    with torch.no_grad():
        assert masked_logits(adapter, forced, keep).shape == (1, 4, 512)
