"""Notebook 01's experiment on the tiny model: shares that sum to one, numbers that follow from them, figures that draw."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dyrate_lib import attention_shares, chat_prompt, prepare_inputs
from dyrate_lib.compare import claims
from dyrate_lib.experiments import attention, open_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Notebook 01 at smoke scale on the tiny model, its records computed."""
    made = open_study(
        "01_attention_analysis", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("out")),
        model_small="random:tiny", model_base="random:tiny", progress=False,
    )  # fmt: skip
    attention.compute(made)
    return made


def test_layer_groups():
    assert attention.layer_groups(16) == {"shallow": [0, 1, 2, 3], "deep": [12, 13, 14, 15]}
    assert attention.layer_groups(3) == {"shallow": [0], "deep": [2]}


def test_shares_are_those_of_attention_shares(study):
    model, processor = study.model("small")
    record = attention.shares(study, "small", "late")
    for index, entry in enumerate(record["payload"]["pictures"]):
        item = study.dataset("late")[index]
        reply = study.captions("small", "late")["payload"][index]
        inputs = prepare_inputs(processor, [item.image], [chat_prompt(item.prompt)])
        wanted = attention_shares(model, inputs, torch.tensor([reply["tokens"]])).mean(3)[0]
        groups = attention.layer_groups(8)
        for place, name in enumerate(attention.GROUPS):
            found = np.asarray(entry["shares"])[:, place]
            np.testing.assert_allclose(found, wanted[groups[name]].mean(0).numpy(), atol=1e-4)
            np.testing.assert_allclose(found.sum(-1), 1.0, atol=3e-4)
        assert len(entry["words"]) == reply["steps"]
    layers = np.asarray(record["payload"]["layers"])
    assert layers.shape[0] == 8 and layers.shape[2] == 4


def test_need_letters_are_those_of_the_annotated_reference(study):
    from dyrate_lib.scenes import annotated_reference

    for index, entry in enumerate(attention.need(study, "small", "flickr30k")["payload"]):
        scene = study.dataset("flickr30k")[index].meta["scene"]
        words = annotated_reference(scene, "narrative", index % 5)
        assert entry["need"] == "".join(need[0] for _, need in words) + "n"  # the end token needs neither
        assert len(entry["shares"]) == len(entry["need"])


def test_tables_and_quantities(study):
    table = attention.change_table(study)
    assert len(table) == 6 and set(table["captions"]) == {"short", "narrative", "late"}
    first = np.mean([e["shares"][0][0][1] for e in attention.shares(study, "small", "coco")["payload"]["pictures"]])
    row = table[(table.captions == "short") & (table.layers == "shallow")].iloc[0]
    assert row["image, first step"] == pytest.approx(first)
    assert row["response, first step"] == 0.0  # nothing has been said yet
    measured = attention.quantities(study)
    wanted = {name for name in claims()["C1"].quantities if ".small." in name}
    assert set(measured) == wanted
    assert all(value["lo"] <= value["mean"] <= value["hi"] for value in measured.values())
    assert len(attention.need_table(study)) == 6
    assert "cannot be judged here" in attention.verdict(study)


def test_a_rise_and_a_fall_are_seen_as_such(study, monkeypatch):
    steps = np.linspace(0, 1, 30)
    course = np.stack([0.2 + 0 * steps, 0.6 - 0.3 * steps, 0.2 - 0.1 * steps, 0.4 * steps], axis=-1)
    entry = {"id": "x", "words": ["w"] * 30, "shares": np.stack([course, course], axis=1).tolist()}
    fake = {"payload": {"pictures": [entry] * 250, "layers": []}}
    monkeypatch.setattr(attention, "shares", lambda *_: fake)
    measured = attention.quantities(study)
    assert measured["c1.small.late.deep.img_change"]["hi"] < 0
    assert measured["c1.small.short.deep.res_change"]["lo"] > 0


def test_figures_draw(study):
    for name in ("figure_stack", "figure_example", "figure_need", "figure_layers"):
        shown = study.save_figure(getattr(attention, name)(study), name)
        assert shown.data.startswith(b"\x89PNG") and (study.figures / f"{name}.pdf").is_file()
    assert set(attention.step_table(study)["type"]) == {"sys", "img", "ins", "res"}


def test_records_are_small_plain_and_found_again(study, monkeypatch):
    record = attention.shares(study, "small", "coco")
    assert len(json.dumps(record["payload"])) < 2_000_000
    again = open_study(
        "07_verdict", scale="smoke", records="fresh", out=str(study.out), model_small="random:tiny",
        model_base="random:tiny", progress=False,
    )  # fmt: skip
    monkeypatch.setattr(type(again), "model", lambda *_: pytest.fail("a model was asked for"))
    assert attention.quantities(again) == attention.quantities(study)
