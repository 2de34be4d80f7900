"""The controls' experiments: planted differences found, costs set and corrected, work shared out, conclusions judged."""

from __future__ import annotations

import dataclasses
import threading
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib import RatePath
from dyrate_lib.accounting import flops
from dyrate_lib.compare import claims
from dyrate_lib.errors import InputError
from dyrate_lib.evaluate import batches, predict
from dyrate_lib.experiments import (
    better,
    constraints,
    controls,
    controls_figures,
    controls_needs,
    controls_numbers,
    controls_tables,
    controls_training,
    equal_cost,
    generality,
    open_study,
    training_runs,
)
from dyrate_lib.experiments.controls_training import Recipe
from dyrate_lib.experiments.pieces import Piece, in_order, share
from dyrate_lib.methods import DyRate, MergeRate
from dyrate_lib.scenes.captions import annotated_reference, split_words
from tests.made_controls import SLOPE, made_up

GAINS = {"shares": 40.0, "foreign": 5.0, "step": 20.0, "oracle": 90.0, "hidden": 45.0, "reversible": 60.0, "reranked": 80.0,
         "relook": 60.0, "merge": 150.0, "merge in part": 20.0, "lagrangian": 42.0}  # fmt: skip
COSTS = {"shares": 0.34, "foreign": 0.32, "hidden": 0.325, "reversible": 0.38, "reranked": 0.37, "relook": 0.25,
         "merge": 0.25, "merge in part": 0.25, "lagrangian": 0.335}  # fmt: skip


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    """A made-up study in which attention truly helps: the shares gain 40 over a constant, the oracle 90."""
    return made_up(
        str(tmp_path_factory.mktemp("made")), GAINS, COSTS, n=30, spread=5.0, control_models=("small",), control_seeds=(0, 1),
        control_roles=("coco", "late"), conditions=("5 rates", "other scenes"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ equal cost


def test_course_cost_is_the_accounting(helped):
    info = helped.info("small")
    shapes = [(620, 576, 5), (610, 576, 3)]
    courses = [[0.5, 0.25, 0.75], [0.3]]  # what is dropped stays dropped; the last rate holds on
    ratios = []
    for (length, n_image, steps), course in zip(shapes, courses, strict=True):
        kept = np.full((steps, info.n_layers), n_image)
        running = n_image
        for t in range(steps):
            running = min(running, n_image - int(course[min(t, len(course) - 1)] * n_image + 1e-9))
            kept[t, 2:] = running
        ratios.append(flops(info, length, n_image, kept, "paper").ratio)
    assert equal_cost.course_cost(info, shapes, courses, 2) == pytest.approx(np.mean(ratios), rel=1e-9)


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=9), min_size=1, max_size=4), st.floats(0.2, 0.95))
def test_matched_courses_cost_what_is_asked(twentieths, wanted):
    rates = [[k / 20 for k in course] for course in twentieths]
    info = SimpleNamespace(n_layers=16, hidden=192, mlp=512)
    shapes = [(620, 576, 4 + i) for i in range(len(rates))]
    found = equal_cost.matched(info, shapes, rates, 2, wanted)
    cost = equal_cost.course_cost(info, shapes, found, 2)
    ends = [equal_cost.course_cost(info, shapes, [equal_cost.scaled(r, x) for r in rates], 2) for x in (0.0, 1e9)]
    assert cost == pytest.approx(min(max(wanted, min(ends)), max(ends)), abs=0.003)
    assert all(0 <= rate <= 1 for course in found for rate in course)


def test_the_slope_correction_recovers_a_planted_difference():
    """Scores rise by 5 a point of FLOPs and by 7 by the method; what was measured 3 points apart is 7 apart at equal cost."""
    pictures = np.linspace(0, 100, 11)

    def score(cost, gain):
        return pictures + 500 * cost * (1 + pictures / 100) + gain

    costs, table = [0.28, 0.40, 0.333], [score(c, 0.0) for c in (0.28, 0.40, 0.333)]
    mine, other = score(0.35, 7.0), score(0.32, 0.0)
    raw = (mine - other).mean()
    equal = equal_cost.at_cost(mine, 0.35, 0.333, costs, table) - equal_cost.at_cost(other, 0.32, 0.333, costs, table)
    assert raw == pytest.approx(7 + 0.03 * 750)
    assert np.allclose(equal, 7.0)
    assert equal_cost.slope(costs, table, 0.333) == pytest.approx(7.5)
    beyond = equal_cost.at_cost(score(0.45, 0.0), 0.45, 0.28, costs, table)  # by the slope at the end
    assert np.allclose(beyond, score(0.28, 0.0))
    assert np.array_equal(equal_cost.at_cost(mine, 0.35, 0.3, [0.3, 0.3], [mine, mine]), mine)  # no slope known


# -------------------------------------------------------------------------------------------------- planted effects


def test_attention_that_helps_is_found(helped):
    found = controls_numbers.attention_quantities(helped)
    for role in ("coco", "late"):
        for kind, planted in (("none", 40), ("step", 20), ("foreign", 35)):
            value = found[f"c11.small.{role}.shares_minus_{kind}"]
            assert value["lo"] > 0 and value["mean"] == pytest.approx(planted, abs=5), (role, kind)
        assert found[f"c11.small.{role}.share_of_gap"]["mean"] == pytest.approx(40 / 90, abs=0.06)
        assert found[f"c11.small.{role}.oracle_minus_none"]["mean"] == pytest.approx(90, abs=5)
        # planned controls are set to the shares' cost; "foreign" was planted 2 points below it
        assert found[f"c11.small.{role}.flops_gap_max"]["mean"] == pytest.approx(0.02, abs=1e-6)
    told = controls_tables.answer_line(helped)  # of 30 pictures nothing is concluded
    assert "attention shares against Nothing (constant): better 0, worse 0, open 2 of 2" in told


def test_what_costs_less_is_not_blamed_for_it(helped):
    shares, foreign = (controls_numbers.fed(helped, "small", "late", kind) for kind in ("shares", "foreign"))
    assert shares.raw.mean() - foreign.raw.mean() == pytest.approx(35 + 0.02 * SLOPE, abs=4)
    assert shares.equal.mean() - foreign.equal.mean() == pytest.approx(35, abs=4)


def test_attention_that_does_not_help_is_not_found(tmp_path):
    study = made_up(
        str(tmp_path), {**GAINS, "shares": 0.0, "oracle": -5.0}, COSTS, n=20, spread=5.0, control_models=("small",),
        control_seeds=(0,), control_roles=("late",), conditions=(),
    )  # fmt: skip
    found = controls_numbers.attention_quantities(study)
    assert found["c11.small.late.shares_minus_step"]["hi"] < 0
    assert abs(found["c11.small.late.shares_minus_none"]["mean"]) < 6
    assert found["c11.small.late.share_of_gap"] == {"mean": 0.0, "lo": 0.0, "hi": 0.0, "n": 20}  # the oracle gains nothing


def test_rates_that_follow_the_need_are_found(helped):
    found = controls_numbers.need_quantities(helped)
    assert found["c12.small.late.rate_need"]["hi"] < -0.5 and found["c12.small.late.rate_need_given_step"]["hi"] < -0.5
    blind = controls_needs.following(helped, "small", "late", "step")
    assert blind["rate_step"]["lo"] > 0.9 and abs(blind["rate_need_given_step"]["mean"]) < 0.2
    none = controls_needs.following(helped, "small", "late", "none")
    assert none["rate_need"] == {"mean": 0.0, "lo": 0.0, "hi": 0.0, "n": 30}
    assert "rate_need" not in controls_needs.following(helped, "small", "late", "foreign")


def test_finality_and_our_own_method(helped):
    found = {**controls_numbers.finality_quantities(helped), **better.quantities(helped)}
    final = 800 - SLOPE * 0.66 + 40
    planted = (final - (final + 20)) / (final + 20)
    assert found["c13.small.late.final_against_reversible"]["mean"] == pytest.approx(planted, abs=0.01)
    assert found["c13.small.late.flops_gap_max"]["mean"] == pytest.approx(0.04)
    assert found["c15.small.late.better_minus_original"]["mean"] == pytest.approx(150 - 0.75 * SLOPE, abs=4)
    whole = better.scores(helped, "small", "late", "original").mean()
    assert found["c15.small.late.better_gain"]["mean"] == pytest.approx((150 - 0.75 * SLOPE) / whole, abs=0.01)
    assert found["c15.small.nocaps.flops_ratio"]["mean"] == pytest.approx(0.25)
    told = better.table(helped).set_index("method")["within 2 % of unpruned"]
    assert set(told["MergeRate (ours), one rate"]) == {"worse by more than 2 %"}


def test_quantities_are_those_that_the_claims_ask_for(helped):
    found = controls.quantities(helped)
    known = {name for claim in ("C11", "C12", "C13", "C14", "C15") for name in claims(beyond=True)[claim].quantities}
    assert set(found) == {name for name in known if ".small." in name and "flickr30k" not in name}
    for name, value in found.items():
        assert value["n"] >= 1 and np.isfinite(value["mean"]), name
        assert "lo" not in value or value["lo"] <= value["mean"] <= value["hi"], name


def test_quantities_have_what_their_checks_need_and_too_few_pictures_judge_nothing(helped):
    """Those without an interval too: the gaps of FLOPs are read by their estimate, and from enough pictures alone."""
    found = controls.quantities(helped)
    checks = [check for claim in claims(beyond=True).values() for check in claim.checks if check.quantity in found]
    assert {"flops_gap_max", "flops_ratio"} == {c.quantity.rsplit(".", 1)[1] for c in checks if "lo" not in found[c.quantity]}
    for check in checks:
        value = found[check.quantity]
        assert check.outcome({check.quantity: value})[0] is None and value["n"] == 30  # of 500 needed
        assert check.outcome({check.quantity: {**value, "n": 499}})[0] is None
        assert check.outcome({check.quantity: {**value, "n": 500}})[0] in (True, False)
        assert check.outcome({check.quantity: value["mean"]})[0] is None  # a bare number


def test_a_cost_that_is_not_known_does_not_pass_for_equal(helped, monkeypatch):
    costs = {"shares": 0.34, "step": 0.34, "none": float("nan"), "foreign": 0.34, "oracle": 0.34}
    monkeypatch.setattr(controls_numbers, "fed", lambda study, key, role, kind: SimpleNamespace(cost=costs[kind]))
    gap = controls_numbers.cost_gap(helped, "small", "late", ("step", "none", "foreign", "oracle"))
    check = next(c for c in claims(beyond=True)["C11"].checks if c.quantity == "c11.small.late.flops_gap_max")
    assert check.outcome({check.quantity: {"mean": gap, "n": 1000}})[0] is None
    costs["none"] = 0.36
    assert controls_numbers.cost_gap(helped, "small", "late", ("step", "none")) == pytest.approx(0.02)


def test_more_to_see(helped, monkeypatch):
    seen = [{"id": str(i), "objects": 1 + i % 5, "clutter": float(i)} for i in range(30)]
    monkeypatch.setattr(controls_needs, "scenes", lambda study, role: {"payload": seen})
    removed = np.array([0.9 - 0.1 * (i % 5) for i in range(30)])
    monkeypatch.setattr(controls_needs, "middle_shares", lambda study, key, role: removed)
    found = controls_needs.more_to_see(helped, "small", "coco")
    assert found["removed_objects"]["mean"] == pytest.approx(-1) and found["removed_objects"]["hi"] < 0
    assert found["removed_clutter_given_objects"]["mean"] == 0  # the objects fix the order, nothing is left for clutter
    monkeypatch.setattr(controls_needs, "middle_shares", lambda study, key, role: np.full(30, 0.5))
    assert controls_needs.more_to_see(helped, "small", "coco")["removed_objects"] == {"mean": 0.0, "lo": 0.0, "hi": 0.0, "n": 30}


def test_tables_and_figures(helped):
    plt.rcParams["figure.constrained_layout.use"] = True
    table = controls_tables.control_table(helped)
    assert len(table) == 2 * len(controls.INPUTS) and table["seeds"].tolist()[:6] == [2, 2, 1, 1, 2, 2]
    assert (table["p (Holm)"].dropna() < 0.05).sum() >= 8
    assert len(controls_tables.need_table(helped)) == 12 and len(controls_tables.finality_table(helped)) == 6
    assert len(controls_tables.gap_table(helped)) == 2 and len(controls_tables.seen_table(helped)) == 2
    assert "no in 0, yes in 0, open in 1" in controls_tables.finality_line(helped)
    assert constraints.table(helped)["seeds"].tolist() == [2, 1, 1] * 2 and "penalty" in constraints.line(helped)
    assert len(constraints.quality_table(helped)) == 2
    for name in ("differences", "courses", "seen", "constraint", "better"):
        fig = getattr(controls_figures, f"figure_{name}")(helped)
        assert fig.axes
        plt.close(fig)


# -------------------------------------------------------------------------------------------------------- generality


@pytest.mark.parametrize(
    ("lo", "hi", "n", "above", "wanted"),
    [
        (0.1, 0.4, 600, True, "holds"), (-0.4, -0.1, 600, True, "does not"), (-0.1, 0.1, 600, True, "undecided"),
        (-0.4, -0.1, 600, False, "holds"), (0.1, 0.4, 600, False, "does not"), (0.1, 0.4, 499, True, "undecided"),
        (0.0, 0.4, 600, True, "undecided"),
    ],
)  # fmt: skip
def test_outcomes(lo, hi, n, above, wanted):
    assert generality.outcome({"mean": (lo + hi) / 2, "lo": lo, "hi": hi, "n": n}, 0.0, above) == wanted
    assert generality.outcome(None, 0.0, above) == "undecided"


def test_conclusions_by_condition(helped, monkeypatch):
    monkeypatch.setattr(generality, "MIN_N", 10)
    names = generality.conditions(helped)
    assert names == ("as above", "other scenes", "half of the FLOPs", "5 rates")
    found = generality.data(helped)
    assert len(found) == len(generality.CONCLUSIONS) * 2 * len(names)
    by = found.set_index(["conclusion", "set", "condition"]).outcome
    for name in names:
        assert by["better than one rate of the same cost", "late", name] == "holds"
        assert by["loses at most 2 % of CIDEr", "late", name] == "does not"
    table = generality.table(helped)
    assert len(table) == 8 and "holds (+4" in table["other scenes"][0] and "*" not in table["other scenes"][0]
    there = generality.place(helped, generality.CONDITIONS["other scenes"])
    assert there.seed == helped.seed + 1 and there is generality.place(helped, generality.CONDITIONS["other scenes"])
    ids = [s.dataset("late", 3)[0].id for s in (helped, there)]
    assert ids[0] != ids[1] and helped.dataset("late", 3).seed == 0


# --------------------------------------------------------------------------------------------- on the tiny model


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory):
    """The tiny model at two pictures and two steps of training, all of it really run."""
    made = open_study(
        "controls", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("tiny")), model_small="random:tiny",
        model_base="random:tiny", progress=False,
    )  # fmt: skip
    made.scale = dataclasses.replace(made.scale, max_new_tokens=6, control_steps=2, train_batch=2, n_validation=3)
    return made


@pytest.mark.parametrize("fed", ["shares", "hidden", "foreign", "step", "none", "oracle"])
def test_predictors_come_back_from_their_records(tiny_study, fed):
    recipe = Recipe(inputs=fed)
    record = controls_training.train(tiny_study, "small", recipe)
    found = controls_training.predictor(record)
    assert found.inputs == fed and found.layer == training_runs.LAYER and len(record["payload"]["history"]) == 2
    again = controls_training.predictor(controls_training.train(tiny_study, "small", recipe))
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), again.state_dict().values(), strict=True))
    if fed == "foreign":
        assert len(found.bank) >= 2 and found.bank.dtype == torch.float16 and bool(found.bank.any())


def test_the_papers_predictor_is_notebook_02s_record(tiny_study, monkeypatch):
    asked = []
    monkeypatch.setattr(training_runs, "train", lambda *given: asked.append(given))
    scale = dataclasses.replace(tiny_study.scale, train_steps=tiny_study.scale.control_steps)
    same = dataclasses.replace(tiny_study, scale=scale)
    controls_training.train(same, "small", Recipe(seed=2))
    assert asked == [(same, "small", 0.333, 2)]
    for recipe in (Recipe(constraint="lagrangian"), Recipe(reversible=True), Recipe(n_rates=10), Recipe(inputs="step")):
        assert not recipe.in_notebook_02


@pytest.mark.parametrize("fed", ["shares", "hidden", "foreign"])
def test_named_rates_are_those_that_were_in_force(tiny_study, fed):
    """Read along the finished reply in one pass; their running maximum is what the loop removed."""
    model, processor = tiny_study.model("small")
    made = controls_training.predictor(controls_training.train(tiny_study, "small", Recipe(inputs=fed)))
    made.linear.weight.data.normal_(0, 30 if fed != "hidden" else 3, generator=torch.Generator().manual_seed(1))
    data = tiny_study.dataset("late", 3)
    replies = predict(model, processor, data, DyRate(made), max_new_tokens=6, batch_size=3, progress=False)
    ((_, inputs),) = batches(model, processor, data, range(3), 3)
    named = controls_needs.named_rates(model, inputs, made, [row["tokens"] for row in replies])
    for row, rates in zip(replies, named, strict=True):
        n = row["n_image"]
        assert [n - n * k // made.n_rates for k in np.maximum.accumulate(rates)] == row["kept"]
    assert len({k for row in named for k in row}) > 1


def test_planned_controls_cost_what_the_shares_do(tiny_study):
    wanted = controls.reference(tiny_study, "small", "late")
    for fed in controls.PLANNED:
        record = controls.control(tiny_study, "small", "late", fed, 0)
        assert controls.ratio(record) == pytest.approx(wanted, abs=0.02), fed  # a token of 36 is near that
    method = controls.control(tiny_study, "small", "late", "step", 0)["config"]["method"]
    assert method["method"] == "path" and len(method["rates"]) == 64
    assert controls.control(tiny_study, "small", "late", "oracle", 0)["config"]["method"]["method"] == "oracle"
    told = controls_needs.planned_cost(tiny_study, "small", "late", "step")
    assert 0 < told <= 1 and controls_needs.planned_cost(tiny_study, "small", "late", "shares") is None


def test_needs_are_kept_and_come_back(tiny_study, monkeypatch):
    item = tiny_study.dataset("late", 3)[0]
    rows = [{"text": item.references[0], "steps": len(split_words(item.references[0])) + 1}, {"text": "red", "steps": 4}]
    found = controls_needs.needs(tiny_study, {"payload": rows}, "late")
    known = [need for _, need in annotated_reference(item.meta["scene"], "late", 0)]
    assert found == [[*known, "none"], [None] * 4]
    monkeypatch.setattr(controls_needs, "reply_needs", None)
    assert controls_needs.needs(tiny_study, {"payload": rows}, "late") == found


def test_our_method_is_set_for_a_quarter(tiny_study):
    method = better.better_method(tiny_study, "small", "late", "merge, predictor")
    assert isinstance(method, MergeRate) and method.rates is None and method.layer == better.LAYER
    one = better.better_method(tiny_study, "small", "late")
    parts = {name: better.better_method(tiny_study, "small", "late", name) for name in better.MADE}
    assert parts["merge"] == one and {made.layer for made in parts.values()} == {better.LAYER}
    assert parts["unweighed"] == dataclasses.replace(one, weigh=False)
    assert parts["by attention"] == dataclasses.replace(one, rated_by="last", spread=0.0)
    assert isinstance(one, MergeRate) and len(set(one.rates)) == 1


# ------------------------------------------------------------------------------------------------------------ sharing


def piece(name, after=(), run=None):
    return Piece(name, run or (lambda: {"name": name}), tuple(after))


def test_order_keeps_what_is_needed_first():
    names = [p.name for p in in_order([piece("c", "ab"), piece("a"), piece("b", "a"), piece("a"), piece("d")])]
    assert names == ["a", "b", "d", "c"]
    with pytest.raises(InputError, match="no piece of work 'x'"):
        in_order([piece("a", "x")])
    with pytest.raises(InputError, match="wait for each other: a, b"):
        in_order([piece("a", "b"), piece("b", "a")])


def test_every_piece_of_the_work_is_there():
    for scale in ("smoke", "full"):
        study = open_study("controls", scale=scale, records="fresh", progress=False)
        keys = controls.models(study)
        work = [*controls.pieces(study, keys), *better.pieces(study, keys), *constraints.pieces(study, keys)]
        work += [*generality.pieces(study, keys), *controls_needs.scene_pieces(study)]
        names = [p.name for p in in_order(work)]
        assert len(set(names)) == len(names)
    trained = [name for name in names if " train " in name]
    assert len(trained) <= 110 and len(names) - len(trained) < 400  # what a sitting has time for


def test_two_processes_share_the_pieces(tmp_path):
    """Two at one store: every record is made once, neither waits while something else can be begun, both get all."""
    study = SimpleNamespace(
        store=SimpleNamespace(root=tmp_path, frozen=False), notebook="x", progress=False
    )
    made, guard = {}, threading.Lock()

    def run(name):
        def fn():
            with guard:
                fresh = name not in made
                made.setdefault(name, threading.get_ident())
            time.sleep(0.05 if fresh else 0)
            return {"name": name}

        return fn

    work = [piece("a", run=run("a")), piece("b", run=run("b")), piece("ab", "ab", run("ab"))]
    work += [piece(name, "a", run(name)) for name in "cdef"]
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: share(study, work, "controls")})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == {p.name: {"name": p.name} for p in in_order(work)}
    assert len(set(made.values())) == 2  # both did some of it
    assert not list((tmp_path / "controls").glob(".*.lock"))


def test_a_store_that_only_reads_needs_no_claims(tmp_path):
    study = SimpleNamespace(store=SimpleNamespace(root=tmp_path, frozen=True), notebook="x", progress=False)
    assert list(share(study, [piece("a"), piece("b", "a")], "controls")) == ["a", "b"]
    assert not (tmp_path / "controls").exists()


def test_constant_is_one_rate_of_the_cost(tiny_study):
    record = controls.constant(tiny_study, "small", "late", 0.8, layer=3)
    assert record["config"]["method"]["layer"] == 3 and record["config"]["method"]["method"] == RatePath.name
    assert controls.ratio(record) == pytest.approx(0.8, abs=0.02)
