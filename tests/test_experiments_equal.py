"""Every method at one budget: rows, curves, tables, kept positions, and what pruning itself costs, on the tiny model."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dyrate_lib import InputError, RatePredictor, generate
from dyrate_lib.evaluate import batches
from dyrate_lib.experiments import (
    benchmarks,
    efficiency,
    equal_budget,
    equal_tables,
    open_study,
    pruning_cost,
)
from dyrate_lib.experiments.kept_positions import KEPT, RENUMBER, with_positions
from dyrate_lib.experiments.training_runs import LAYER, N_RATES
from dyrate_lib.methods import DivPrune, FastV, PyramidDrop
from dyrate_lib.models import Adapter


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fresh smoke study of the tiny model with untrained predictors; replies of four tokens."""
    made = open_study(
        "03_benchmarks", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("study")), model_small="random:tiny",
        model_base="random:tiny", progress=False,
    )  # fmt: skip
    made.scale = dataclasses.replace(
        made.scale, n_captions=2, n_questions=4, n_pareto=1, max_new_tokens=4, bootstrap=20, equal_level=0.75,
        pareto_levels=(0.6, 0.75),  # with 36 image tokens among 82, eight layers and P = 2 little lower can be had
    )  # fmt: skip
    for target in made.scale.targets:
        predictor = RatePredictor(4, N_RATES, LAYER)
        with torch.no_grad():
            predictor.linear.weight.copy_(torch.randn(N_RATES, 16, generator=torch.Generator().manual_seed(1)) * 4)
        predictor.save(made.out / "predictors" / made.predictor_file("small", target, 0))
    return made


@pytest.fixture
def scored(study, scores_without_java):
    return study


def test_every_method_costs_what_was_asked(study):
    rows = equal_budget.equal_rows(study, "small", "coco")
    assert [row.key for row in rows] == ["original", *(rival.key for rival in equal_budget.RIVALS), "dyrate"]
    for row in rows[1:-1]:
        spent = np.mean([entry["flops"]["paper"] for entry in row.cells[0]["payload"]])
        near = 0.04 if row.key == "vtw" else 0.015  # VTW takes whole layers, others whole tokens
        assert spent == pytest.approx(0.75, abs=near), row.key
    asked = equal_budget.equal_rows(study, "small", "questions")
    assert {row.key for row in asked} == {"original", "dyrate", *equal_budget.SMOKE}


def test_curves_share_cells_and_skip_what_is_out_of_reach(study):
    points = equal_budget.curve(study, "small", "coco")
    assert all(len(cell["payload"]) == 1 for point in points for cell in point.row.cells)
    shared = next(p for p in points if (p.key, p.level) == ("fastv", 0.75))
    whole = benchmarks.row_by_key(equal_budget.equal_rows(study, "small", "coco"), "fastv").cells[0]
    assert shared.row.cells[0]["payload"] == whole["payload"][:1]
    missed = {name for name, _, role, found in equal_budget.unreached(study) if role == "coco" and found.wanted == 0.6}
    assert "fastv" in missed and "visionzip" not in missed  # two of eight layers see all
    assert not any((p.key, p.level) == ("fastv", 0.6) for p in points)
    assert {p.level for p in points if p.key == "dyrate"} == {0.5, 0.333, 0.2}


def test_tables_and_figure(scored):
    table = equal_tables.equal_captions(scored).set_index("method")
    assert table.loc["Original", "FLOPs % (paper)"] == 100 and table.loc["Original", "tokens a layer"] == 36
    assert "x" in table.loc["SparseVLM", "image tokens by layer"] and table.loc["Random (P=2)", "minus random [95%]"] == ""
    assert np.isnan(table.loc["DyRate (trained for 0.333)", "tokens a layer"])
    assert len(equal_tables.equal_summary(scored)) == len(table)
    assert set(equal_tables.equal_questions(scored)["n"]) == {2}
    curves = equal_tables.curve_table(scored)
    assert (curves.lo <= curves.quality).all() and (curves.quality <= curves.hi).all()
    missed = equal_tables.unreached_table(scored).set_index("method")
    assert missed.loc["FastV (P=2)", "asked for, %"] == "60" and missed.loc["FastV (P=2)", "from %"] > 60
    fig = equal_tables.curve_figure(scored)
    assert len(fig.axes) == 1 and len(fig.legends[0].get_texts()) == len(equal_budget.RIVALS) + 2
    plt.close(fig)
    said = equal_tables.equal_findings(scored).splitlines()
    assert len(said) == 2 and all("above random: " in line and "not below unpruned: " in line for line in said)
    assert equal_tables.released_table(scored).empty and equal_tables.position_table(scored).empty  # smoke scale


def test_released_settings_and_kept_positions_at_full_scale(scored, monkeypatch):
    fitting = tuple(row for row in equal_budget.RELEASED if row[0] != "visionzip-released")  # 64 of 36 tokens
    monkeypatch.setattr(equal_budget, "RELEASED", fitting)
    study = dataclasses.replace(scored, scale=dataclasses.replace(scored.scale, name="full", predictor_seeds=(0,)))
    study.method = scored.method  # the fresh folder's predictors
    table = equal_tables.released_table(study).set_index("method")
    assert table.loc["CDPruner", "image tokens read"] == 4 and table.loc["Original", "image tokens read"] == 36
    assert {"PruMerge (adaptive)", "PruMerge+ (adaptive)"} <= set(table.index)
    both = equal_tables.position_table(study)
    assert len(both) == len(RENUMBER) and {"SparseVLM", "VisionZip", "CDPruner"} <= set(both.method)
    fig = equal_tables.curve_figure(study)
    plt.close(fig)


def test_kept_positions_are_those_of_the_unpruned_prompt(study):
    model, processor = study.model("small")
    ((_, inputs),) = batches(model, processor, study.dataset("coco"), [0, 1], 2)
    adapter = Adapter(model)
    whole, divprune = adapter.embed(inputs), KEPT["divprune"]
    short, renumbered = divprune(0.25).embed(adapter, inputs), DivPrune(0.25).embed(adapter, inputs)
    for row in range(2):
        image = whole.position_ids[row, whole.image_index[row]]
        picked = short.picked[row].sort().values
        assert torch.equal(short.position_ids[row, short.image_index[row]], image[picked])
        assert torch.equal(short.position_ids[row, -5:], whole.position_ids[row, -5:])
    assert torch.equal(short.embeds, renumbered.embeds)
    kept = generate(model, inputs, divprune(1.0), max_new_tokens=4).new_tokens
    assert torch.equal(kept, generate(model, inputs, None, max_new_tokens=4).new_tokens)
    assert not with_positions("pyramiddrop", PyramidDrop()).renumber
    assert with_positions("divprune", DivPrune(0.3)) == divprune(0.3)


def test_merged_rows_stand_at_the_ends_of_the_picture(study):
    model, processor = study.model("small")
    ((_, inputs),) = batches(model, processor, study.dataset("coco"), [0, 1], 2)
    adapter = Adapter(model)
    whole, short = adapter.embed(inputs), KEPT["visionzip"](dominant=5, contextual=2).embed(adapter, inputs)
    for row in range(2):
        image = whole.position_ids[row, whole.image_index[row]]
        found = short.position_ids[row, short.image_index[row]]
        assert found[0] == image[0] and (found[5:] == image[-1]).all()
        assert torch.equal(found[1:5], image[short.picked[row][:4].sort().values])
    two = {key: torch.cat((value, value)) for key, value in inputs.items()}
    assert KEPT["prumerge"](0.25).embed(adapter, two).position_ids.shape[0] == 4
    text_only = {"input_ids": inputs["input_ids"][:, -4:], "attention_mask": inputs["attention_mask"][:, -4:]}
    with pytest.raises(InputError, match="one picture each"):
        KEPT["divprune"](0.5).embed(adapter, text_only)


def test_cost_of_pruning_itself(study):
    record = pruning_cost.cost(study)
    found = record["payload"]["methods"]
    assert set(found) == {*(rival.key for rival in equal_budget.RIVALS), "dyrate"}
    assert found["random"]["prompt_flops"] == found["vtw"]["prompt_flops"] == 0
    # one query row on every key: 2 d a head and key
    info = study.info("small")
    prompt = efficiency.TEXT_TOKENS + info.n_image_tokens
    assert found["fastv"]["prompt_flops"] >= 2 * info.hidden * prompt
    assert found["dyrate"]["step_flops"] > 0 and found["fastv"]["step_flops"] == 0 and found["st3"]["step_ms"][0] > 0
    assert found["divprune"]["prompt_flops"] >= 2 * info.n_image_tokens**2 * info.hidden
    assert all(value > 0 for entry in found.values() for value in entry["prompt_ms"])
    table = pruning_cost.cost_table(study)
    assert len(table) == len(found) and "repeats" in pruning_cost.cost_words(study)


def test_measuring_leaves_the_method_alone(study):
    model, processor = study.model("small")
    method = FastV()
    inputs = pruning_cost.latency_inputs(model, processor, 1)
    assert len(pruning_cost.metered_run(model, inputs, method, 2)) == 3
    assert vars(method) == vars(FastV())


def test_compute_makes_every_record_that_the_tables_read(study, monkeypatch):
    benchmarks.compute(study)
    monkeypatch.setattr("dyrate_lib.experiments.cells.predict", lambda *_, **__: pytest.fail("computed later"))
    vars(study).pop("_remembered", None)
    equal_budget.equal_rows(study, "small", "coco")
    equal_budget.curve(study, "small", "coco")


def test_the_page_on_released_code_names_every_method():
    table = equal_tables.released_code()
    wanted = {"FastV", "VTW", "SparseVLM", "VisionZip", "PruMerge", "PruMerge+", "DivPrune", "CDPruner", "PyramidDrop", "ST3"}
    assert wanted <= set(table.method) and not table.isna().any().any()
    rows = equal_tables.paper_rows()
    assert "SparseVLM" in set(rows.model) and len(rows) == 7
