"""Table II and the questions: rows, equal cost, relative changes, and the quantities that the claims read."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dyrate_lib import InputError, RatePredictor
from dyrate_lib.compare import claims
from dyrate_lib.experiments import Study, benchmark_claims, benchmark_tables, benchmarks, open_study
from dyrate_lib.experiments.benchmarks import Row
from dyrate_lib.experiments.training_runs import LAYER, N_RATES


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fresh study of the tiny model with untrained but unequal predictors; replies of six tokens."""
    made = open_study(
        "03_benchmarks", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("study")), model_small="random:tiny",
        model_base="random:tiny", progress=False,
    )  # fmt: skip
    made.scale = dataclasses.replace(
        made.scale, n_captions=2, n_questions=12, n_refresh=1, max_new_tokens=6, bootstrap=50, predictor_seeds=(0, 1)
    )
    for target in made.scale.targets:
        for seed in made.scale.predictor_seeds:
            predictor = RatePredictor(4, N_RATES, LAYER)
            with torch.no_grad():
                predictor.linear.weight.copy_(
                    torch.randn(N_RATES, 16, generator=torch.Generator().manual_seed(seed)) * 4
                )
            predictor.save(made.out / "predictors" / made.predictor_file("small", target, seed))
    return made


@pytest.fixture
def scored(study, scores_without_java):
    vars(study).pop("_remembered", None)
    yield study
    vars(study).pop("_remembered", None)


def record_of(ratios, steps=3):
    return {
        "payload": [{"id": str(i), "steps": steps, "flops": {"paper": r, "cached": r}} for i, r in enumerate(ratios)]
    }


def test_rows_of_the_first_set_and_of_the_others(study):
    first = [row.key for row in benchmarks.table_rows(study, "small", "coco")]
    assert first[:4] == ["original", "fastv-3", "fastv-2", "vtw"]
    assert {"random", "dyrate", "dyrate-0.5", "dyrate-0.2", "random-matched", "fixed"} <= set(first)
    other = [row.key for row in benchmarks.table_rows(study, "small", "late")]
    assert "dyrate" in other and not {"random-matched", "fixed", "dyrate-0.5"} & set(other)  # smoke: extras on one set
    assert len(benchmarks.row_by_key(benchmarks.table_rows(study, "small", "late"), "dyrate").cells) == 2
    with pytest.raises(InputError, match="no row 'best'"):
        benchmarks.row_by_key(benchmarks.table_rows(study, "small", "coco"), "best")


def test_rows_are_read_once(study, monkeypatch):
    rows = benchmarks.table_rows(study, "small", "coco")
    monkeypatch.setattr(Study, "captions", lambda *_, **__: pytest.fail("read again"))
    assert benchmarks.table_rows(study, "small", "coco") is rows


def test_random_removal_costs_what_dyrate_does(study):
    rows = benchmarks.table_rows(study, "small", "coco")
    dyrate, matched = (
        benchmark_tables.per_picture(benchmarks.row_by_key(rows, key), "flops", "paper").mean()
        for key in ("dyrate", "random-matched")
    )
    assert matched == pytest.approx(dyrate, abs=0.01)  # the claim asks for one point


def test_fastv_and_vtw_do_what_their_labels_say(study):
    rows, n_layers = benchmarks.table_rows(study, "small", "coco"), study.info("small").n_layers
    for key, kept in (("original", 36), ("fastv-2", 18), ("fastv-3", 18), ("vtw", 0), ("random", 18)):
        (cell,) = benchmarks.row_by_key(rows, key).cells
        assert {k for row in cell["payload"] for k in row["kept"]} == {kept}, key
        assert cell["config"]["method"].get("layer") in (None, 2, 3, n_layers // 2)


def test_vtw_layer_is_the_first_below_the_threshold(study, monkeypatch):
    found = {"5": 0.01, "6": 0.002, "7": 0.5}
    monkeypatch.setattr(benchmarks, "vtw_search", lambda *_: {"payload": {"divergence": found}})
    assert benchmarks.vtw_layer(study, "small") == 6
    found["6"] = 0.0031
    assert benchmarks.vtw_layer(study, "small") is None


def test_relative_change_by_hand(study):
    b = np.array([100.0, 200.0, 300.0])
    found = benchmark_tables.relative(study, 0.9 * b, b)
    assert (
        found["mean"] == pytest.approx(-0.1)
        and found["lo"] == pytest.approx(-0.1)
        and found["hi"] == pytest.approx(-0.1)
    )
    assert benchmark_claims._negated(found)["mean"] == pytest.approx(0.1)
    uneven = benchmark_tables.relative(study, np.array([1.0, 5.0, 9.0, 2.0]), np.array([2.0, 4.0, 6.0, 8.0]))
    negated = benchmark_claims._negated(uneven)
    assert negated["lo"] <= negated["mean"] <= negated["hi"] and negated["lo"] == -uneven["hi"]
    assert np.isnan(benchmark_tables.relative(study, b, np.zeros(3))["mean"])


def test_seeds_are_averaged_for_each_picture():
    row = Row("dyrate", "DyRate", "dyrate", (record_of([0.2, 0.4]), record_of([0.4, 0.8])))
    assert benchmark_tables.per_picture(row, "flops", "paper") == pytest.approx([0.3, 0.6])
    assert benchmark_tables.per_picture(row, "steps") == pytest.approx([3, 3])


def test_tables(scored):
    table = benchmark_tables.all_captions(scored)
    assert set(table["set"]) == {"coco", "nocaps", "flickr30k", "late"}
    unpruned = table[table.method == "Original"]
    assert (unpruned["FLOPs % (paper)"] == 100).all() and (unpruned["minus original [95%]"] == "").all()
    assert (table[table.method == "DyRate (target 0.333)"].seeds == 2).all()
    paper = benchmark_tables.paper_table(scored)
    assert paper.iloc[0]["coco paper"] == 110.43 and paper.iloc[0]["coco ours, change %"] == 0
    assert len(benchmark_tables.seed_table(scored)) == 2 * 4
    assert benchmark_tables.search_table(scored).iloc[0].layers == 8
    assert len(benchmark_tables.refresh_table(scored)) == 1
    assert benchmark_tables.paper_table_1().set_index("model").loc["DyRate(ours)", "gqa"] == 61.9
    fig = benchmark_tables.tradeoff_figure(scored)
    assert len(fig.axes) == 4
    plt.close(fig)
    assert benchmark_claims.findings(scored).count("against unpruned") == 4


def test_quantities_have_the_names_that_the_claims_read(scored):
    known = {name for key in ("C2", "C3", "C10") for name in claims()[key].quantities}
    found = benchmarks.quantities(scored)
    read = {name for name in known if ".base" not in name and ".base." not in name}
    extra = {"c2.small.late"}
    assert read - set(found) == set() and not any(name.startswith(tuple(extra)) for name in found)
    assert set(found) <= known
    gap = found["c3.small.coco.dyrate_minus_original"]
    assert gap["lo"] <= gap["mean"] <= gap["hi"] and gap["n"] == 2


def test_answers_are_points_by_kind(study, monkeypatch):
    data = study.dataset("questions")
    right = [{"id": item.id, "text": item.references[0], "steps": 1, "flops": {"paper": 1.0}} for item in data]
    wrong = [{**row, "text": "nothing of the kind"} for row in right]
    row = Row("x", "x", "original", ({"payload": right}, {"payload": [*right[:2], *wrong[2:]]}))
    points, kinds = benchmark_tables.answers(study, row)
    assert points.tolist() == [100] * 2 + [50] * (len(data) - 2) and kinds == [item.meta["kind"] for item in data]


def test_a_folder_of_photographs_has_one_set_and_no_questions(study):
    photographs = dataclasses.replace(study, data="coco:/nowhere")
    assert photographs.roles == ("coco",) and not photographs.on_scenes
