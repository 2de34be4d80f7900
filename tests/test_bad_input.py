"""Bad input is refused by an InputError that names the cause, before the model runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from dyrate_lib import (
    DepthPrune,
    DyRate,
    FastV,
    InputError,
    RandomPrune,
    RatePath,
    RatePredictor,
    SparseVLM,
    VisionZip,
    attention_shares,
    chat_prompt,
    generate,
    load_vlm,
    model_info,
    prepare_inputs,
    vtw_search,
)
from dyrate_lib.training import train_predictor


@pytest.fixture
def idle(tiny):
    """The tiny model, whose vision tower and first layer must not run while a test lasts."""
    model, ran = tiny[0], []
    parts = (model.model.vision_tower, model.model.language_model.layers[0])
    handles = [part.register_forward_pre_hook(lambda *_: ran.append(1)) for part in parts]
    yield model
    for handle in handles:
        handle.remove()
    assert not ran


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: RatePath(rank="bogus"), "rank='bogus'"),
        (lambda: RatePath(rates=0.5), "rates=0.5 must be a list"),
        (lambda: RatePath(rates="01"), "must be a list"),
        (lambda: RatePath(rates={0: 0.5}), "must be a list"),
        (lambda: RatePath(rates=[[0.5], 0.3]), "must be a list"),
        (lambda: RatePath(rates=np.float64(0.5)), "must be a list"),
        (lambda: RatePath(rates=[]), "at least one rate"),
        (lambda: RatePath(rates=[2.0]), "rate=2.0"),
        (lambda: DepthPrune({"a": 0.3}), "'a' is no layer"),
        (lambda: DepthPrune({3.5: 0.3}), "3.5 is no layer"),
        (lambda: DepthPrune([0.3]), "as in {3: 0.5}"),
        (lambda: RandomPrune(seed="a"), "seed='a'"),
        (lambda: RatePredictor("4", 5), "n_heads='4'"),
        (lambda: RatePredictor(4, 5, layer=1.5), "layer=1.5"),
        (lambda: SparseVLM(counts=[1, 0.5, 0.2]), "write 1.0"),
        (lambda: VisionZip(36, 1).plan(36, 8), "CLS is one of them"),
        (lambda: FastV("a").resolve_layer(8), "layer=a"),
    ],
)
def test_settings_of_methods(make, word):
    with pytest.raises(InputError, match=word):
        make()


def test_settings_that_are_sound_stay_so():
    assert RatePath(rates=np.array([0.1, 0.5])).rates.shape == (2,) and RatePath(rates=([0.1], (0.5, 0.6))).layer == 3
    assert SparseVLM(counts=[1.0, 0.5, 0.2]).keeps(0, 576, 576) == 576
    assert SparseVLM(counts=[300, 20, 1]).keeps(2, 20, 576) == 1
    assert VisionZip(36, 0).kept_count(36) == 36
    assert chat_prompt("x", image=False).count("<image>") == 0 and chat_prompt("x", image=2).count("<image>") == 2


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(max_new_tokens=None), "max_new_tokens=None"),
        (dict(max_new_tokens="5"), "max_new_tokens='5'"),
        (dict(max_new_tokens=1.5), "whole number of at least 1"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(num_return_sequences=0, do_sample=True), "num_return_sequences=0 must be"),
        (dict(num_return_sequences=1.5), "num_return_sequences=1.5"),
        (dict(num_return_sequences=2), "do_sample"),
        (dict(seed="a"), "seed='a'"),
        (dict(eos_token_id=10**6), "no token of this model"),
        (dict(eos_token_id=[2, "b"]), "eos_token_id='b'"),
        (dict(forced_tokens=torch.full((4, 2), 10**6)), "forced_tokens holds token 1000000"),
        (dict(forced_tokens=torch.full((4, 2), -1)), "forced_tokens holds token -1"),
        (dict(forced_tokens=torch.zeros(4, 2)), "forced_tokens must be token numbers"),
        (dict(forced_tokens=torch.zeros(4, 0, dtype=torch.long)), "at least one step"),
        (dict(forced_tokens=[[1]] * 4), "got list"),
        (dict(method=RatePath(3, [[0.1], [0.2]])), "2 samples, the batch holds 4"),
    ],
)
@pytest.mark.parametrize("engine", ["reference", None])
def test_arguments_of_generate(idle, batch, wrong, word, engine):
    with pytest.raises(InputError, match=word):
        generate(idle, batch, **{"max_new_tokens": 2, "engine": engine, **wrong})


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda batch: None, "input_ids"),
        (lambda batch: {**batch, "input_ids": batch["input_ids"].float()}, "token numbers"),
        (lambda batch: {**batch, "input_ids": batch["input_ids"].clone().index_fill_(1, torch.tensor([-1]), 10**6)}, "1000000"),
        (lambda batch: {key: value[:0] for key, value in batch.items()}, "no prompt"),
        (lambda batch: {**batch, "pixel_values": torch.rand(4, 3, 28, 28)}, r"\[pictures, 3, 84, 84\]"),
        (lambda batch: {**batch, "pixel_values": torch.rand(3, 84, 84)}, r"\[pictures, 3, 84, 84\]"),
        (lambda batch: {**batch, "attention_mask": _without(batch["attention_mask"], 2)}, "all of row 2"),
    ],
    ids=["none", "float", "vocabulary", "empty", "size", "one picture", "mask"],
)
def test_inputs_of_generate(idle, batch, change, word):
    for method in (None, FastV(2, 0.5), VisionZip(4, 2)):
        with pytest.raises(InputError, match=word):
            generate(idle, change(batch), method, 2)


def _without(mask, row):
    return mask.clone().index_fill_(0, torch.tensor([row]), 0)


def test_rates_by_sample_fit_the_sequences_drawn(tiny, alone):
    """Rows are counted with the copies of each prompt."""
    settings = dict(max_new_tokens=2, do_sample=True, seed=0, num_return_sequences=2, eos_token_id=[])
    out = generate(tiny[0], alone(0), RatePath(3, [[0.5], [0.25]]), **settings)
    assert out.trace.kept[:, 0].tolist() == [18, 27]
    with pytest.raises(InputError, match="samples"):
        generate(tiny[0], alone(0), RatePath(3, [[0.5]] * 3), **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_predictor_of_another_precision(tiny, batch, dtype):
    predictor = RatePredictor(4, 10)
    predictor.linear.bias.data[3] = 1.0
    out = generate(tiny[0], batch, DyRate(predictor.to(dtype), 3), 3, eos_token_id=[])
    assert out.trace.kept.unique().tolist() == [36 - 10]
    assert predictor(torch.rand(2, 4, 4)).dtype == torch.float32


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda m, p, b: attention_shares(m, b, torch.ones(4, 2, dtype=torch.long), layers=[]), "at least one"),
        (lambda m, p, b: attention_shares(m, b, torch.ones(4, 5000, dtype=torch.long)), "context of 4096"),
        (lambda m, p, b: attention_shares(m, None, torch.ones(4, 2, dtype=torch.long)), "input_ids"),
        (lambda m, p, b: vtw_search(m, b), r"pass \[inputs\]"),
        (lambda m, p, b: prepare_inputs(p, Image.new("RGB", (9, 9)), [chat_prompt("x")]), r"write \[picture\]"),
        (lambda m, p, b: prepare_inputs(p, "a.png", [chat_prompt("x")]), r"write \[picture\]"),
        (lambda m, p, b: prepare_inputs(p, 5, [chat_prompt("x")]), r"write \[picture\]"),
        (lambda m, p, b: prepare_inputs(p, None, "Hello."), r"write \[prompt\]"),
        (lambda m, p, b: prepare_inputs(None, None, ["Hello."]), "processor"),
        (lambda m, p, b: model_info(None), "NoneType is not supported"),
        (lambda m, p, b: generate(None, b), "NoneType is not supported"),
        (lambda m, p, b: chat_prompt("x", image=-1), "image=-1"),
        (lambda m, p, b: load_vlm("random:tiny", device="bogus"), "device='bogus'"),
        (lambda m, p, b: load_vlm("random:tiny", dtype="f99"), "dtype='f99'"),
        (lambda m, p, b: load_vlm("random:tiny", dtype="int8"), "dtype='int8'"),
    ],
)
def test_other_calls(idle, tiny, batch, call, word):
    with pytest.raises(InputError, match=word):
        call(idle, tiny[1], batch)


@pytest.mark.parametrize("name, near", [("scenes-smal", "scenes-small"), ("llava-1.5-7b", "random:llava"), ("zzz", "scenes")])
def test_a_misspelt_model_is_refused_at_once(name, near, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match=f"did you mean.* {near}"):
        load_vlm(name, device="cpu")


@dataclass
class Item:
    image: object
    prompt: str = "Describe."
    references: object = field(default_factory=lambda: ["a red circle"])


TRAINING = dict(steps=1, batch_size=1, layer=2, target=0.8, max_new_tokens=4, progress=False)


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(convention="bogus"), "convention='bogus'"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(batch_size=1.5), "batch_size=1.5"),
        (dict(layer="2"), "layer='2'"),
        (dict(layer=8), "1..7"),
        (dict(seed="a"), "seed='a'"),
        (dict(n_rates=0), "n_rates=0"),
        (dict(target="0.5"), "target='0.5'"),
        (dict(target=float("nan")), "target=nan"),
        (dict(lam=float("nan")), "lam"),
        (dict(lam=-1.0), "lam"),
        (dict(lr=float("inf")), "lr"),
        (dict(tau=(1.0, float("nan"))), "temperatures"),
        (dict(tau=(0.1, 2.0)), "no higher"),
        (dict(tau=2.0), "temperatures"),
    ],
)
def test_settings_of_training(idle, tiny, pictures, wrong, word):
    with pytest.raises(InputError, match=word):
        train_predictor(idle, tiny[1], [Item(pictures[0])], **{**TRAINING, **wrong})


@pytest.mark.parametrize("references", [[], "a red circle", [3], None])
def test_items_without_references(idle, tiny, pictures, references):
    with pytest.raises(InputError, match="Item 1 has references="):
        train_predictor(idle, tiny[1], [Item(pictures[0]), Item(pictures[1], references=references)], **TRAINING)


def test_a_target_out_of_reach_is_told_with_the_range(tiny, pictures, caplog):
    with caplog.at_level(logging.WARNING, "dyrate_lib.training"):
        train_predictor(*tiny, [Item(pictures[0])], **{**TRAINING, "target": 0.7})
        assert not caplog.records
        out = train_predictor(*tiny, [Item(pictures[0])], **{**TRAINING, "target": 0.1})
    (record,) = caplog.records
    assert "target=0.1 is out of reach" in record.getMessage() and "layer=2" in record.getMessage()
    least = record.args[3]  # what the prompts cost at best, as the bias fitted to the target finds it
    assert 0.3 < least < 0.7 and out.history[0]["hard_ratio"] == pytest.approx(least, abs=1e-6)
