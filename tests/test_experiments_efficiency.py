"""FLOPs on LLaVA-1.5's dimensions, the replayed course, timings in turns, and the ratios that C4 and C6 are judged by."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from dyrate_lib import InputError, RatePredictor, accounting, generate
from dyrate_lib.compare import claims
from dyrate_lib.experiments import efficiency, efficiency_tables, open_study
from dyrate_lib.experiments.contradictions import llava_info
from dyrate_lib.experiments.efficiency import Replay
from dyrate_lib.experiments.training_runs import LAYER, N_RATES


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fresh study of the tiny model with an untrained predictor, replies of six tokens, two timed rounds."""
    made = open_study(
        "04_efficiency", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("study")), model_small="random:tiny",
        model_base="random:tiny", progress=False,
    )  # fmt: skip
    made.scale = dataclasses.replace(
        made.scale, n_captions=2, max_new_tokens=6, bootstrap=50, latency_repeats=2, latency_warmup=0
    )
    predictor = RatePredictor(4, N_RATES, LAYER)
    with torch.no_grad():
        predictor.linear.bias[N_RATES // 2] = 1.0  # half of the tokens, always
    predictor.save(made.out / "predictors" / made.predictor_file("small"))
    return made


def test_replay_keeps_what_it_is_told(tiny, batch):
    out = generate(tiny[0], batch, Replay(2, (30, 30, 12, 4)), max_new_tokens=6, eos_token_id=[])
    assert out.trace.kept[0].tolist() == [30, 30, 12, 4, 4, 4]
    with Replay(2, (30, 12))(tiny[0]) as pruning, torch.no_grad():
        tiny[0].generate(**batch, max_new_tokens=3, do_sample=False)
    assert [int(kept[0]) for kept in pruning.kept] == [30, 12, 12]
    with pytest.raises(InputError, match="never rise"):
        Replay(2, (4, 5))


def test_course_is_the_mean_over_pictures_that_still_generate(study, monkeypatch):
    rows = [{"kept": [36, 18, 18], "n_image": 36}, {"kept": [18, 6], "n_image": 36}]
    monkeypatch.setattr(efficiency, "long_cell", lambda *_: {"payload": rows})
    assert efficiency.course(study, "small") == (27, 12, 12)  # the third step would be 18: dropping is final


def test_kept_by_layer_and_scaled_course():
    info = llava_info("7b")
    table = efficiency_tables.kept_by_layer(info, 3, (100, 50), steps=4)
    assert table.shape == (4, 32) and (table[:, :3] == 576).all() and table[:, 3].tolist() == [100, 50, 50, 50]
    scaled = efficiency_tables.scaled_course(info, (200, 100, 50))
    ratio = accounting.flops(info, 640, 576, efficiency_tables.kept_by_layer(info, LAYER, scaled), "paper").ratio
    assert ratio == pytest.approx(1 / 3, abs=0.003)
    assert list(scaled) == sorted(scaled, reverse=True)


def test_llava_flops_follow_the_formula(study):
    table = efficiency_tables.llava_flops_table(study).set_index(["model", "method"])
    info = llava_info("7b")
    layer = [float(accounting.paper_layer_flops(n, info.hidden, info.mlp)) for n in (640, 352)]
    expected = 100 * (2 * layer[0] + 30 * layer[1]) / (32 * layer[0])
    row = table.loc[("LLaVA-1.5-7B", "FastV (P=2, R=0.5)")]
    assert row["paper-prefill"] == pytest.approx(expected) and row["paper's Table III"] == 55.4
    assert (table.xs("Original", level="method")[["cached", "paper", "decode alone"]] == 100).all().all()
    assert (table["decode alone"] > 97).all()  # a cached step hardly depends on the image
    third = table.xs("DyRate (course scaled to 33.3 %)", level="method")["paper"]
    assert third.to_numpy() == pytest.approx(100 / 3, abs=0.3)


def test_rounds_take_turns_and_are_counted():
    calls = []
    runs = {name: (lambda n, name=name: calls.append((name, n))) for name in ("a", "b")}
    found = efficiency.time_rounds(runs, 5, 1, 3, torch.device("cpu"))
    assert calls[:4] == [("a", 1), ("a", 5), ("b", 1), ("b", 5)] and len(calls) == 2 * 2 * (1 + 3)
    assert all(len(times) == 3 for method in found.values() for times in method.values())


def test_inputs_hold_one_picture_and_the_stated_text(tiny):
    inputs = efficiency.latency_inputs(*tiny, batch=3)
    image = int(tiny[0].config.image_token_id)
    assert inputs["input_ids"].shape == (3, efficiency.TEXT_TOKENS + 36)
    assert (inputs["input_ids"] == image).sum(1).tolist() == [36] * 3
    assert int((inputs["input_ids"][0] == image).nonzero()[0]) == efficiency.SYSTEM_TOKENS
    out = generate(tiny[0], inputs, max_new_tokens=2, eos_token_id=[])
    assert out.lengths.tolist() == [2, 2, 2]


def test_ratio_of_medians():
    base = np.array([10.0, 12.0, 11.0, 10.5])
    found = efficiency_tables.ratio_of_medians(0.5 * base, base)
    assert found["mean"] == pytest.approx(0.5) and found["lo"] == pytest.approx(0.5) and found["n"] == 4
    noisy = efficiency_tables.ratio_of_medians(np.array([5.0, 9.0, 4.0, 8.0]), base)
    assert noisy["lo"] <= noisy["mean"] <= noisy["hi"] and noisy["lo"] < noisy["hi"]
    with pytest.raises(ValueError, match="paired"):
        efficiency_tables.ratio_of_medians(base, base[:2])


def test_full_scale_without_gpu_times_nothing_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    full = open_study("04_efficiency", scale="full", records="fresh", out=str(tmp_path), progress=False)
    subject = efficiency.subjects(full)[0]
    assert subject.name == "random:llava-1.5-7b" and subject.gpu
    monkeypatch.setattr(efficiency, "course", lambda *_: (100,))
    assert efficiency.latency(full, subject) is None and efficiency.ceilings(full, True) is None
    monkeypatch.setattr(efficiency, "load_vlm", lambda *_, **__: pytest.fail("a model was loaded"))
    assert efficiency.latency_cells(full) == {}
    assert efficiency_tables.latency_table(full).empty and efficiency_tables.latency_figure(full) is None
    assert "no latency was measured" in efficiency_tables.findings(full)


def test_smoke_times_the_small_model(study):
    cells = efficiency.latency_cells(study)
    assert set(cells) == {("small", "ours", 1), ("small", "stock", 1), ("small", "ours", 2)}
    ours = cells["small", "ours", 1]
    assert set(ours["payload"]["samples"]) == {"original", "fastv-3", "fastv-2", "vtw", "dyrate"}
    for method in ours["payload"]["samples"]:
        prefill, whole = efficiency_tables.samples(ours, method)
        assert len(whole) == 2 and (whole > prefill).all() and (prefill > 0).all()
    assert len(ours["payload"]["features_ms"]) == 2 and set(ours["config"]["course"]) == {18}
    table = efficiency_tables.latency_table(study)
    assert (table[table.method == "Original"].ratio == 1).all() and table["end to end ms"].gt(0).all()
    assert efficiency_tables.ceiling_table(study)["decode: share of best %"].gt(0).all()
    fig = efficiency_tables.latency_figure(study)
    assert len(fig.axes) == 2 and len(fig.axes[0].patches) == 5
    plt.close(fig)


def test_predictor_costs(study):
    found = efficiency_tables.predictor_quantities(study)
    info = llava_info("7b")
    step = accounting.flop_steps(info, 640, 576, efficiency_tables.kept_by_layer(info, LAYER, (0,), 2), "cached")[1]
    assert found["c6.7b.flops_share"]["mean"] == pytest.approx((2 * 4 * 32 * N_RATES + N_RATES) / step)
    assert 0 < found["c6.small.share_of_saving"]["mean"] < 1 and found["c6.small.share_of_saving"]["n"] == 2
    assert "c6.7b.time_share" not in found  # nothing was timed on those dimensions
    assert len(efficiency_tables.predictor_table(study)) == 3


def test_quantities_of_timed_models(study, monkeypatch):
    rounds = {
        m: {"prefill_ms": [10.0, 11.0], "end_to_end_ms": [t, t + 1]}
        for m, t in zip(efficiency_tables.ORDER, (100.0, 90.0, 80.0, 95.0, 70.0))
    }
    record = {
        "config": {"new_tokens": 64},
        "payload": {"samples": rounds, "features_ms": [0.01, 0.01], "peak_bytes": dict.fromkeys(rounds)},
    }
    monkeypatch.setattr(
        efficiency_tables, "latency_cells", lambda _: {("7b", "ours", 1): record, ("7b", "ours", 16): record}
    )
    found = efficiency_tables.quantities(study)
    known = {name for key in ("C4", "C6") for name in claims()[key].quantities}
    assert set(found) <= known
    assert {name for name in known if name.startswith("c4.7b")} <= set(found)
    assert found["c4.7b.dyrate_end_to_end_ratio"]["mean"] == pytest.approx(70.5 / 100.5)
    assert found["c4.7b.dyrate_over_fastv2"]["mean"] == pytest.approx(70.5 / 80.5)
    assert found["c6.7b.time_share"]["mean"] == pytest.approx(0.01 / (60 / 63))


def test_bound_table_by_hand():
    row = efficiency_tables.bound_table().iloc[0]
    assert row["batch"] == 1 and row["most that can be saved %"] == pytest.approx(2.19, abs=0.01)
