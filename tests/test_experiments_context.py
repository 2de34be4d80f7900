"""The study behind a notebook: parameters checked, records shared and found again, output where it belongs."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from PIL import Image

from dyrate_lib import DyRateError, FastV, InputError, RatePredictor, ResourceError, paths
from dyrate_lib.experiments import SCALES, StageDone, open_study, resolve_scale
from dyrate_lib.experiments.__main__ import MODULES, main
from tests.test_metrics import needs_java

TINY = {"scale": "smoke", "model_small": "random:tiny", "model_base": "random:tiny"}


@pytest.fixture
def study(tmp_path):
    """A fresh study of the tiny model."""
    return open_study("03_benchmarks", records="fresh", out=str(tmp_path), progress=False, **TINY)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scale": "big"}, "choose auto, smoke or full"),
        ({"records": "old"}, "committed or fresh"),
        ({"stage": "half"}, "all, records, records:small or records:base"),
        ({"seed": -1}, "whole number"),
        ({"seed": 1.5}, "whole number"),
        ({"data": "/photos"}, "coco:/folder"),
        ({"model_small": ""}, "names or folders"),
    ],
)
def test_unknown_values_are_refused_at_once(tmp_path, arguments, says):
    with pytest.raises(InputError, match=says):
        open_study("03_benchmarks", **{"out": str(tmp_path), **arguments})
    assert not list(tmp_path.iterdir())


def test_auto_scale_follows_the_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_scale("auto") is SCALES["full"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_scale("auto") is SCALES["smoke"]


def test_a_cell_is_computed_once_and_shared_by_notebooks(study, monkeypatch):
    first = study.captions("small", "coco", FastV(2, 0.5), max_new_tokens=3)
    other = open_study("05_ablations", records="fresh", out=str(study.out), progress=False, **TINY)
    monkeypatch.setattr(type(other), "model", lambda *_: pytest.fail("a model was asked for"))
    assert other.captions("small", "coco", FastV(2, 0.5), max_new_tokens=3)["payload"] == first["payload"]
    assert len(first["payload"]) == study.scale.n_captions
    with pytest.raises(pytest.fail.Exception):
        other.captions("small", "coco", FastV(2, 0.4), max_new_tokens=3)


def test_fresh_studies_read_no_committed_record(tmp_path, monkeypatch):
    monkeypatch.setenv("DYRATE_HOME", str(tmp_path / "home"))
    made = open_study("03_benchmarks", records="fresh", out=str(tmp_path / "a"), progress=False, **TINY)
    record = made.record("thing", {"a": 1}, lambda: 1)
    shutil.copytree(tmp_path / "a" / "records_fresh", paths.results())
    committed = open_study("03_benchmarks", records="committed", out=str(tmp_path / "b"), progress=False, **TINY)
    assert committed.record("thing", {"a": 1}, lambda: 2)["payload"] == record["payload"] == 1
    fresh = open_study("03_benchmarks", records="fresh", out=str(tmp_path / "c"), progress=False, **TINY)
    assert fresh.record("thing", {"a": 1}, lambda: 2)["payload"] == 2


def test_full_committed_without_gpu_never_computes(tmp_path, monkeypatch):
    import dyrate_lib.experiments.context as context

    monkeypatch.setattr(context, "_has_gpu", lambda: False)
    study = open_study("03_benchmarks", out=str(tmp_path))
    assert study.store.frozen and not study.progress
    with pytest.raises(ResourceError, match="records=fresh"):
        study.store.frozen and study.record("none/such", {"a": 1}, lambda: pytest.fail("computed"))
    monkeypatch.setattr(context, "_has_gpu", lambda: True)
    assert not open_study("03_benchmarks", out=str(tmp_path)).store.frozen


def test_weights_enter_the_key(tmp_path, tiny):
    folder = tmp_path / "model"
    tiny[0].save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    sizes = {**TINY, "model_small": str(folder)}
    study = open_study("03_benchmarks", records="fresh", out=str(tmp_path / "out"), progress=False, **sizes)
    assert study.record("thing", {}, lambda: 1, models=["small"])["config"]["models"] == ["model"]
    assert study.info("small").n_layers == 8
    tiny[0].model.language_model.norm.weight.data.add_(1.0)
    try:
        tiny[0].save_pretrained(folder)
    finally:
        tiny[0].model.language_model.norm.weight.data.sub_(1.0)
    again = open_study("03_benchmarks", records="fresh", out=str(tmp_path / "out"), progress=False, **sizes)
    assert again.record("thing", {}, lambda: 2, models=["small"])["payload"] == 2


def test_one_model_twice_is_worked_on_once(study, tmp_path):
    assert study.keys == ("small",)
    assert open_study("03_benchmarks", out=str(tmp_path)).keys == ("small", "base")
    assert open_study("03_benchmarks", out=str(tmp_path)).label("base") == "scenes-base (as 13B)"
    with pytest.raises(InputError, match="no model"):
        study.model_name("large")


def test_predictors_come_from_this_run_or_are_missed(study):
    with pytest.raises(ResourceError, match="run notebook 02"):
        study.predictor("small")
    name = study.predictor_file("small", 0.333, 1)
    assert name == "random-tiny_t0.333_s1.safetensors"
    RatePredictor(4, 10, 3).save(study.out / "predictors" / name)
    assert study.predictor_path("small", 0.333, 1) == study.out / "predictors" / name
    assert study.method("dyrate", "small", seed=1, rank="step").rank == "step"
    assert (study.method("fastv-3").layer, study.method("fastv-2", refresh=True).refresh) == (3, True)
    with pytest.raises(InputError, match="no method"):
        study.method("magic")


def test_roles(study):
    assert study.roles == ("coco", "nocaps", "flickr30k", "late")
    assert study.dataset("nocaps").name == "scenes:short:novel"
    assert len(study.dataset("questions")) == study.scale.n_questions
    with pytest.raises(InputError, match="no data set in the role"):
        study.dataset("imagenet")


def test_a_coco_folder_plays_every_role(tmp_path):
    (tmp_path / "coco" / "images").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (40, 30), (i * 100, 20, 60)).save(tmp_path / "coco" / "images" / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(2)],
        "annotations": [{"image_id": i, "caption": "a plain picture"} for i in range(2)],
    }
    (tmp_path / "coco" / "captions.json").write_text(json.dumps(content))
    study = open_study(
        "03_benchmarks",
        records="fresh",
        out=str(tmp_path / "out"),
        data=f"coco:{tmp_path / 'coco'}",
        progress=False,
        **TINY,
    )
    assert study.roles == ("coco",) and not study.on_scenes
    assert len(study.dataset("nocaps")) == 2  # fewer than the scale asks for
    record = study.captions("small", "coco", max_new_tokens=2)
    assert [entry["id"] for entry in record["payload"]] == ["0", "1"]
    assert str(tmp_path) not in json.dumps(record["config"])


@needs_java
def test_scores_need_java_once(study, monkeypatch):
    import dyrate_lib.metrics as metrics

    record = study.captions("small", "coco", max_new_tokens=3)
    first = study.scores(record, "coco")
    monkeypatch.setattr(metrics, "caption_scores", lambda *_: pytest.fail("scored again"))
    again = open_study("07_verdict", records="fresh", out=str(study.out), progress=False, **TINY).scores(record, "coco")
    assert again.ids == first.ids and again.cider == first.cider
    assert list(again.per_image_cider) == pytest.approx(list(first.per_image_cider), abs=1e-5)


def test_stage_records_stops_the_notebook(tmp_path):
    study = open_study("03_benchmarks", out=str(tmp_path), stage="records", **TINY)
    with pytest.raises(StageDone, match="all records are there") as caught:
        study.end_of_records()
    assert isinstance(caught.value, DyRateError) and len(caught.value._render_traceback_()) == 1
    whole = open_study("03_benchmarks", out=str(tmp_path), **TINY)
    assert whole.end_of_records() is None and whole.keys_asked == whole.keys
    half = open_study("03_benchmarks", out=str(tmp_path), stage="records:small", **TINY)
    assert half.records_only and half.keys_asked == ("small",)


def test_output_folders(tmp_path, monkeypatch):
    study = open_study("03_benchmarks", out=str(tmp_path), **TINY)
    assert (study.figures, study.tables) == (tmp_path / "figures", tmp_path / "tables")
    shown = study.save_table(pd.DataFrame({"a": [1.0]}), "tab1_thing", "A caption.")
    assert "| 1.00 |" in shown.data and (tmp_path / "tables" / "tab1_thing.tex").is_file()
    assert "Left out" in study.save_table(pd.DataFrame(), "tab2_thing").data
    (tmp_path / "figures").mkdir(exist_ok=True)
    (tmp_path / "figures" / "fig1.png").write_text("of an earlier run")
    assert study.save_figure(None, "fig1", otherwise="nothing").data == "nothing"
    study.save_table(pd.DataFrame(), "tab1_thing")
    assert not list(tmp_path.glob("*/fig1.*")) and not list(tmp_path.glob("*/tab1_thing.*"))  # nothing stale stays
    monkeypatch.setenv("DYRATE_HOME", str(tmp_path / "home"))
    project = open_study("03_benchmarks", out=str(paths.root()), **TINY)
    assert project.tables == project.figures == paths.figures()
    assert project.store.root == paths.build() / "records"


def test_figures_come_back_as_the_same_bytes(tmp_path):
    import matplotlib.pyplot as plt

    study = open_study("03_benchmarks", out=str(tmp_path), **TINY)

    def shown():
        fig, ax = plt.subplots()
        ax.plot([0, 1])
        return study.save_figure(fig, "fig1").data

    assert shown() == shown()
    assert not plt.get_fignums()


def test_provenance_hangs_on_the_records_alone(study):
    record = study.record("thing", {"a": 1}, lambda: 1, models=["small"])
    text = study.provenance([record])
    assert text == study.provenance([record])
    assert "float32" in text and record["provenance"]["device"] in text and "1 records" in text
    with pytest.raises(InputError, match="no record"):
        study.provenance([])


def test_command_line(tmp_path, capsys, monkeypatch):
    import dyrate_lib.experiments.attention as attention

    monkeypatch.setattr(attention, "compute", lambda study: [study.record("thing", {}, lambda: study.scale.name)])
    assert main(["1", "--scale", "smoke", "--out", str(tmp_path), "--model-small", "random:tiny"]) == 0
    assert "01_attention_analysis: 1 records" in capsys.readouterr().out
    assert main(["9", "--out", str(tmp_path)]) == 1
    assert "no notebook '9'" in capsys.readouterr().err
    assert main(["01_attention_analysis", "--scale", "huge"]) == 1


def test_every_notebook_with_records_has_its_module():
    import importlib

    for name, module in MODULES.items():
        found = importlib.import_module(f"dyrate_lib.experiments.{module}")
        assert callable(found.compute)
        assert not name[0].isdigit() or callable(found.quantities)  # a part of a notebook may measure nothing


def test_java_starts_once_for_all_replies_that_are_known(tmp_path, monkeypatch):
    from dyrate_lib import metrics

    starts = []
    monkeypatch.setattr(metrics, "_run_tokeniser", lambda lines: starts.append(lines) or [x.lower() for x in lines])
    monkeypatch.setattr(metrics, "_tokenised", metrics.OrderedDict())
    study = open_study("03_benchmarks", out=str(tmp_path), **TINY)
    ids = [item.id for item in study.dataset("coco", 2)]
    records = [{"payload": [{"id": name, "text": f"{word} {name} of its own"} for name in ids]} for word in ("one", "another")]
    for number, record in enumerate(records):
        study._once(["captions", number], lambda record=record: record)
    found = [study.scores(record, "coco") for record in records]
    assert len(starts) == 1 and "another" in " ".join(starts[0])
    for record, score in zip(records, found, strict=True):
        said = {entry["id"]: entry["text"] for entry in record["payload"]}
        assert score.per_image_cider.shape == (2,)
        assert score.bleu4 == metrics.caption_scores(said, study.dataset("coco", 2).references()).bleu4
