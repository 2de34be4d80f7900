"""Table I on scenes: rows, scores, tables and quantities from made-up replies, and the records that `compute` makes."""

from __future__ import annotations

import dataclasses
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dyrate_lib import InputError, RatePredictor
from dyrate_lib.compare import claims
from dyrate_lib.experiments import (
    open_study,
    short_answer_figure,
    short_answer_scores,
    short_answer_tables,
    short_answers,
)
from dyrate_lib.experiments.benchmarks import Row
from dyrate_lib.experiments.roles import TABLE1
from dyrate_lib.experiments.training_runs import LAYER, N_RATES
from dyrate_lib.task_metrics import paired, score_task

N = 12


def opened(folder, **more):
    return open_study("short_answers", scale="smoke", records="fresh", out=str(folder), progress=False, **more)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fresh study of the tiny model with untrained predictors of two seeds."""
    made = opened(tmp_path_factory.mktemp("study"), model_small="random:tiny", model_base="random:tiny")
    made.scale = dataclasses.replace(made.scale, n_tasks=1, bootstrap=20, equal_level=0.75, predictor_seeds=(0, 1))
    for seed in made.scale.predictor_seeds:
        predictor = RatePredictor(4, N_RATES, LAYER)
        with torch.no_grad():
            predictor.linear.weight.copy_(torch.randn(N_RATES, 16, generator=torch.Generator().manual_seed(seed)) * 4)
        predictor.save(made.out / "predictors" / made.predictor_file("small", 0.333, seed))
    return made


def reply(item, name, key, right):
    """The true answer with probability `right`, else something else; the same draw for every method."""
    if random.Random(f"{item.id}/{key}").random() < right:
        return item.meta["answer"]
    return {"yes": "no", "no": "yes"}.get(item.meta["answer"], f"not that, {name}")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A full-scale study of both models whose replies are made up: `original` is right in 0.9, `dyrate` in 0.9, 0.7 and 0.5."""
    made = opened(tmp_path_factory.mktemp("told"))
    made.scale = dataclasses.replace(made.scale, name="full", n_tasks=N, bootstrap=200, predictor_seeds=(0, 1, 2))
    rights = {"original": (0.9,), "dyrate": (0.9, 0.7, 0.5), "vtw": (0.0,)}

    def rows(study, key, role):
        items = list(study.dataset(role))
        out = []
        for name, (label, style, _) in short_answers.methods(study, key, role).items():
            if name != "equal:vtw":  # one that does not reach the budget
                cells = tuple(
                    {
                        "payload": [
                            {
                                "id": item.id,
                                "text": reply(item, name, key, right),
                                "flops": {"paper": 0.3, "cached": 0.5},
                            }
                            for item in items
                        ]
                    }
                    for right in rights.get(name, (0.8,))
                )
                out.append(Row(name, label, style, cells))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short_answers, "_rows", rows)
        for key in made.keys:
            for role in short_answers.roles(made):
                short_answers.rows(made, key, role)  # remembered from now on
    return made


def test_rows_of_a_task_and_of_the_other_protocol(tmp_path):
    made = opened(tmp_path)
    made.scale = dataclasses.replace(made.scale, name="full", predictor_seeds=(0, 1, 2))
    keys = list(short_answers.methods(made, "small", "pope"))
    assert keys[:6] == ["original", "fastv-3", "fastv-2", "vtw", "dyrate", "constant"]
    assert len(keys) == 6 + 12 and all(key.startswith("equal:") for key in keys[6:])
    assert list(short_answers.methods(made, "small", "textvqa-ocr")) == ["original", "fastv-2", "dyrate"]
    per_model = (1 + 1 + 1 + 1 + 4 + 4 + 2) * 20 + 5  # prompts a picture times cells of a task; three predictors
    assert short_answers.prompts(made) == 2 * made.scale.n_tasks * per_model
    photographs = dataclasses.replace(made, data="coco:/nowhere")
    assert short_answers.tasks(photographs) == () and short_answers.roles(photographs) == ()
    assert short_answer_tables.table1(photographs).empty and short_answer_figure.retained_figure(photographs) is None


def test_compute_makes_every_record_that_the_tables_read(study, monkeypatch):
    made = short_answers.compute(study)
    assert all(len(record["payload"]) in (1, 2, 4) for record in made)
    names = {record["config"]["data"]["name"] for record in made}
    assert names == {f"scenes:{task}:test" for task in (*TABLE1, "textvqa-ocr")}
    assert {record["config"]["max_new_tokens"] for record in made} == {4}
    monkeypatch.setattr("dyrate_lib.experiments.cells.predict", lambda *_, **__: pytest.fail("computed later"))
    table = short_answer_scores.cells(study)
    assert set(table.task) == set(TABLE1) and set(table.model) == {"random:tiny"}
    dyrate = table[table.key == "dyrate"]
    assert (dyrate.seeds == 2).all()
    constant = table[table.key == "constant"].set_index("task")["FLOPs % (paper)"]
    assert (constant - dyrate.set_index("task")["FLOPs % (paper)"]).abs().max() < 1.5  # of 36 tokens one is a point
    spent = table[table.key.str.startswith("equal:")]["FLOPs % (paper)"]
    assert len(spent) and (spent - 75).abs().max() < 2
    assert "random:tiny, GQA: " in short_answer_scores.findings(study)
    assert len(short_answer_scores.protocols(study)) == 3
    fig = short_answer_figure.retained_figure(study)
    plt.close(fig)


def test_scores_of_seeds_are_averaged_by_picture(told):
    row = next(row for row in short_answers.rows(told, "small", "gqa") if row.key == "dyrate")
    items = list(told.dataset("gqa"))
    each = [score_task("gqa", {r["id"]: r["text"] for r in cell["payload"]}, items) for cell in row.cells]
    found = short_answer_scores.scores(told, row, "gqa")
    assert found.score == pytest.approx(np.mean([one.score for one in each]))
    assert found.sums == pytest.approx(np.mean([one.sums for one in each], axis=0))
    assert found.parts["query"] == pytest.approx(np.mean([one.parts["query"] for one in each]))


@pytest.mark.parametrize("task", ["gqa", "pope", "mme"])
def test_intervals_are_those_of_the_metrics(told, task):
    original, dyrate = (
        short_answer_scores.scores(told, next(r for r in short_answers.rows(told, "small", task) if r.key == key), task)
        for key in ("original", "dyrate")
    )
    _, lo, hi = short_answer_scores.interval_of(short_answer_scores.drawn(told, original))
    assert (lo, hi) == pytest.approx(original.interval(200, told.seed))
    gap = short_answer_scores.difference(told, dyrate, original)
    unit = 1 / (2 * len({item.meta["category"] for item in told.dataset("mme")})) if task == "mme" else 1
    assert [gap[k] for k in ("mean", "lo", "hi")] == pytest.approx(
        [unit * x for x in paired(dyrate, original, 200, told.seed)]
    )
    assert gap["n"] == N
    other = dataclasses.replace(original, ids=("x", *original.ids[1:]))
    with pytest.raises(InputError, match="not paired"):
        short_answer_scores.difference(told, dyrate, other)


def test_cells_tests_and_holm(told):
    table = short_answer_scores.cells(told)
    assert len(table) == 2 * 7 * 17 and set(table.model) == {told.label("small"), told.label("base")}
    base = table[table.key == "original"]
    assert base["p"].isna().all() and (base["retained %"] == 100).all()
    tested = table[table.key != "original"]
    assert (tested["p Holm"] >= tested["p"]).all() and (tested.change >= tested["change lo"]).all()
    ruined = tested[(tested.key == "vtw") & (tested.task == "gqa")]
    assert (ruined["p"] < 0.01).all() and (ruined["retained %"] == 0).all()
    assert (tested[tested.key == "fastv-2"].score == tested[tested.key == "fastv-3"].score.to_numpy()).all()
    said = short_answer_scores.comparisons(told)
    assert said.startswith(f"{len(tested)} differences") and f"{(tested['p Holm'] < 0.05).sum()} are left" in said
    lines = short_answer_scores.findings(told).splitlines()
    assert len(lines) == 14 and all("not told apart from unpruned: " in line for line in lines)
    assert short_answer_scores.mean_retained(told, "small", "original") == (100, 100, 100)
    assert np.isnan(short_answer_scores.mean_retained(told, "small", "equal:vtw")).all()


def test_tables(told):
    table = short_answer_tables.table1(told)
    assert (
        list(table.columns[2:9]) == ["GQA", "VizWiz", "SQA", "TextVQA", "POPE", "MMB", "MME"] and len(table) == 2 * 17
    )
    ruined = table[table.method == "VTW (half depth)"].iloc[0]
    stars = short_answer_scores.cells(told).query("key == 'vtw'")["p Holm"].iloc[0] < 0.05
    assert ruined.GQA == "0.0 [0.0, 0.0]" + ("*" if stars else "")
    assert (table.n == N).all() and (table[table.method.str.startswith("DyRate")].seeds == 3).all()
    assert len(short_answer_tables.change_table(told)) == 2 * 16
    assert short_answer_tables.cost_table(told).GQA.iloc[0] == "30.0 / 50.0"
    pope = short_answer_tables.pope_table(told)
    assert list(pope.setting[:4]) == ["all", "random", "popular", "adversarial"]
    assert pope.F1[0] == pytest.approx(pope.F1[1:4].mean())
    assert "vanilla accuracy" in short_answer_tables.detail_table(told, "mmbench")
    assert {"color acc", "color acc+"} <= set(short_answer_tables.detail_table(told, "mme"))
    fig = short_answer_figure.retained_figure(told)
    assert len(fig.axes) == 8 and fig.axes[7].get_title() == "mean of the seven"
    plt.close(fig)


def test_the_papers_rows_stand_beside_ours(told):
    table = short_answer_tables.beside_paper(told)
    assert list(table.columns[2:]) == [name for _, name in TABLE1.values()]
    quoted = table[table.source == "quoted"]
    assert {"InstructBLIP", "TokenPacker", "M3"} <= set(quoted.system) and "DyRate(ours)" not in set(quoted.system)
    at = table.index[table.system == "DyRate(ours)"][0]
    assert table.GQA[at] == 61.9 and table.MME[at] == 1516.6
    assert list(table.source[at + 1 : at + 3]) == [f"ours, {told.label(key)}" for key in ("small", "base")]
    changes = short_answer_tables.changes_beside_paper(told).set_index("system")
    assert changes.loc["DyRate(ours)", "GQA"] == pytest.approx(-0.1)
    assert changes.loc["DyRate(ours)", "MME"] == pytest.approx(100 * (1516.6 - 1510.7) / 2000)
    assert np.isnan(changes.loc["VisionZip", "MME"])


def test_quantities_are_those_that_c10_reads(told):
    found = short_answers.quantities(told)
    asked = {name for name in claims(beyond=True)["C10"].quantities if name.endswith("dyrate_minus_original")}
    assert set(found) == asked and all(value["n"] == N for value in found.values())
    rows = {row.key: row for row in short_answers.rows(told, "base", "mme")}
    points = {key: short_answer_scores.scores(told, rows[key], "mme").score for key in ("dyrate", "original")}
    categories = len({item.meta["category"] for item in told.dataset("mme")})
    assert found["c10.base.mme.dyrate_minus_original"]["mean"] == pytest.approx(
        (points["dyrate"] - points["original"]) / (2 * categories)
    )


def test_a_rival_out_of_reach_has_no_row_and_is_told(study):
    low = dataclasses.replace(study, scale=dataclasses.replace(study.scale, equal_level=0.4))
    vars(low).pop("_remembered", None)
    keys = {row.key for row in short_answers.rows(low, "small", "gqa")}
    missed = short_answer_tables.unreached_table(low)
    assert "equal:fastv" not in keys and set(missed.task) == {"GQA"}
    fastv = missed[missed.method == "FastV (P=2) at 40 %"].iloc[0]
    assert fastv["from %"] > 40 and fastv["to %"] == pytest.approx(100)
