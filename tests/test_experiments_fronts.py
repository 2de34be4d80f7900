"""Quality against FLOPs: reach and targets of predictors, points and their standing, and cells shared among processes."""

from __future__ import annotations

import dataclasses
import threading

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dyrate_lib import InputError, RatePredictor, ResourceError
from dyrate_lib.experiments import caption_cells, front_predictors, front_tables, fronts, open_study, sharing
from dyrate_lib.experiments.benchmarks import Row
from dyrate_lib.experiments.equal_budget import Point
from dyrate_lib.experiments.sharing import Job, work_off
from dyrate_lib.experiments.training_runs import LAYER, N_RATES
from dyrate_lib.pareto import OFF, ON
from dyrate_lib.store import Store


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fresh smoke study of the tiny model with untrained predictors; replies of four tokens."""
    made = open_study(
        "fronts", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("study")), model_small="random:tiny",
        model_base="random:tiny", progress=False,
    )  # fmt: skip
    made.scale = dataclasses.replace(
        made.scale, n_captions=2, n_front=2, n_questions=4, n_pareto=1, n_refresh=1, max_new_tokens=4, bootstrap=20,
        equal_level=0.75, front_levels=(0.3, 0.75, 0.9), front_targets=(0.2, 0.333, 0.5),
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


def test_reach_and_targets(study):
    lowest, highest = front_predictors.reach(study, "small", "coco")
    # two of eight layers read all of 36 tokens, the others one of them: more than a quarter, less than all
    assert 0.25 < lowest < 0.75 and highest == 1
    low = dataclasses.replace(
        study, scale=dataclasses.replace(study.scale, front_targets=(0.1, 0.333, 0.95), targets=(0.333,))
    )
    assert front_predictors.targets(low, "small") == (0.333, 0.95)  # Table II's anyway, 0.1 out of reach
    more = dataclasses.replace(low, scale=dataclasses.replace(low.scale, predictor_seeds=(0, 1, 2)))
    assert front_predictors.wanted(more) == [("small", 0.333, seed) for seed in (0, 1, 2)] + [("small", 0.95, 0)]


def test_a_predictor_is_trained_once_and_a_shipped_one_is_not(study, monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(
        front_predictors.training_runs, "train", lambda _, *cell: trained.append(cell) or {"made": cell}
    )
    monkeypatch.setattr(front_predictors.training_runs, "save_predictors", lambda *_: [])
    assert front_predictors.ensure(study, "small", 0.333, 0) == [] and not trained
    assert front_predictors.ensure(study, "small", 0.8, 0) == [{"made": ("small", 0.8, 0)}]
    shipped = open_study("fronts", scale="smoke", records="fresh", out=str(tmp_path), progress=False)
    assert front_predictors.ensure(shipped, "small", 0.333, 0) == []
    with pytest.raises(ResourceError, match="no predictor scenes-small_t0.8_s0"):
        front_predictors.ensure(shipped, "small", 0.8, 0)


def test_compute_makes_what_the_tables_read(scored, monkeypatch):
    fronts.compute(scored)
    front_predictors.budget_table(scored)
    monkeypatch.setattr("dyrate_lib.experiments.cells.predict", lambda *_, **__: pytest.fail("computed later"))
    table = front_tables.front_table(scored)
    assert set(table.set) == {"coco"} and set(table.key) == {
        "original",
        "random",
        "fastv",
        "sparsevlm",
        "visionzip",
        "merge",
        "dyrate",
    }
    near = table[~table.key.isin(["original", "dyrate"])]
    assert (near["off by %"].abs() < 3).all()
    assert not ((near.key == "fastv") & (near["asked %"] == 30)).any()  # out of reach
    missed = front_tables.unreached_table(scored).set_index("method")
    assert missed.loc["FastV (P=2)", "asked for, %"] == "30" and missed.loc["DyRate", "from %"] > 25
    for convention in front_tables.CONVENTIONS:
        plt.close(front_tables.front_figure(scored, convention))
    with pytest.raises(InputError, match="no convention"):
        front_tables.front_figure(scored, "guessed")
    assert len(front_tables.summary_table(scored)) == 2
    assert front_tables.front_findings(scored).count("DyRate's points: ") == 2
    budgets = front_predictors.budget_table(scored)
    assert set(budgets["asked %"]) == {20, 33.3, 50} and "out of reach" in budgets["met to 2 %"].iloc[0]


def made_up(study, monkeypatch, found):
    """Points from (key, level, FLOPs paper, cached, quality): the same quality for each of eight pictures but for noise."""
    noise = np.random.default_rng(0).normal(size=8)
    scores, points = {}, []
    for key, level, paper, cached, value in found:
        flops = {"paper": paper, "cached": cached}
        row = Row(key, key, key, ({"config": {"method": f"{key}{level}"}, "payload": [{"flops": flops}] * 8},))
        scores[id(row)] = value + noise
        points.append(Point(key, level, row))
    monkeypatch.setattr(front_tables, "points", lambda *_: points)
    monkeypatch.setattr(front_tables, "cider", lambda _, row, __: scores[id(row)])
    monkeypatch.setattr(front_tables, "roles", lambda _: ("coco",))
    return dataclasses.replace(study)


def test_standing_differs_by_convention(study, monkeypatch):
    here = made_up(
        study, monkeypatch,
        [("original", 1.0, 1.0, 1.0, 90), ("random", 0.2, 0.2, 0.3, 10), ("dyrate", 0.2, 0.2, 0.7, 50),
         ("fastv", 0.5, 0.5, 0.6, 60)],
    )  # fmt: skip
    paper = front_tables.standings(here, "small", "coco", "paper")
    assert paper == {"Original": ON, "Random at 20 %": OFF, "DyRate at 20 %": ON, "FastV at 50 %": ON}
    cached = front_tables.standings(here, "small", "coco", "cached")
    assert cached["Random at 20 %"] == ON and cached["DyRate at 20 %"] == OFF


def test_area_is_between_neighbours_and_extrapolates_nothing(study, monkeypatch):
    here = made_up(
        study, monkeypatch,
        [("original", 1.0, 1.0, 1.0, 90), ("random", 0.2, 0.2, 0.2, 0), ("random", 0.6, 0.6, 0.6, 40),
         ("dyrate", 0.2, 0.3, 0.3, 30),
         ("dyrate", 0.5, 0.5, 0.5, 50), ("fastv", 0.4, 0.4, 0.4, 80), ("vtw", 0.3, 0.3, 0.3, 1), ("vtw", 0.3, 0.3, 0.3, 1)],
    )  # fmt: skip
    table = front_tables.area_table(here).set_index("method")
    assert list(table.index) == ["Random (P=2)", "DyRate"] and set(table["budgets %"]) == {"30.0 to 50.0"}
    assert table.loc["DyRate", "minus random [95%]"] == "20.0 [20.0, 20.0]"  # 40 on average against 20


# ----------------------------------------------------------------------------------------------------------- sharing


class Bare:
    """What `work_off` needs of a study."""

    def __init__(self, folder, frozen=False):
        self.store = Store(folder, frozen=frozen)


def test_processes_that_start_together_take_different_groups(tmp_path):
    done: dict[str, list[int]] = {}
    started = threading.Barrier(2, timeout=20)
    first: dict[int, str] = {}

    def worker(number):
        def run(name):
            if number not in first:
                first[number] = name
                started.wait()  # both are inside a job at once: nobody waits for the other's group
            if name not in done:
                done[name] = [number]
            return [{"name": name}]

        groups = [[Job(f"{g}{j}", lambda name=f"{g}{j}": run(name)) for j in range(3)] for g in "abcd"]
        found[number] = work_off(Bare(tmp_path), groups)

    found: dict[int, list] = {}
    threads = [threading.Thread(target=worker, args=(number,)) for number in (0, 1)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    names = [f"{g}{j}" for g in "abcd" for j in range(3)]
    assert sorted(first.values()) == ["a0", "b0"]
    assert all([record["name"] for record in found[number]] == names for number in (0, 1))
    assert not list((tmp_path / sharing.FOLDER).glob("*.lock"))


def test_a_frozen_store_is_only_read(tmp_path):
    assert work_off(Bare(tmp_path / "none", frozen=True), [[Job("a", lambda: [{"x": 1}])]]) == [{"x": 1}]
    assert not (tmp_path / "none").exists()


def test_errors_of_a_job_are_raised(tmp_path):
    def broken():
        raise ResourceError("no room")

    with pytest.raises(ResourceError, match="no room"):
        work_off(Bare(tmp_path), [[Job("a", broken)]])


def test_a_record_that_two_tables_name_counts_once():
    a, b = ({"config": {"n": n}, "inputs": [], "payload": [1, 2]} for n in (1, 2))
    assert sharing.distinct([a, b, {**a, "payload": [1]}]) == [a, b]


def test_captions_shared_out_are_those_of_the_tables(study, monkeypatch):
    from dyrate_lib.experiments import benchmarks, equal_budget

    made = caption_cells.compute(study)
    monkeypatch.setattr("dyrate_lib.experiments.cells.predict", lambda *_, **__: pytest.fail("computed later"))
    vars(study).pop("_remembered", None)
    rows = [row for role in study.roles for row in benchmarks.table_rows(study, "small", role)]
    rows += benchmarks.question_rows(study, "small") + equal_budget.equal_rows(study, "small", "coco")
    rows += equal_budget.equal_rows(study, "small", "questions")
    kept = [repr(record["config"]) for record in made]
    assert len(set(kept)) > 30 and {repr(cell["config"]) for row in rows for cell in row.cells} <= set(kept)
