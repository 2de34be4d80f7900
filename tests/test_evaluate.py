"""Predictions over a data set: the same inputs as the processor makes, the same replies as `generate`, plain records."""

from __future__ import annotations

import json

import pytest
import torch

from dyrate_lib import (
    DepthPrune,
    DyRate,
    FastV,
    InputError,
    RatePath,
    RatePredictor,
    chat_prompt,
    generate,
    prepare_inputs,
    prepared,
)
from dyrate_lib.datasets import open_dataset
from dyrate_lib.evaluate import describe, predict, predictor_hash
from dyrate_lib.models import FEATURES, Adapter
from dyrate_lib.prepared import batches, clear_cache, features, pictures
from dyrate_lib.scenes.tokenizer import build_processor


@pytest.fixture(scope="module")
def questions():
    """Six questions, so that prompts differ in length."""
    return open_dataset("scenes:questions:test", 6)


def test_batches_are_what_the_processor_makes(tiny, questions):
    model, processor = tiny
    found = [index for index, _ in batches(model, processor, questions, None, 4)]
    assert found == [[0, 1, 2, 3], [4, 5]]
    for indices, inputs in batches(model, processor, questions, None, 4):
        items = [questions[i] for i in indices]
        wanted = prepare_inputs(processor, [item.image for item in items], [chat_prompt(item.prompt) for item in items])
        assert set(wanted) == set(inputs)
        for name, value in wanted.items():
            torch.testing.assert_close(inputs[name].float(), value.float(), atol=1e-5, rtol=0)


def test_pictures_rendered_on_the_device_equal_the_processors():
    processor, dataset = build_processor(), open_dataset("scenes:short:novel", 3)
    clear_cache()
    found = pictures(processor, dataset, [2, 0])
    wanted = processor.image_processor([dataset[2].image, dataset[0].image], return_tensors="pt")["pixel_values"]
    assert found.shape == (2, 3, 336, 336)
    torch.testing.assert_close(found, wanted.float(), atol=1e-4, rtol=0)


def test_pictures_are_made_once(tiny, questions, monkeypatch):
    clear_cache()
    first = pictures(tiny[1], questions, [0, 1])
    monkeypatch.setattr(prepared, "_process", lambda *_: pytest.fail("made again"))
    assert torch.equal(pictures(tiny[1], questions, [1, 0]), first.flip(0))
    # the same scenes under another prompt are the same pictures
    assert torch.equal(pictures(tiny[1], open_dataset("scenes:late:test", 2), [0, 1]), first)
    clear_cache()


def test_the_tower_runs_once_for_a_batch_under_several_methods(tiny, questions, monkeypatch):
    model, processor = tiny
    clear_cache()
    passes, stock = [], Adapter.picture_features

    def counted(self, inputs, dtype):
        passes.append(inputs["pixel_values"].shape[0])
        return stock(self, inputs, dtype)

    monkeypatch.setattr(Adapter, "picture_features", counted)
    methods = (None, FastV(2, 0.5), FastV(3, 0.25))
    once = [predict(model, processor, questions, m, max_new_tokens=3, batch_size=4, progress=False) for m in methods]
    assert passes == [4, 2]
    monkeypatch.setattr("dyrate_lib.evaluate.features", lambda *_: None)
    assert once == [predict(model, processor, questions, m, max_new_tokens=3, batch_size=4, progress=False) for m in methods]
    assert passes == [4, 2] * 4


def test_kept_features_are_those_of_the_weights_and_the_batch(tiny, questions, monkeypatch):
    model, processor = tiny
    clear_cache()
    (some, inputs), *_ = batches(model, processor, questions, [0, 1, 2], 3)
    first = features(model, processor, questions, some, inputs)
    assert features(model, processor, questions, some, inputs) is first
    assert torch.equal(first, Adapter(model).joined_features(inputs, torch.float32))
    assert features(model, processor, questions, [1, 0, 2], inputs) is not first
    bias = model.model.multi_modal_projector.linear_2.bias
    with torch.no_grad():
        bias.add_(1.0)
    try:
        torch.testing.assert_close(features(model, processor, questions, some, inputs), first + 1, atol=1e-5, rtol=0)
    finally:
        with torch.no_grad():
            bias.sub_(1.0)
    monkeypatch.setattr("dyrate_lib.prepared.FEATURE_BYTES", {"cpu": first.nbytes})
    features(model, processor, questions, some, inputs)
    features(model, processor, questions, [1, 0, 2], inputs)  # room for one batch: the other goes
    again = features(model, processor, questions, some, inputs)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="image tokens"):
        generate(model, {**inputs, FEATURES: first[1:]}, max_new_tokens=1, engine="reference")


def test_a_full_cache_is_no_error(tiny, questions, monkeypatch):
    clear_cache()
    monkeypatch.setattr(prepared, "CACHE_BYTES", {"cpu": 0})
    assert pictures(tiny[1], questions, [0, 1]).shape[0] == 2
    assert not prepared._pictures


@pytest.mark.parametrize("method", [None, FastV(2, 0.5), DepthPrune({3: 0.2, 5: 0.7}), FastV(3, 0.6, refresh=True)])
def test_predict_gives_what_generate_gives(tiny, questions, method):
    model, processor = tiny
    records = predict(model, processor, questions, method, max_new_tokens=4, batch_size=4, progress=False)
    assert [record["id"] for record in records] == [item.id for item in questions]
    assert json.loads(json.dumps(records)) == records
    for index, record in enumerate(records):
        item = questions[index]
        inputs = prepare_inputs(processor, [item.image], [chat_prompt(item.prompt)])
        out = generate(model, inputs, method, 4)
        assert record["tokens"] == out.new_tokens[0, : int(out.lengths[0])].tolist()
        assert record["text"] == out.text[0]
        assert record["kept"] == out.trace.kept[0, : record["steps"]].tolist()
        assert record["prompt_length"] == inputs["input_ids"].shape[1]
        for convention in ("paper", "cached"):
            assert record["flops"][convention] == pytest.approx(out.flops(convention).ratio, abs=1e-6)
            assert record["unpruned"][convention] == pytest.approx(out.flops(convention).unpruned)


def test_a_method_may_differ_by_picture(tiny, questions):
    model, processor = tiny
    rates = [0.0, 0.25, 0.5, 0.75, 0.9, 0.1]
    records = predict(
        model,
        processor,
        questions,
        lambda some: RatePath(3, [[rates[i]] for i in some]),
        max_new_tokens=2,
        batch_size=4,
        progress=False,
    )
    assert [record["kept"][0] for record in records] == [36 - int(rate * 36 + 1e-9) for rate in rates]


def test_beams_are_stock_beams(tiny, questions):
    model, processor = tiny
    records = predict(
        model,
        processor,
        questions,
        None,
        max_new_tokens=5,
        batch_size=4,
        decoding={"num_beams": 2},
        indices=[1, 3],
        progress=False,
    )
    for index, record in zip((1, 3), records, strict=True):
        item = questions[index]
        inputs = prepare_inputs(processor, [item.image], [chat_prompt(item.prompt)])
        wanted = model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=5)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert record["tokens"] == wanted.tolist()[: record["steps"]]
        assert record["flops"]["paper"] == 1.0


def test_beams_under_pruning_count_less(tiny, questions):
    model, processor = tiny
    records = predict(
        model,
        processor,
        questions,
        FastV(2, 0.5),
        max_new_tokens=4,
        decoding={"num_beams": 3},
        indices=[0],
        progress=False,
    )
    greedy = predict(model, processor, questions, FastV(2, 0.5), max_new_tokens=4, indices=[0], progress=False)
    assert records[0]["kept"] == [18.0] * records[0]["steps"]
    assert records[0]["flops"]["paper-prefill"] == greedy[0]["flops"]["paper-prefill"] < 1


def test_sampling_is_fixed_by_its_seed(tiny, questions):
    model, processor = tiny

    def draw(seed):
        decoding = {"do_sample": True, "top_k": 50, "temperature": 2.0, "seed": seed}
        records = predict(
            model, processor, questions, max_new_tokens=6, batch_size=4, decoding=decoding, progress=False
        )
        return [record["tokens"] for record in records]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"decoding": {"beams": 2}}, "unknown decoding"),
        ({"decoding": {"do_sample": True}}, "seed"),
        ({"decoding": {"num_beams": 2, "do_sample": True, "seed": 0}}, "choose"),
        ({"decoding": {"num_beams": 0}}, "at least 1"),
        ({"indices": [6]}, "item 6"),
        ({"indices": []}, "nothing"),
        ({"method": FastV(9, 0.5)}, "out of range"),
    ],
)
def test_bad_arguments_say_what_is_wrong(tiny, questions, arguments, says):
    with pytest.raises(InputError, match=says):
        predict(*tiny, questions, **{"progress": False, "max_new_tokens": 2, **arguments})


def test_descriptions_tell_methods_apart():
    one, other = RatePredictor(4, 10, 3), RatePredictor(4, 10, 3)
    other.linear.bias.data[1] = 1.0
    assert describe(None) == {"method": "none"}
    assert describe(FastV(2, 0.5)) == {"method": "fastv", "layer": 2, "rate": 0.5, "refresh": False}
    assert describe(DepthPrune({3: 0.2, 5: 0.7}))["rates"] == {"3": 0.2, "5": 0.7}
    assert describe(DyRate(one)) == describe(DyRate(RatePredictor(4, 10, 3, {"target": 0.3})))
    assert describe(DyRate(one)) != describe(DyRate(other)) != describe(DyRate(other, rank="step"))
    assert predictor_hash(one) != predictor_hash(RatePredictor(4, 10, 2))
    with pytest.raises(InputError, match="must be a Method"):
        describe("fastv")
