"""Predictor training as the notebook runs it: data, records, the toy's gradient, masks against discarding, equal cost."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dyrate_lib import RatePath, RatePredictor, accounting
from dyrate_lib.compare import claims
from dyrate_lib.experiments import budgets, gradient_check, open_study, pipeline_figure, training_runs, training_tables


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fresh study of the tiny model at a scale of two steps and two pictures, its predictors trained and saved."""
    made = open_study(
        "02_training", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("study")), model_small="random:tiny",
        model_base="random:tiny", progress=False,
    )  # fmt: skip
    made.scale = dataclasses.replace(
        made.scale, train_steps=2, train_batch=1, n_captions=2, n_validation=3, max_new_tokens=6, bootstrap=50
    )
    training_runs.save_predictors(made, training_runs.trained_cells(made))
    return made


def test_mixture_takes_families_in_turn():
    data = training_runs.mixture("val", 2)
    assert len(data) == 6
    assert [item.meta["family"] for item in data] == ["short", "narrative", "late"] * 2
    assert data[0].id == data[2].id != data[3].id  # the same picture, asked three ways
    assert training_runs.mixture("val", 2).identity == data.identity != training_runs.mixture("train", 2).identity


def test_what_is_trained(tmp_path):
    options = {"records": "fresh", "out": str(tmp_path), "progress": False}
    smoke = open_study("02_training", scale="smoke", **options)
    assert training_runs.wanted(smoke) == [("small", 0.333, 0)]
    full = open_study("02_training", scale="full", **options)
    assert len(training_runs.wanted(full)) == 2 * 3 * 3
    assert {cell[0] for cell in training_runs.wanted(full, ["base"])} == {"base"}


def test_trained_predictors_are_found_again(study):
    cells = training_runs.trained_cells(study)
    assert len(cells) == 3 and all(len(training_tables.history(record)) == 2 for record in cells.values())
    for cell, record in cells.items():
        found = study.predictor(*cell)
        assert torch.equal(found.linear.weight, training_runs.as_predictor(record).linear.weight)
        assert found.metadata["target"] == cell[1] and found.layer == training_runs.LAYER
    weights = [training_runs.as_predictor(record).linear.weight for record in cells.values()]
    assert weights[0].abs().max() > 0  # it moved away from its start


def test_a_smoke_proof_is_not_taken_for_a_shipped_predictor(study, tmp_path):
    shipped = open_study("02_training", scale="smoke", records="fresh", out=str(tmp_path), progress=False)
    record = next(iter(training_runs.trained_cells(study).values()))
    assert training_runs.save_predictors(shipped, {("small", 0.333, 0): record}) == []
    assert not (tmp_path / "predictors").exists()


def held(info, kept, layer):
    """`kept` image tokens from `layer` on."""
    return lambda n: np.where(np.arange(info.n_layers) < layer, n, min(kept, n))


def test_constant_ratio_is_the_accounting(study):
    info, shapes = study.info("small"), [(80, 36, 5), (70, 36, 3), (80, 36, 5)]
    for kept in (0, 7, 36):
        ratios = []
        for length, n_image, steps in shapes:
            table = np.full((steps, info.n_layers), n_image)
            table[:, 3:] = kept
            ratios.append(accounting.flops(info, length, n_image, table, "paper").ratio)
        assert budgets.constant_ratio(info, shapes, held(info, kept, 3)) == pytest.approx(np.mean(ratios), rel=1e-12)


@pytest.mark.parametrize("kept", [0, 5, 20, 36])
def test_kept_for_ratio_finds_the_count(study, kept):
    info, rows = study.info("small"), [{"prompt_length": 90, "n_image": 36, "steps": s, "flops": {}} for s in (3, 6)]
    for row in rows:
        shape = [(90, 36, row["steps"])]
        row["flops"] = {"paper": budgets.constant_ratio(info, shape, held(info, kept, training_runs.LAYER))}
    assert training_runs.kept_for_ratio(study, "small", [{"payload": rows}]) == kept


def test_fixed_cell_costs_what_dyrate_does(study):
    dyrate = training_runs.dyrate_cells(study, "small")
    fixed = training_runs.fixed_cell(study, "small")
    ratio = [np.mean([training_tables.ratios(cell).mean() for cell in cells]) for cells in (dyrate, [fixed])]
    assert ratio[1] == pytest.approx(ratio[0], abs=0.02)
    assert all(len(set(row["kept"])) == 1 for row in fixed["payload"])


def test_masked_equals_discarded_and_the_test_can_fail(study, monkeypatch):
    payload = training_runs.masked_against_discarded(study)["payload"]
    assert len(payload["differences"]) == study.scale.n_masked
    assert 0 <= max(payload["differences"]) < 1e-4 < payload["largest_logit"]

    def other(layer, rates):  # discards everything instead of following the path
        return RatePath(layer, [[1.0 for _ in row] for row in rates])

    monkeypatch.setattr(training_runs, "RatePath", other)
    monkeypatch.setattr(study, "seed", study.seed + 1)  # another record
    assert max(training_runs.masked_against_discarded(study)["payload"]["differences"]) > 1e-3


def test_expected_loss_is_the_mean_of_draws():
    logits = torch.tensor([[0.3, -0.2, 0.5, 0.0], [1.0, 0.0, -1.0, 0.2], [0.0, 0.1, 0.2, 0.3]]).double()
    generator = torch.Generator().manual_seed(0)
    rates = torch.stack([torch.multinomial(row.softmax(-1), 40000, True, generator=generator) for row in logits], 1)
    kept = 8 - 2 * rates.cummax(1).values  # eight tokens, four rates
    keep = (torch.arange(8) < kept[..., None]).double()
    assert float(gradient_check.toy_loss(keep).mean()) == pytest.approx(
        float(gradient_check.expected_loss(logits)), rel=0.01
    )


def test_gradients_of_the_toy_agree():
    found = gradient_check.gradient_demonstration(samples=4000, seed=0)
    assert found["exact_minus_differences"] < 1e-8
    assert found["flops_term"]["value_difference"] < 1e-12 and found["flops_term"]["gradient_difference"] < 1e-12
    assert found["flops_term"]["gradient_norm"] > 0.01
    first = found["cases"][0]
    assert first["sharpening"] == 2.0 and first["cosine"] > 0.9
    assert np.abs(first["gradient"]).max() > 1e-4  # it is not zero, as a hard choice's would be


def test_budget_quantities_take_the_worst_seed(study):
    def cell(ratio):
        return {"payload": [{"flops": {"paper": ratio}} for _ in range(4)]}

    cells = {("small", 0.5, 0): cell(0.51), ("small", 0.5, 1): cell(0.46), ("small", 0.2, 0): cell(0.2)}
    found = training_tables.budget_quantities(study, cells)
    assert found["c5.small.t0.5.abs_error_max"] == {"mean": pytest.approx(0.04), "n": 4}
    assert found["c5.small.t0.2.abs_error_max"]["mean"] == pytest.approx(0)


def test_objective_drop():
    record = {"payload": {"history": [{"loss": loss} for loss in np.linspace(3, 1, 20)]}}
    losses = np.linspace(3, 1, 20)
    assert training_tables.objective_drop(record) == pytest.approx(losses[:2].mean() - losses[-2:].mean())


def test_tables_and_figures_from_records(study):
    trained, schedules = training_runs.trained_cells(study), training_runs.schedules(study)
    assert set(schedules) == {("small", t, 0) for t in (0.5, 0.333, 0.2)}
    table = training_tables.budget_table(study, schedules)
    assert list(table.asked) == [0.5, 0.333, 0.2] and table.error.notna().all()
    data = training_tables.schedule_data(schedules)
    assert set(data.family) == set(training_runs.MIXTURE) and data["mean"].between(0, 1).all()
    for fig in (
        training_tables.learning_figure(study, trained), training_tables.schedule_figure(study, schedules),
        training_tables.gradient_figure(training_runs.demonstration(study)), pipeline_figure.draw_pipeline(),
    ):  # fmt: skip
        assert fig.axes
        plt.close(fig)
    assert "of 3 predictors" in training_tables.objective_line(trained)


@pytest.mark.slow
def test_quantities_have_the_names_that_the_claims_read(study):
    known = {name for key in ("C5", "F3") for name in claims()[key].quantities}
    found = training_runs.quantities(study)
    assert set(found) <= known
    assert {"f3.masked_minus_discarded", "f3.small.objective_drop", "f3.small.dyrate_minus_fixed"} <= set(found)


def test_predictor_of_a_record_has_its_settings(study):
    record = training_runs.train(study, "small", 0.5, 0)
    predictor = training_runs.as_predictor(record)
    assert isinstance(predictor, RatePredictor) and predictor.n_rates == training_runs.N_RATES
    assert {"target", "seed", "lr", "lam", "tau"} <= set(predictor.metadata)
