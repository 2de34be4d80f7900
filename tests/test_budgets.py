"""Plans, equal budgets, and nominal against actual tokens: by hand, against published figures, and against real traces."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dyrate_lib import InputError, RatePredictor, chat_prompt, generate, model_info, prepare_inputs
from dyrate_lib.accounting import flops
from dyrate_lib.budgets import Settings, actual_tokens, budget, cost_ratio, fit_budget, named, nominal_table
from dyrate_lib.dimensions import llava_dimensions
from dyrate_lib.methods import (
    ST3,
    VTW,
    CDPruner,
    DepthPrune,
    DivPrune,
    DyRate,
    FastV,
    Method,
    NoReduction,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    RandomPrune,
    RatePath,
    SparseVLM,
    VisionZip,
)
from dyrate_lib.methods.base import PrefillView

FINE = ("fastv", "random", "sparsevlm", "visionzip", "prumerge", "divprune", "cdpruner", "pyramiddrop", "st3", "depth", "path")
INFO = llava_dimensions("7b")


def test_plans_by_hand():
    assert FastV(2, 0.5).plan(576, 4).tolist() == [[576, 576, 288, 288]]
    assert VTW(3).plan(576, 4, 2).tolist() == [[576, 576, 576, 0]] * 2
    assert RandomPrune(1, 0.75).plan(8, 3, 2).tolist() == [[8, 2, 2]] * 2
    assert NoReduction().plan(7, 2, 3).tolist() == [[7, 7]] * 3
    assert DepthPrune({1: 0.5, 3: 1.0}).plan(10, 4).tolist() == [[10, 5, 5, 0]]
    assert RatePath(1, (0.0, 0.5, 0.25)).plan(8, 2, 4).tolist() == [[8, 8], [8, 4], [8, 4], [8, 4]]  # discarding is final
    back = RatePath(1, (0.0, 0.5, 0.25), reversible=True).plan(8, 2, 4)
    assert back[:, 1].tolist() == [8, 4, 6, 6]
    assert VisionZip(54, 10).plan(576, 2).tolist() == [[64, 64]]


def test_a_plan_of_what_the_content_decides_is_refused():
    with pytest.raises(InputError, match="train the predictor"):
        DyRate(RatePredictor(4, 20, 2)).plan(576, 8)
    with pytest.raises(InputError, match="picture"):
        PruMerge().plan(576, 8)

    @dataclasses.dataclass
    class Confident(Method):
        layer: int = 2

        def prefill(self, view: PrefillView):
            return (view.scores > 0.5).sum(-1)

    with pytest.raises(InputError, match="depends on the content"):
        Confident().plan(576, 8)
    with pytest.raises(InputError, match="depends on the content"):
        budget(Confident(), tokens=192)
    with pytest.raises(InputError, match="steps >= 1"):
        FastV().plan(576, 8, 0)


@pytest.mark.parametrize(("nominal", "actual"), [(192, 206.5), (128, 145.40625), (64, 82.25)])
def test_sparsevlm_at_layer_inputs(nominal, actual):
    assert actual_tokens(SparseVLM(nominal)) == actual


def test_actual_tokens_by_hand():
    assert actual_tokens("fastv") == (2 * 576 + 30 * 288) / 32
    assert actual_tokens(FastV(3)) == (3 * 576 + 29 * 288) / 32
    assert actual_tokens(PyramidDrop) == (576 + 288 + 144 + 72) / 4
    assert actual_tokens(VTW(16)) == 288 and actual_tokens(VisionZip()) == 64
    assert actual_tokens(PruMerge(0.125)) == 73  # the extra token is counted
    st3 = ST3(first=3, every=7, rho=0.5)
    assert actual_tokens(st3) == pytest.approx(0.3 * 576, rel=2e-3) and actual_tokens(st3, steps=64) < 100


def test_nominal_table():
    table = nominal_table().set_index(["method", "setting"])
    assert table.loc[("SparseVLM", "192, recycling"), "actual"] == 206.5
    assert table.loc[("SparseVLM", "192, recycling"), "excess %"] == pytest.approx(7.55, abs=0.01)
    assert table.loc[("VisionZip", "162 + 30"), "actual"] == 192
    assert np.isnan(table.loc[("VTW", "layer 16"), "nominal"])
    named_there = {name for name, _ in table.index}
    assert {"FastV", "VTW", "SparseVLM", "PyramidDrop", "ST3-style", "VisionZip", "PruMerge"} <= named_there
    assert {"PruMerge+", "DivPrune", "CDPruner"} <= named_there


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("wanted", [0.3, 0.333, 0.5])
def test_equal_flops(name, wanted):
    found = budget(name, flops=wanted)
    assert cost_ratio(found) == pytest.approx(wanted, rel=0.02)
    plan = found.plan(576, 32, 64)
    assert flops(INFO, 640, 576, plan, "paper").ratio == cost_ratio(found)


@pytest.mark.parametrize("name", FINE)
@pytest.mark.parametrize("wanted", [96, 192])
def test_equal_tokens(name, wanted):
    found = budget(name, tokens=wanted, steps=1)
    assert actual_tokens(found) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("convention", ["paper", "paper-prefill", "cached"])
def test_conventions_and_runs_enter(convention):
    found = fit_budget("fastv", flops=0.5, convention=convention, prompt_length=600, steps=20)
    assert abs(found.error) < 0.01
    plan = found.method.plan(576, 32, 20)
    assert flops(INFO, 600, 576, plan, convention).ratio == found.cost


@given(layers=st.integers(4, 40), n_image=st.integers(16, 900), share=st.floats(0.05, 1.0), name=st.sampled_from(FINE))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_nearest_setting_is_the_best_there_is(layers, n_image, share, name):
    info = dataclasses.replace(INFO, n_layers=layers, n_image_tokens=n_image)
    fit = fit_budget(name, info, tokens=share * n_image, steps=1)
    plan = fit.method.plan(n_image, layers, 1)
    assert plan.mean() == fit.cost and 0 <= plan.min() and plan.max() <= n_image
    assert fit.lowest <= fit.cost <= fit.highest
    if fit.lowest <= fit.wanted <= fit.highest:  # off by no more than a token in every layer, and a share's thousandth
        assert abs(fit.cost - fit.wanted) <= 4 + n_image / 60
    else:
        assert fit.cost == (fit.lowest if fit.wanted < fit.lowest else fit.highest)


def test_what_is_not_searched_is_kept():
    assert budget(FastV(3, refresh=True), tokens=192).layer == 3
    assert budget(FastV(3, refresh=True), tokens=192).refresh
    assert budget(RandomPrune(2, seed=7), tokens=192).seed == 7
    assert budget(ST3(first=2, every=5, decay="cosine"), tokens=96).decay == "cosine"
    assert not budget(SparseVLM(recycle=False), tokens=192).recycle
    zipped = budget(VisionZip(162, 30), tokens=64)
    assert (zipped.dominant, zipped.contextual) == (54, 10)
    assert budget(PruMerge, tokens=65).plan(576, 4)[0, 0] == 65 and budget(PruMerge(nearest=8), tokens=65).nearest == 8
    assert isinstance(budget("prumerge+", flops=0.333, strict=False), PruMergePlus)
    assert isinstance(budget(DivPrune, tokens=192), DivPrune)
    assert isinstance(budget(CDPruner(tokens=5), tokens=192), CDPruner)


def test_pyramiddrop_moves_its_cuts_only_for_low_budgets():
    high, low = budget("pyramiddrop", tokens=400), budget("pyramiddrop", tokens=120)
    assert high.layers is None and high.ratios[1] == pytest.approx(high.ratios[0] ** 2, abs=1e-5)
    assert low.layers[0] < 8 and low.ratios[0] <= 0.5
    assert low.layers[1] == 2 * low.layers[0] and low.layers[2] == 3 * low.layers[0]


def test_budgets_out_of_reach():
    with pytest.raises(InputError, match=r"FastV.*below what it can reach.*36\.0 to 576\.0"):
        budget("fastv", tokens=20)
    with pytest.raises(InputError, match="strict=False"):
        budget(FastV(8), flops=0.2)
    sixteen = dataclasses.replace(INFO, n_layers=16)
    with pytest.raises(InputError, match="between two of its settings"):
        budget("vtw", sixteen, tokens=100)  # whole layers: 72 or 108
    with pytest.warns(UserWarning, match=r"nearest setting: VTW\(layer=3\).*108\.0"):
        assert budget("vtw", sixteen, tokens=100, strict=False).layer == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert budget("vtw", sixteen, tokens=100, tolerance=0.1).layer == 3
    with pytest.raises(InputError, match="above what it can reach"):
        budget(ST3(floor=0.0), flops=0.95)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "one budget"), ({"flops": 0.5, "tokens": 192}, "one budget"), ({"flops": 1.2}, "must lie"),
        ({"tokens": 0}, "must lie"), ({"tokens": 577}, "must lie"), ({"flops": float("nan")}, "must lie"),
        ({"flops": True}, "must lie"),
        ({"flops": 0.5, "convention": "mine"}, "convention"), ({"flops": 0.5, "prompt_length": 500}, "no run"),
        ({"tokens": 5, "steps": 0}, "no run"), ({"tokens": 5, "n_image": 0}, "must lie"),
    ],
)  # fmt: skip
def test_bad_input(wrong, message):
    with pytest.raises(InputError, match=message):
        budget("fastv", **wrong)


def test_methods_by_name():
    assert named("FastV") == FastV() and named(VTW) == VTW() and named("prumerge+") == PruMergePlus()
    with pytest.raises(InputError, match="no method 'fastest'.*fastv"):
        named("fastest")
    with pytest.raises(InputError, match="needs arguments"):
        named("dyrate")
    with pytest.raises(InputError, match="must be a Method"):
        named(3)
    with pytest.raises(InputError, match="train the predictor"):
        budget(DyRate(RatePredictor(4, 20, 2)), flops=0.333)


def test_a_method_of_ones_own_takes_part():
    @dataclasses.dataclass
    class Half(Method):
        layer: int = 1

        def prefill(self, view: PrefillView):
            return view.n_image // 2

    with pytest.raises(InputError, match=r"settings\(n_image, n_layers\)"):
        budget(Half(), tokens=300)

    class Movable(Half):
        def settings(self, n_image, n_layers):
            return [Movable(layer) for layer in range(1, n_layers)]

    assert budget(Movable(), tokens=576 * 0.75, tolerance=0.05).layer == 16

    class Empty(Half):
        def settings(self, n_image, n_layers):
            return Settings(0, lambda i: self)

    with pytest.raises(InputError, match="no setting"):
        budget(Empty(), tokens=300)


@pytest.mark.parametrize("name", (*FINE, "vtw", "prumerge+"))
def test_a_plan_is_what_a_run_does(tiny, picture, name):
    """The trace of a run equals the plan, layer by layer and pass by pass."""
    model, processor = tiny
    info = model_info(model)
    found = fit_budget(name, info, tokens=info.n_image_tokens / 2, steps=1).method
    inputs = prepare_inputs(processor, [picture], [chat_prompt("What is there?")])
    out = generate(model, inputs, found, max_new_tokens=3, forced_tokens=torch.tensor([[5, 6, 7]]))
    kept = out.trace.kept_by_layer[0].numpy()
    assert np.array_equal(kept, found.plan(int(out.trace.n_image[0]), info.n_layers, kept.shape[0]))


@pytest.fixture(scope="module")
def picture():
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8))


def test_budgets_before_the_llm_are_of_one_picture():
    """Each picture of a prompt is reduced by itself, so two pictures' tokens are no count to search for."""
    info = llava_dimensions("7b")
    with pytest.raises(InputError, match="one picture of 576"):
        budget("visionzip", info, tokens=192, n_image=2 * 576)
    assert budget("fastv", info, tokens=400, n_image=2 * 576).name == "fastv"
