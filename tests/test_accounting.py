"""Accounting: FlopCounterMode on real runs, the arithmetic that the study states, and properties for every input."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dyrate_lib.accounting import (
    CONVENTIONS,
    Flops,
    combine,
    decode_traffic,
    flop_parts,
    flops,
    kv_bytes,
    llm_parameters,
    paper_layer_flops,
    token_counts,
)
from dyrate_lib.errors import InputError


@dataclass(frozen=True)
class Dimensions:
    """What accounting reads of a ModelInfo."""

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocab: int
    n_image_tokens: int = 576
    vision_layers: int = 24
    vision_hidden: int = 1024
    vision_mlp: int = 4096
    vision_heads: int = 16
    vision_tokens: int = 577
    patch: int = 14
    image_size: int = 336
    projector_hidden: int = 4096
    feature_dim: int = 1024


LLAVA_7B = Dimensions("7b", 32, 32, 32, 128, 4096, 11008, 32064)
LLAVA_13B = Dimensions("13b", 40, 40, 40, 128, 5120, 13824, 32064, projector_hidden=5120)
TINY = Dimensions("tiny", 4, 4, 2, 8, 48, 80, 99, 16, 3, 32, 64, 2, 17, 14, 56, 48, 32)


def kept_from(info, steps, layer, count, n_image=None):
    """FastV's or VTW's shape: everything below `layer`, `count` from it on."""
    kept = np.full((steps, info.n_layers), info.n_image_tokens if n_image is None else n_image)
    kept[:, layer:] = count
    return kept


@pytest.fixture(scope="module")
def tiny_llava():
    """A random LLaVA with grouped-query heads and a head width that is not hidden / heads."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, vision_feature_layer=-2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("text", [3, 12])
@pytest.mark.parametrize("n_pictures", [0, 1, 2])
def test_cached_equals_flop_counter(tiny_llava, text, n_pictures):
    n_image, steps = 16 * n_pictures, 4
    ids = torch.tensor([[1] + [98] * n_image + [5] * (text - 1)])
    pixels = {"pixel_values": torch.rand(n_pictures, 3, 56, 56)} if n_pictures else {}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        tiny_llava.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **pixels,
            max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    counted = flops(TINY, ids.shape[1], n_image, kept_from(TINY, steps, 0, n_image, n_image), "cached")
    assert float(counted) == counter.get_total_flops()
    assert counted.ratio == 1.0


def test_parts_equal_flop_counter_by_module(tiny_llava):
    ids = torch.tensor([[1] + [98] * 16 + [5] * 6])
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        tiny_llava(input_ids=ids, pixel_values=torch.rand(1, 3, 56, 56), logits_to_keep=1)
    by_module = {name.rsplit(".", 1)[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    parts = flops(TINY, 23, 16, kept_from(TINY, 1, 0, 16), "cached").by_part
    assert parts["vision"] == by_module["vision_tower"]
    assert parts["projector"] == by_module["multi_modal_projector"]
    assert parts["head"] == by_module["lm_head"]
    assert parts["prefill"] == by_module["language_model"]
    assert parts["decode"] == 0


def test_vtw_at_16_of_40_is_never_55_percent():
    ratios = [
        flops(LLAVA_13B, 576 + text, 576, kept_from(LLAVA_13B, 1, 16, 0), "paper-prefill").ratio
        for text in range(0, 101)
    ]
    assert min(ratios) == pytest.approx(0.40, abs=0.005) and max(ratios) == pytest.approx(0.49, abs=0.005)


def test_one_more_full_layer_adds_at_most_1_6_points():
    def gap(text):
        two, three = (
            flops(LLAVA_7B, 576 + text, 576, kept_from(LLAVA_7B, 1, k, 288), "paper-prefill").ratio for k in (2, 3)
        )
        return three - two

    gaps = [gap(text) for text in range(1, 200)]
    assert 0 < min(gaps) and 0.0150 < max(gaps) <= 0.0165


def test_image_kv_against_weights_on_7b():
    image, weights = kv_bytes(LLAVA_7B, 576, 2), 2 * sum(llm_parameters(LLAVA_7B).values())
    assert image / 1e9 == pytest.approx(0.30, abs=0.005)
    assert weights / 1e9 == pytest.approx(13.5, abs=0.05)
    assert weights / image == pytest.approx(45, abs=1)  # the batch at which images weigh as much as weights
    full, none = (decode_traffic(LLAVA_7B, 640, 576, kept_from(LLAVA_7B, 2, 0, n))[0] for n in (576, 0))
    assert 1 - none / full == pytest.approx(0.022, abs=0.002)
    assert full - none == image
    assert decode_traffic(LLAVA_7B, 640, 576, kept_from(LLAVA_7B, 2, 0, 576), batch=45)[0] > 2 * none


def test_paper_formula_and_rerun_by_hand():
    assert paper_layer_flops(3, 5, 7) == 4 * 3 * 25 + 2 * 9 * 5 + 2 * 3 * 5 * 7
    kept = kept_from(TINY, 2, 1, 4)
    expected = sum(paper_layer_flops(n, 48, 80) for n in [23, 11, 11, 11] + [24, 12, 12, 12])
    assert float(flops(TINY, 23, 16, kept, "paper")) == expected
    assert float(flops(TINY, 23, 16, kept, "paper-prefill")) == sum(
        paper_layer_flops(n, 48, 80) for n in [23, 11, 11, 11]
    )


def test_token_counts_at_layer_inputs():
    counts = token_counts(TINY, 23, 16, [[16, 16, 8, 8], [16, 16, 8, 8], [16, 16, 2, 2]])
    assert counts.prefill.tolist() == [23, 23, 15, 15]
    assert counts.kv_read.tolist() == [[23, 23, 15, 15], [24, 24, 16, 16], [25, 25, 11, 11]]


def test_predictor_is_negligible_on_7b():
    kept = kept_from(LLAVA_7B, 64, 3, 100)
    with_predictor = flops(LLAVA_7B, 640, 576, kept, "cached", n_rates=10)
    assert with_predictor.by_part["predictor"] == 64 * 2 * 4 * 32 * 10
    assert with_predictor.by_part["predictor"] / with_predictor < 1e-6


kept_arrays = st.integers(1, 5).flatmap(
    lambda steps: st.lists(st.lists(st.integers(0, 16), min_size=4, max_size=4), min_size=steps, max_size=steps)
)


@settings(max_examples=60, deadline=None)
@given(kept=kept_arrays, text=st.integers(1, 30), convention=st.sampled_from(CONVENTIONS), data=st.data())
def test_keeping_fewer_never_costs_more(kept, text, convention, data):
    kept = np.array(kept)
    fewer = np.array([[data.draw(st.integers(0, int(v))) for v in row] for row in kept])
    more, less = (flops(TINY, 16 + text, 16, k, convention) for k in (kept, fewer))
    assert less <= more <= more.unpruned
    assert less.unpruned == more.unpruned
    assert all(less.by_part[name] <= more.by_part[name] for name in more.by_part)
    full = flops(TINY, 16 + text, 16, np.full_like(kept, 16), convention)
    assert full == full.unpruned and full.ratio == 1.0


@settings(max_examples=30, deadline=None)
@given(kept=kept_arrays, text=st.integers(1, 30), convention=st.sampled_from(CONVENTIONS))
def test_tensors_count_like_arrays_and_carry_gradients(kept, text, convention):
    value = flops(TINY, 16 + text, 16, torch.tensor(kept), convention)
    assert value == flops(TINY, 16 + text, 16, kept, convention)
    soft = torch.tensor(kept, dtype=torch.float64, requires_grad=True)
    total = sum(flop_parts(TINY, 16 + text, 16, soft, convention).values())
    assert total.item() == pytest.approx(float(value))
    total.backward()
    used = soft.grad[:1] if convention == "paper-prefill" else soft.grad
    assert (used > 0).all()


def test_flops_is_a_float_with_parts():
    value = flops(TINY, 23, 16, kept_from(TINY, 3, 2, 4), "cached")
    assert isinstance(value, float) and value == sum(value.by_part.values())
    assert set(value.by_part) == {"vision", "projector", "prefill", "decode", "head"}
    assert value.part_ratio("prefill", "decode") < value.ratio < 1  # the vision tower is not pruned
    assert set(flops(TINY, 23, 16, kept_from(TINY, 3, 2, 4), includes_vision=False).by_part) == {
        "prefill", "decode", "head"
    }  # fmt: skip
    again = pickle.loads(pickle.dumps(value))
    assert isinstance(again, Flops) and again.by_part == value.by_part and again.ratio == value.ratio
    both = combine([value, value])
    assert both == 2 * value and both.ratio == value.ratio and both.by_part["head"] == 2 * value.by_part["head"]
    with pytest.raises(InputError, match="no part named"):
        value.part_ratio("llm")
    with pytest.raises(InputError):
        combine([])


def test_large_counts_do_not_overflow():
    value = flops(LLAVA_13B, 100_000, 576, np.full((300, 40), 576), "paper")
    by_hand = sum(40 * paper_layer_flops(100_000 + t, 5120, 13824) for t in range(300))  # Python's own integers
    assert float(value) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "prompt, n_image, kept, convention, message",
    [
        (10, 16, [[1] * 4], "paper", "cannot hold"),
        (0, 0, [[0] * 4], "paper", "cannot hold"),
        (23, 16, [[17] * 4], "paper", "between 0 and the 16"),
        (23, 16, [[-1] * 4], "cached", "between 0 and the 16"),
        (23, 16, [[float("nan")] * 4], "cached", "between 0 and the 16"),
        (23, 16, [[1] * 5], "cached", r"\[steps, 4\]"),
        (23, 16, np.zeros((0, 4)), "cached", r"\[steps, 4\]"),
        (23, 16, [1] * 4, "cached", r"\[steps, 4\]"),
        (23, 16, [[1] * 4], "kached", "unknown FLOPs convention 'kached'"),
    ],
)
def test_impossible_counts_are_refused(prompt, n_image, kept, convention, message):
    with pytest.raises(InputError, match=message):
        flops(TINY, prompt, n_image, kept, convention)


def test_kv_bytes_refuses_wrong_shapes():
    assert kv_bytes(TINY, [1, 2, 3, 4], 4) == 2 * 10 * 2 * 8 * 4
    for tokens, size in (([1, 2], 2), (-1, 2), (1, 0)):
        with pytest.raises(InputError):
            kv_bytes(TINY, tokens, size)
    with pytest.raises(InputError, match="batch"):
        decode_traffic(TINY, 23, 16, kept_from(TINY, 2, 0, 4), batch=0)
