"""Notebook 05's experiment on the tiny model: budgets met by fixed and depth-based rates, cells that differ, tables."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dyrate_lib import DepthPrune, RatePath, RatePredictor
from dyrate_lib.accounting import flops
from dyrate_lib.compare import claims
from dyrate_lib.experiments import ablations, budgets, open_study
from tests.test_metrics import needs_java


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Notebook 05 at a scale below smoke on the tiny model, with a predictor whose rates move."""
    made = open_study(
        "05_ablations", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("out")),
        model_small="random:tiny", model_base="random:tiny", progress=False,
    )  # fmt: skip
    made.scale = dataclasses.replace(made.scale, max_new_tokens=6, ablation_steps=1, n_ablation=2)
    predictor = RatePredictor(4, 20, 2)
    predictor.linear.weight.data.normal_(0, 30, generator=torch.Generator().manual_seed(0))
    predictor.save(made.out / "predictors" / made.predictor_file("small", ablations.TARGET, 0))
    ablations.compute(made)
    return made


def test_costs_are_those_of_the_accounting(study):
    info, shapes = study.info("small"), [(80, 36, 5), (90, 36, 3)]
    kept = np.array([36, 36, 20, 20, 9, 9, 0, 0])
    wanted = np.mean([flops(info, t, n, np.tile(kept, (steps, 1)), "paper").ratio for t, n, steps in shapes])
    assert budgets.constant_ratio(info, shapes, lambda n: kept) == pytest.approx(wanted)


@pytest.mark.parametrize("ratio", [0.7, 0.8, 0.95])
def test_rates_meet_their_budget(study, ratio):
    info, shapes = study.info("small"), [(80, 36, 20), (82, 36, 12)]
    fixed = budgets.fixed_for(info, shapes, ratio)
    count = 36 - int(fixed.rates[0] * 36 + 1e-9)
    costs = [budgets.constant_ratio(info, shapes, lambda n, c=c: np.where(np.arange(8) < 3, n, c)) for c in range(37)]
    assert isinstance(fixed, RatePath) and fixed.layer == 3
    assert abs(costs[count] - ratio) == pytest.approx(np.min(np.abs(np.array(costs) - ratio)))


def test_depth_rates_rise_to_one():
    rates = budgets.depth_rates(16, 0.2)
    assert rates[3] == 0.2 and rates[15] == 1.0 and 2 not in rates
    assert np.allclose(np.diff([rates[layer] for layer in range(3, 16)]), 0.8 / 12, atol=1e-5)
    DepthPrune(budgets.depth_rates(16, 1.0))  # all at once is allowed


def test_out_of_reach_gives_the_nearest(study):
    info, shapes = study.info("small"), [(80, 36, 20)]
    assert budgets.fixed_for(info, shapes, 0.0).rates == (1.0,)
    assert budgets.fixed_for(info, shapes, 1.0).rates == (0.0,)
    assert budgets.depth_for(info, shapes, 0.0).rates[3] == 1.0
    assert budgets.depth_for(info, shapes, 1.0).rates[3] < 0.01  # a thousandth of 36 tokens rounds to none


def test_matched_rows_cost_what_dyrate_does(study):
    role = ablations.main_role(study)
    learned = np.mean([ablations.flops_ratio(record) for record in ablations.pruned(study, role, "dyrate")])
    (fixed,) = ablations.pruned(study, role, "fixed, matched")
    step = 1 / 36  # one token more or less, of 36
    assert ablations.flops_ratio(fixed) == pytest.approx(learned, abs=step)
    assert fixed["config"]["method"]["layer"] == 2


def test_variants_are_what_they_say(study):
    described = {name: ablations.variant(study, "nocaps", name)["config"]["method"] for name in ablations.VARIANTS}
    assert described["P = 4"]["layer"] == 4 and described["reversible"]["reversible"]
    assert described["ranked anew at each step"]["rank"] == "step"
    base = described[next(iter(ablations.VARIANTS))]
    assert described["reversible"]["predictor"] == base["predictor"] != described["5 rates"]["predictor"]


def test_strategies(study):
    assert ablations.decodings(study, "greedy") == [None]
    assert ablations.decodings(study, "beam-5") == [{"num_beams": 5}]
    full = dataclasses.replace(study, scale=dataclasses.replace(study.scale, sampling_seeds=(0, 1, 2)))
    assert [d["seed"] for d in ablations.decodings(full, "top-p")] == [0, 1, 2]
    assert ablations.decodings(full, "top-k")[0]["top_k"] == 6


@needs_java
def test_tables_figures_and_quantities(study):
    table = ablations.decoding_table(study)
    assert table["paper, CIDEr (LLaVA-1.5-7B, Nocaps)"].tolist()[:4] == [106.74, 109.06, 108.28, 109.57]
    assert table["unpruned, minus greedy"][0] == "0.00 [0.00, 0.00]"
    pruning = ablations.pruning_table(study)
    assert pruning["strategy"].tolist() == list(ablations.PRUNING_LABELS.values())
    assert pruning["FLOPs %"][0] == 100.0 and pruning["paper, FLOPs %"][2] == 28.8
    assert len(ablations.variant_table(study)) == len(ablations.VARIANTS)
    measured = ablations.quantities(study)
    assert set(measured) == {*claims()["C7"].quantities, *claims()["C8"].quantities}
    assert measured["c7.best_minus_worst"]["mean"] >= max(0, measured["c7.beam2_minus_greedy"]["mean"])
    for name in ("figure_decoding", "figure_pruning"):
        assert study.save_figure(getattr(ablations, name)(study), name).data
    assert ablations.verdicts(study).count("cannot be judged here") == 2


def test_settings_tell_the_rates(study):
    lines = ablations.settings(study).splitlines()
    assert len(lines) == 5 and lines[0].startswith("FP: R = ") and "P_4th" in lines[1]


def test_the_reading_of_dp_costs_about_what_the_paper_prints():
    """With P_4th = 0 the linear reading costs near 58.1 % on LLaVA-1.5-7B for ordinary text lengths."""
    assert "64 text tokens" in budgets.depth_on_llava()
    low, middle, high = (float(part.split(" %")[0].split(" ")[-1]) for part in budgets.depth_on_llava().split(",")[:3])
    assert low < 58.1 < high and middle == pytest.approx(58.1, abs=1.0)
