"""Notebook 06's experiment on the tiny model: masks as the trace has them, growth and spread as defined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dyrate_lib import InputError, RatePredictor, chat_prompt, generate, prepare_inputs
from dyrate_lib.compare import claims
from dyrate_lib.experiments import open_study, visualization


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Notebook 06 at smoke scale on the tiny model, with a predictor whose rates move."""
    made = open_study(
        "06_visualization", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("out")),
        model_small="random:tiny", model_base="random:tiny", progress=False,
    )  # fmt: skip
    predictor = RatePredictor(4, 10, 3)
    predictor.linear.weight.data.normal_(0, 30, generator=torch.Generator().manual_seed(0))
    predictor.save(made.out / "predictors" / made.predictor_file("small", visualization.TARGET, 0))
    visualization.compute(made)
    return made


def test_masks_are_those_of_the_trace(study):
    model, processor = study.model("small")
    method = study.method("dyrate", "small", target=visualization.TARGET)
    entries = visualization.shown(study, "small")["payload"]
    assert len(entries) == study.scale.n_visual
    for entry in entries:
        item = study.dataset(entry["role"], 200)[entry["index"]]
        assert item.id == entry["id"]
        inputs = prepare_inputs(processor, [item.image], [chat_prompt(item.prompt)])
        out = generate(model, inputs, method, study.scale.max_new_tokens)
        assert entry["text"] == out.text[0] and len(entry["words"]) == len(entry["kept"])
        for step in range(len(entry["kept"])):
            assert visualization.kept_at(entry, step) == out.trace.kept_at(0, step).tolist()


def test_the_chosen_scenes_are_of_their_kind(study):
    for kind, role, index in visualization.chosen(study):
        wanted_role, fits = visualization.KINDS[kind]
        assert role == wanted_role and fits(study.dataset(role, 200)[index].meta["scene"])


def test_growth_and_spread(study, monkeypatch):
    courses = {"a": [576, 288, 0], "b": [576, 576, 576]}
    payload = [{"id": name, "kept": kept, "n_image": 576} for name, kept in courses.items()]
    monkeypatch.setattr(visualization, "captions", lambda *_: {"payload": payload})
    values = visualization._per_picture(study, "small", "coco")
    assert values["growth"].tolist() == [1.0, 0.0] and values["middle"].tolist() == [0.5, 0.0]
    assert values["rank"].tolist() == [pytest.approx(1.0), 0.0]
    measured = visualization.quantities(study)
    assert measured["c9.small.growth"]["mean"] == pytest.approx(0.5)
    assert measured["c9.small.sd_between_pictures"]["mean"] == pytest.approx(np.std([0.5, 0], ddof=1))
    assert measured["c9.small.narrative_minus_late_growth"]["mean"] == 0.0
    assert set(measured) == {name for name in claims()["C9"].quantities if ".small." in name}


def test_seeds_are_averaged_picture_by_picture(study, monkeypatch):
    import dataclasses

    three = dataclasses.replace(study, scale=dataclasses.replace(study.scale, predictor_seeds=(0, 1, 2)))
    kept = {0: 0, 1: 576, 2: 288}
    monkeypatch.setattr(
        visualization,
        "captions",
        lambda s, k, r, seed: {"payload": [{"id": "a", "kept": [576, kept[seed]], "n_image": 576}]},
    )
    assert visualization._per_picture(three, "small", "coco")["growth"].tolist() == [pytest.approx(0.5)]


def test_tables_and_figures(study):
    table = visualization.growth_table(study)
    assert table["captions"].tolist() == ["short", "narrative", "late"]
    assert (table["removed, last step"] >= table["removed, first step"]).all()
    assert visualization.objects_table(study)["pictures"].sum() == study.scale.n_captions
    # 36 tokens are no grid of 14-pixel patches of 336 pixels, but they are one of 56-pixel patches
    for long in (False, True):
        assert study.save_figure(visualization.figure_masks(study, "small", long), f"masks{long}").data
    assert visualization.figure_masks(study, "base") is None
    assert study.save_figure(visualization.figure_rates(study), "rates", visualization.rates_data(study)).data
    assert "cannot be judged here" in visualization.verdict(study)


def test_a_picture_of_ones_own(study, tmp_path):
    assert visualization.figure_own(study, "") is None
    Image.new("RGBA", (50, 90), (200, 30, 60, 128)).save(tmp_path / "own.png")
    assert visualization.figure_own(study, str(tmp_path / "own.png"), "Describe $5 of it.") is not None
    (tmp_path / "no.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="not an image"):
        visualization.figure_own(study, str(tmp_path / "no.png"))
    with pytest.raises(InputError, match="does not exist"):
        visualization.figure_own(study, str(tmp_path / "none.png"))
