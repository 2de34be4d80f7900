"""FLOPs on LLaVA-1.5's dimensions, the replayed course, timings in turns, and what C4 and C6 are judged by."""

from __future__ import annotations

import dataclasses
import json
import time
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib import InputError, RatePredictor, ResourceError, accounting, generate
from dyrate_lib.compare import claims
from dyrate_lib.experiments import (
    efficiency,
    efficiency_agreement,
    efficiency_cells,
    efficiency_cli,
    efficiency_course,
    efficiency_figures,
    efficiency_latency,
    efficiency_measure,
    efficiency_overhead,
    efficiency_rounds,
    efficiency_rows,
    efficiency_share,
    efficiency_tables,
    efficiency_targets,
    efficiency_words,
    open_study,
)
from dyrate_lib.experiments.contradictions import llava_info
from dyrate_lib.experiments.efficiency import Replay
from dyrate_lib.experiments.efficiency_cells import Cell
from dyrate_lib.experiments.efficiency_clock import (
    KINDS,
    SYSTEM_TOKENS,
    TEXT_TOKENS,
    Clock,
    engine_for,
    latency_inputs,
    make_run,
)
from dyrate_lib.experiments.efficiency_course import kept_by_layer
from dyrate_lib.experiments.efficiency_floors import floor_ms
from dyrate_lib.experiments.efficiency_rounds import Contender, Rounds
from dyrate_lib.experiments.training_runs import LAYER, N_RATES
from dyrate_lib.models import model_info

from . import timed_records

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A fresh study of the tiny model with an untrained predictor, replies of six tokens."""
    made = open_study(
        "04_efficiency", scale="smoke", records="fresh", out=str(tmp_path_factory.mktemp("study")), model_small="random:tiny",
        model_base="random:tiny", progress=False,
    )  # fmt: skip
    made.scale = dataclasses.replace(made.scale, n_captions=2, max_new_tokens=6, bootstrap=50)
    predictor = RatePredictor(4, N_RATES, LAYER)
    with torch.no_grad():
        predictor.linear.bias[N_RATES // 2] = 1.0  # half of the tokens, always
    predictor.save(made.out / "predictors" / made.predictor_file("small"))
    return made


@pytest.fixture(scope="module")
def measured(study):
    """The tiny study's records, really timed."""
    return efficiency.latency_records(study)


@pytest.fixture
def full(tmp_path, monkeypatch):
    """A study of full scale whose timings are made up (`timed_records`)."""
    made = open_study("04_efficiency", scale="full", records="fresh", out=str(tmp_path), progress=False)
    made.scale = dataclasses.replace(made.scale, bootstrap=100)
    monkeypatch.setattr(efficiency_words, "courses", lambda _, cell: timed_records.COURSES[cell.model])
    timed_records.fill(made)
    return made


# ------------------------------------------------------------------------------------------------------ the course


def test_replay_keeps_what_it_is_told(tiny, batch):
    out = generate(tiny[0], batch, Replay(2, (30, 30, 12, 4)), max_new_tokens=6, eos_token_id=[])
    assert out.trace.kept[0].tolist() == [30, 30, 12, 4, 4, 4]
    with Replay(2, (30, 12))(tiny[0]) as pruning, torch.no_grad():
        tiny[0].generate(**batch, max_new_tokens=3, do_sample=False)
    assert [int(kept[0]) for kept in pruning.kept] == [30, 12, 12]
    with pytest.raises(InputError, match="never rise"):
        Replay(2, (4, 5))


def test_replay_runs_its_predictor_only_where_it_shall(tiny, batch, monkeypatch):
    calls = []
    forward = RatePredictor.forward
    monkeypatch.setattr(RatePredictor, "forward", lambda self, shares: calls.append(1) or forward(self, shares))
    for predict in (True, False):
        calls.clear()
        generate(tiny[0], batch, Replay(2, (30, 12), predict), max_new_tokens=4, eos_token_id=[], engine="reference")
        assert len(calls) == (4 if predict else 0)


def test_course_is_the_mean_over_pictures_that_still_generate(study, monkeypatch):
    rows = [{"kept": [36, 18, 18], "n_image": 36}, {"kept": [18, 6], "n_image": 36}]
    monkeypatch.setattr(efficiency_course, "long_cell", lambda *_: {"payload": rows})
    assert efficiency.course(study, "small") == (27, 12, 12)  # the third step would be 18: dropping is final


def test_kept_by_layer_and_stretched():
    info = llava_info("7b")
    table = kept_by_layer(info, 3, (100, 50), steps=4)
    assert table.shape == (4, 32) and (table[:, :3] == 576).all() and table[:, 3].tolist() == [100, 50, 50, 50]
    assert (kept_by_layer(info, 3, (100,), 2, 2880)[:, :3] == 2880).all()
    assert efficiency_course.stretched((100, 50), 576, 2880) == (500, 250)


@given(
    kept=st.lists(st.integers(1, 576), min_size=1, max_size=70).map(lambda k: tuple(sorted(k, reverse=True))),
    ratio=st.floats(0.05, 0.95),
)
@settings(deadline=None, max_examples=15)
def test_scaled_course_meets_a_budget_that_can_be_met(kept, ratio):
    info = llava_info("7b")
    scaled = efficiency_course.scaled_course(info, kept, ratio)
    found, least = efficiency_course.course_ratio(info, LAYER, scaled), efficiency_course.least_ratio(info)
    assert list(scaled) == sorted(scaled, reverse=True) and max(scaled) <= 576 and len(scaled) == len(kept)
    assert found <= max(ratio, least) + 1e-9
    assert found >= min(ratio, 1) - 0.01 or ratio < least or all(k == 576 for k in scaled)


# ----------------------------------------------------------------------------------------------------------- FLOPs


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


def test_bound_table_by_hand():
    row = efficiency_tables.bound_table().iloc[0]
    assert row["batch"] == 1 and row["most that can be saved %"] == pytest.approx(2.19, abs=0.01)


def test_floors_by_hand():
    info, limits = llava_info("7b"), {"copy_gb_s": 1000.0, "matmul_tflops": {"bfloat16": 100.0}}
    table = kept_by_layer(info, 2, (100,), 3)
    found = floor_ms(info, table, 576, 4, limits)
    parts = accounting.flop_parts(info, 640, 576, table[:1], "cached")
    assert found["prefill"] == pytest.approx(4 * sum(parts.values()) / 1e11)
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)
    entries = [2 * (640 + t) + 30 * (164 + t) for t in (1, 2)]  # rows that each sample's keys and values have then
    bytes_read = weights + 4 * np.mean(entries) * 2 * 4096 * 2
    assert found["decode"] == pytest.approx(bytes_read / 1e9, rel=1e-6)
    assert found["prefill_bytes"] == pytest.approx(weights / 1e9, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------- timing


def test_inputs_hold_the_pictures_and_the_stated_text(tiny):
    for pictures in (1, 3):
        inputs = latency_inputs(*tiny, batch=3, pictures=pictures)
        image = int(tiny[0].config.image_token_id)
        assert inputs["input_ids"].shape == (3, TEXT_TOKENS + 36 * pictures)
        assert (inputs["input_ids"] == image).sum(1).tolist() == [36 * pictures] * 3
        assert int((inputs["input_ids"][0] == image).nonzero()[0]) == SYSTEM_TOKENS
        out = generate(tiny[0], inputs, max_new_tokens=2, eos_token_id=[])
        assert out.lengths.tolist() == [2, 2, 2] and out.trace.n_image.tolist() == [36 * pictures] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_loop_tells_of_each_token_in_time(tiny, kind):
    inputs = latency_inputs(*tiny, batch=2)
    run = make_run(kind, tiny[0], inputs, Replay(2, (20, 5)) if kind == "reference" else None)
    found = efficiency_rounds.timed(Contender(kind, kind, "original", run), 6, CPU, (2, 4))
    times = [found["ms"][n] for n in ("1", "2", "4", "6")]
    assert times == sorted(times) and 0 < times[0] and times[-1] <= found["wall_ms"] and found["tokens"] == 6
    assert set(found["host_ms"]) == ({"intake", "queued"} if kind == "graph" else set())
    with pytest.raises(InputError, match="no loop"):
        make_run("fast", tiny[0], inputs, None)


def test_a_loop_that_tells_of_other_tokens_than_it_makes_is_refused():
    def silent(n, clock):
        clock.token()

    with pytest.raises(InputError, match="told of 1 tokens where 3"):
        efficiency_rounds.timed(Contender("a", "graph", "original", silent), 3, CPU, ())


def fake(name, calls, kind="graph", most=20, fail=None):
    """A contender that notes its calls; fail(contenders seen so far) may raise."""

    def run(n, clock):
        if fail is not None:
            fail(calls)
        calls.append((name, n))
        for _ in range(n):
            clock.token()

    return Contender(name, kind, "original", run, most)


def rounds(**changes):
    return Rounds(
        **{"new": 3, "repeats": 4, "long": 6, "long_repeats": 2, "warmup": 2, "at": (2,), "deadline": 1e12, **changes}
    )


def test_contenders_take_turns_and_are_counted():
    calls = []
    some = [fake("a", calls), fake("b", calls), fake("slow", calls, "stock", most=2)]
    assert efficiency_rounds.sample(some, rounds(), CPU, None) == {}
    assert [len(c.samples) for c in some] == [4, 4, 2] and [len(c.long) for c in some] == [2, 2, 0]
    short = [name for name, n in calls if n == 3]
    assert short[:5] == ["a", "b", "slow", "a", "b"]  # warming up: what is captured needs more
    assert short[5:] == ["a", "b", "slow", "a", "b", "a", "b", "slow", "a", "b"]
    assert set(some[0].samples[0]["ms"]) == {"1", "2", "3"} and set(some[0].long[0]["ms"]) == {"1", "2", "6"}


def test_time_that_is_up_leaves_three_samples_and_one_of_long_runs():
    calls = []
    some = [fake("a", calls), fake("b", calls)]
    efficiency_rounds.sample(some, rounds(repeats=20, deadline=time.monotonic() - 1), CPU, None)
    assert [len(c.samples) for c in some] == [3, 3] and [len(c.long) for c in some] == [1, 1]


def test_contenders_that_do_not_fit_together_are_sampled_apart():
    calls = []

    def together(seen):  # b finds no room once a has run just before
        if seen and seen[-1][0] == "a" and current[0] == "b":
            raise torch.OutOfMemoryError("no room")

    def never(seen):
        raise ResourceError("a batch of 3 would fit.")

    current = [""]
    some = [fake("a", calls), fake("b", calls, fail=together), fake("c", calls, fail=never)]
    clear = efficiency_rounds.clear
    for contender in some:
        run = contender.run
        contender.run = lambda n, clock, run=run, name=contender.name: (current.__setitem__(0, name), run(n, clock))

    def clearing(*args):
        calls.append(("clear", 0))
        clear(*args)

    efficiency_rounds.clear, failed = clearing, {}
    try:
        failed = efficiency_rounds.sample(some, rounds(long_repeats=0), CPU, None)
    finally:
        efficiency_rounds.clear = clear
    assert set(failed) == {"turns", "c"} and "would fit" in failed["c"]
    assert [len(c.samples) for c in some] == [4, 4, 0]
    assert efficiency_measure.would_fit(failed["c"]) == 3 and efficiency_measure.would_fit("not even one sample") == 0


def test_what_did_not_fit_is_given_back_before_the_next_try():
    """An error holds the frames that it passed, and with them the caches of the loop that failed."""
    calls, held = [], []

    def full(seen):
        cache = torch.zeros(8)
        alive = [ref for ref in held if ref() is not None]
        assert not alive, "the loop that failed still holds its cache"
        held.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("no room")

    some = [fake("a", calls), fake("b", calls, fail=full), fake("c", calls, fail=full)]
    failed = efficiency_rounds.sample(some, rounds(long_repeats=0), CPU, None)
    assert set(failed) == {"turns", "b", "c"} and len(held) == 3 and len(some[0].samples) == 4


def test_a_fault_that_fewer_samples_do_not_cure_is_not_hidden():
    def broken(_):
        raise RuntimeError("illegal access")

    with pytest.raises(RuntimeError, match="illegal"):
        efficiency_rounds.sample([fake("a", [], fail=broken)], rounds(), CPU, None)
    assert "RuntimeError: illegal" in efficiency_rounds.attempt(lambda: broken(0), (Exception,))


def test_a_method_that_reads_other_tokens_than_recorded_is_refused(tiny):
    inputs, info = latency_inputs(*tiny, batch=1), model_info(tiny[0])
    run = make_run("graph", tiny[0], inputs, Replay(2, (20, 5)))
    contender, engine = Contender("graph dyrate", "graph", "dyrate", run), engine_for(tiny[0])
    plan = rounds()
    right = efficiency_measure.run_alone(contender, plan, CPU, engine, (2, (20, 5)), info, 36)
    assert right["kv_held_bytes"] > 0 and "failed" not in right
    with pytest.raises(InputError, match="does not read what it was told"):
        efficiency_measure.run_alone(contender, plan, CPU, engine, (2, (20, 6)), info, 36)


# ------------------------------------------------------------------------------------------------------- the cells


def test_smoke_times_the_small_model(study, measured):
    assert [cell.kind for cell in measured] == list(efficiency_cells.KIND_NAMES)
    record = measured[Cell("small")]
    assert set(record["payload"]["contenders"]) == {
        *(f"graph {m}" for m in efficiency_cells.METHODS), "reference original", "reference dyrate", "stock original",
        "stock fastv-2",
    }  # fmt: skip
    assert record["payload"]["failed"] == {} and set(record["payload"]["reads"]["dyrate"]["kept"]) == {18}
    for name in record["payload"]["contenders"]:
        for new in record["config"]["new_tokens"][:2]:
            found = efficiency_rows.samples(record, name, new)
            assert len(found["whole"]) == 2 and (found["whole"] > found["prefill"]).all() and (found["token"] > 0).all()
    rows = efficiency_rows.all_rows(study)
    assert len(rows) == 5 * 3 + 4 * 2 and rows["end to end ms"].gt(rows["prefill ms"]).all()
    held = rows[rows.loop == "graph"].groupby("method")["KV held GB"].first()
    assert held["vtw"] < held["original"] and held["dyrate"] < held["fastv-3"] * 1.01
    table = efficiency_latency.latency_table(study)
    assert (table[(table.method == "Original") & (table.loop == "graph engine")]["of unpruned graph"] == 1).all()
    assert efficiency_latency.memory_table(study).empty  # a CPU tells no peak
    assert efficiency_targets.target_table(study).empty  # aims are for LLaVA-1.5's sizes
    fig = efficiency_figures.bar_figure(study)
    assert len(fig.axes) == 2 and len(fig.axes[0].patches) == 5
    plt.close(fig)


def test_smoke_shares_sweep_and_agreement(study, measured):
    share = measured[Cell("small", 1, 1, "share")]
    assert set(efficiency_overhead.shares(share, 50)) == {"predictor", "all"}
    kernels = efficiency_overhead.kernel_table(study)
    assert len(kernels) == 8 and kernels["% of the time"].is_monotonic_decreasing and kernels.us.gt(0).all()
    sweep = measured[Cell("small", 1, 1, "sweep")]["payload"]
    assert (
        set(sweep["contenders"]) == {"graph original"} and sweep["least"] > 0.333
    )  # P = 2 of 8 layers is too much already
    agreement = efficiency_overhead.agreement_table(study)
    ours = agreement[agreement.loops == "graph, reference"]
    assert len(ours) == 3 and (ours["the same %"] == 100).all()  # float32: the same tokens


def test_records_are_found_again_and_timed_once(study, measured, monkeypatch):
    monkeypatch.setattr(efficiency_measure, "measure", lambda *_: pytest.fail("timed again"))
    assert efficiency_cells.record_of(study, Cell("small"))["payload"] == measured[Cell("small")]["payload"]
    assert len(efficiency.compute(study)) >= len(measured)


def test_full_scale_without_gpu_times_nothing_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = open_study("04_efficiency", scale="full", records="fresh", out=str(tmp_path), progress=False)
    assert efficiency.subjects(made)[0] == efficiency.Subject("7b", "random:llava-1.5-7b", True)
    monkeypatch.setattr(efficiency_cells, "load_vlm", lambda *_, **__: pytest.fail("a model was loaded"))
    assert efficiency.latency_records(made) == {}
    for table in (
        efficiency_latency.latency_table, efficiency_latency.sweep_table, efficiency_latency.compact_table,
        efficiency_latency.floor_table, efficiency_latency.memory_table, efficiency_targets.target_table,
        efficiency_targets.possible_table, efficiency_overhead.overhead_table, efficiency_overhead.kernel_table,
        efficiency_overhead.agreement_table, efficiency_figures.speed_data, efficiency_figures.budget_data,
    ):  # fmt: skip
        assert table(made).empty
    for figure in (efficiency_figures.bar_figure, efficiency_figures.speed_figure, efficiency_figures.budget_figure):
        assert figure(made) is None
    for words in ("findings", "possible_words", "recommendation", "missed"):
        assert "o latency was measured" in getattr(efficiency_words, words)(made)
    assert efficiency_words.conditions(made) == "" == efficiency_words.same_course(made)


def test_cells_have_names_and_estimates(tmp_path, monkeypatch):
    made = open_study("04_efficiency", scale="full", records="fresh", out=str(tmp_path), progress=False)
    cells = efficiency_cells.cells(made)
    names = [cell.name() for cell in cells]
    assert len(set(names)) == len(names) and {
        "7b:1:576",
        "13b:64:2880",
        "7b:16:share",
        "7b:64:sweep",
        "agreement",
    } <= set(names)
    assert [efficiency_cells.parse_cell(made, name) for name in names] == cells
    seconds = {cell.name(): efficiency_cells.estimate_seconds(made, cell) for cell in cells}
    assert all(0 < s < 1800 for s in seconds.values()) and seconds["13b:1:576"] > seconds["7b:1:576"]
    configs = [json.dumps(efficiency_cells.config_of(made, cell), sort_keys=True) for cell in cells]
    assert len(set(configs)) == len(configs)  # each is a record of its own
    with pytest.raises(InputError, match="no cell '7b:2:576'.*7b:1:576"):
        efficiency_cells.parse_cell(made, "7b:2:576")


def test_command_line_makes_a_cell_once(study, measured, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(efficiency_cli, "open_study", lambda *_, **__: study)
    assert efficiency_cli.main(["--list"]) == 0
    assert "small:1:36" in capsys.readouterr().out
    assert efficiency_cli.main(["--cells", "small:1:36,agreement"]) == 0
    out = capsys.readouterr().out
    assert "graph dyrate: prefill" in out and "graph, reference: original: 2/2 the same" in out
    assert efficiency_cli.main(["--cells", "nothing"]) == 2 and "no cell 'nothing'" in capsys.readouterr().err
    monkeypatch.setattr(efficiency_cli, "record_of", lambda *_: 1 / 0)
    assert efficiency_cli.main(["--cells", "small:1:36"]) == 1 and "ZeroDivisionError" in capsys.readouterr().out
    assert efficiency_cli.main(["--cells", "small:1:36", "--until", "1"]) == 0
    assert "left out" in capsys.readouterr().out


# --------------------------------------------------------------------------------- tables and words, made-up times


def test_rows_are_the_multiples_of_floors_that_were_made_up(full):
    rows = efficiency_rows.all_rows(full)
    graph = rows[(rows.loop == "graph") & (rows.n > 0)]
    assert graph["prefill x floor"].to_numpy() == pytest.approx(timed_records.PREFILL)
    assert graph["decode x floor"].to_numpy() == pytest.approx(timed_records.TOKEN)
    assert set(graph["new tokens"]) == {16, 64, 256} and set(rows[rows.loop == "stock"]["new tokens"]) == {16, 64}
    stock = rows[(rows.loop == "stock") & (rows["new tokens"] == 64) & (rows.n > 0) & (rows.method == "original")]
    assert (1 / stock["x unpruned graph"]).to_numpy() == pytest.approx(7, rel=1e-3)
    assert len(efficiency_latency.sweep_table(full)) == len(rows) and len(efficiency_latency.compact_table(full)) == 45


def test_paper_stands_beside_the_graph_engine_alone(full):
    table = efficiency_latency.latency_table(full)
    beside = table[table["paper ms"].notna()]
    assert set(beside.loop) == {"graph engine"} and set(beside.batch) == {1} and len(beside) == 10
    row = beside[(beside.model == "LLaVA-1.5-7B") & (beside.method == "DyRate")].iloc[0]
    assert row["paper ms"] == 40.13 and row["paper, of unpruned"] == pytest.approx(40.13 / 70.80)


def test_aims_are_judged(full):
    table = efficiency_targets.target_table(full).set_index(["model", "what"])
    row = table.loc[("LLaVA-1.5-7B", "decode step over its floor, DyRate, batch 64")]
    assert row.aim == "at most 1.35" and float(row.measured) == pytest.approx(1.2, abs=1e-3) and row.met == "yes"
    row = table.loc[("LLaVA-1.5-7B", "prefill over its matrix products' floor, DyRate, batch 16")]
    assert row.aim == "at most 1.3" and float(row.measured) == pytest.approx(1.4) and row.met == "no"
    row = table.loc[("LLaVA-1.5-7B", "faster than stock generate, DyRate end to end, batch 1")]
    assert row.aim == "at least 4.5" and float(row.measured) > 7 and row.met == "yes"
    row = table.loc[("LLaVA-1.5-7B", "predictor, lengths and features of a step, batch 1")]
    assert float(row.measured) == pytest.approx((0.03 + 0.002) / 4, abs=5e-4) and row.met == "yes"
    row = table.loc[
        ("LLaVA-1.5-7B", "faster than the same engine unpruned, DyRate end to end, batch 64, 576 image tokens")
    ]
    assert row["floors allow"] > 1 and float(row.measured) == pytest.approx(row["floors allow"], rel=0.05)
    words = efficiency_words.missed(full)
    assert "batch 16, 2880 image tokens: 2.315, aimed for at least 2.4 (floors allow" in words
    assert "aims were met. Missed:" in words and words.count("\n- ") == (table.met == "no").sum()


def test_what_is_possible_at_batch_1(full):
    table = efficiency_targets.possible_table(full).set_index(["model", "part"])
    info = llava_info("7b")
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)
    cache = [32 * n * 2 * 4096 * 2 for n in (64 + 32, 640 + 32)]  # bytes, half way through the reply
    row = table.loc[("LLaVA-1.5-7B", "decode")]
    assert row["floors allow no image token, x"] == pytest.approx((weights + cache[1]) / (weights + cache[0]), rel=1e-4)
    whole = table.loc[("LLaVA-1.5-7B", "end to end, 64 tokens")]
    assert whole["paper, x"] == pytest.approx(70.80 / 40.13)
    assert 1 < whole["floors allow DyRate, x"] < whole["floors allow no image token, x"] < whole["paper, x"]
    assert "no method more than" in efficiency_words.possible_words(full) and info.n_layers == 32


def test_prediction_by_floors_equals_them_at_the_timed_batches(full):
    for cell, record in efficiency_rows.time_records(full).items():
        ratio = [efficiency_rows.floors(full, cell, record, method, 64)["whole"] for method in ("original", "dyrate")]
        assert efficiency_targets.predicted(full, cell, record, 64, cell.batch) == pytest.approx(
            ratio[0] / ratio[1], rel=1e-9
        )


def test_figures_show_every_point(full):
    fig = efficiency_figures.speed_figure(full)
    assert len(fig.axes) == 4 and len(efficiency_figures.speed_data(full)) == 45
    plt.close(fig)
    data = efficiency_figures.budget_data(full)
    assert set(data.batch) == {1, 16, 64} and (data[data.budget == "original"].measured == 1).all()
    some = data[(data.batch == 64) & (data.budget != "original")]
    assert (some.sort_values("FLOPs %, paper").measured.diff().dropna() < 0).all()  # fewer FLOPs, faster
    assert some["measured"].to_numpy() == pytest.approx(some["by floors"].to_numpy(), rel=0.05)
    fig = efficiency_figures.budget_figure(full)
    plt.close(fig)
    fig = efficiency_figures.bar_figure(full)
    assert len(fig.axes) == 2 * 6
    plt.close(fig)


def test_a_batch_that_does_not_fit_is_told(full):
    table = efficiency_latency.memory_table(full)
    large = (table.model == "LLaVA-1.5-13B") & (table.batch == 64) & (table["image tokens"] == 2880)
    row = table[large & (table.method == "Original")]
    assert (row["does not fit; samples that would"] == "40").all() and len(row) == 2
    assert "the unpruned model does not fit" in efficiency_words.findings(full)
    assert "a batch of 40 would fit" in efficiency_words.conditions(full)
    assert set(table[~large]["does not fit; samples that would"].map(str)) == {"nan"}


def test_what_runs_out_of_memory_without_telling_what_would_fit_is_told_in_a_line(full):
    record = efficiency.latency_records(full)[Cell("7b", 64, 5)]
    record["payload"]["contenders"].pop("stock original")
    record["payload"]["failed"]["stock original"] = "OutOfMemoryError: CUDA out of memory. Tried to allocate 3.86 GiB. More."
    record["payload"]["would_fit"]["stock original"] = None
    record["payload"]["skipped"] = ["long"]
    table = efficiency_latency.memory_table(full)
    row = table[(table.model == "LLaVA-1.5-7B") & (table.loop == "stock generate") & (table.batch == 64)]
    assert list(row["does not fit; samples that would"]) == ["not told"]
    said = efficiency_words.conditions(full)
    assert "stock original: OutOfMemoryError: CUDA out of memory\n" in said
    assert "LLaVA-1.5-7B, batch 64, 2880 image tokens: runs of 256 new tokens were left out" in said


def test_advice_follows_the_times(full):
    words = efficiency_words.recommendation(full)
    assert "the engine alone is 7.0 times as fast" in words and "Most comes from the engine" in words
    data = efficiency_figures.speed_data(full)
    some = data[(data.key == "7b") & (data["image tokens"] == 576) & (data["new tokens"] == 64)]
    pays = [str(b) for b in some[some.lo >= efficiency_words.PAYS].batch]
    where = "LLaVA-1.5-7B, 576 image tokens, 64 new tokens: DyRate's course is at least 1.2 times faster"
    assert f"{where} at batch {', '.join(pays)};" in words
    for record in efficiency_rows.time_records(full).values():  # as if pruning gave nothing
        contenders = record["payload"]["contenders"]
        if "graph original" in contenders:
            contenders["graph dyrate"] = contenders["graph original"]
    words = efficiency_words.recommendation(full)
    assert "nowhere 1.2 times faster at batch 1, 4, 16, 64" in words and "leave the tokens in" in words


def test_another_course_than_today_is_told(full, monkeypatch):
    assert efficiency_words.same_course(full) == ""
    monkeypatch.setattr(efficiency_words, "courses", lambda *_: (100,) * 64)
    assert "LLaVA-1.5-7B: what was timed keeps" in efficiency_words.same_course(full)


# -------------------------------------------------------------------------------------------------- C4, C6, shares


def test_ratio_of_medians():
    base = np.array([10.0, 12.0, 11.0, 10.5])
    found = efficiency_rows.ratio_of_medians(0.5 * base, base)
    assert found["mean"] == pytest.approx(0.5) and found["lo"] == pytest.approx(0.5) and found["n"] == 4
    noisy = efficiency_rows.ratio_of_medians(np.array([5.0, 9.0, 4.0, 8.0]), base)
    assert noisy["lo"] <= noisy["mean"] <= noisy["hi"] and noisy["lo"] < noisy["hi"]
    fewer = efficiency_rows.ratio_of_medians(base, base[:2])  # other rounds: an interval although medians are alike
    assert fewer["n"] == 2 and fewer["lo"] < fewer["hi"]


def test_predictor_costs(study):
    found = efficiency_tables.predictor_quantities(study)
    info = llava_info("7b")
    step = accounting.flop_steps(info, 640, 576, kept_by_layer(info, LAYER, (0,), 2), "cached")[1]
    assert found["c6.7b.flops_share"]["mean"] == pytest.approx((2 * 4 * 32 * N_RATES + N_RATES) / step)
    assert 0 < found["c6.small.share_of_saving"]["mean"] < 1 and found["c6.small.share_of_saving"]["n"] == 2
    assert "c6.7b.time_share" not in found  # nothing was timed on those dimensions
    assert len(efficiency_tables.predictor_table(study)) == 3


def test_quantities_of_timed_models(full, monkeypatch):
    nothing = {"unpruned": {"cached": 0.0}, "flops": {"cached": 1.0}}
    monkeypatch.setattr(efficiency_tables, "scene_cells", lambda *_: {"dyrate": {"payload": [nothing]}})
    found = efficiency_tables.quantities(full)
    known = {name for key in ("C4", "C6") for name in claims()[key].quantities}
    assert set(found) <= known and {name for name in known if name.startswith("c4.")} <= set(found)
    record = efficiency_rows.time_records(full)[Cell("7b")]
    whole = [np.median(efficiency_rows.samples(record, f"graph {m}")["whole"]) for m in ("dyrate", "original")]
    assert found["c4.7b.dyrate_end_to_end_ratio"]["mean"] == pytest.approx(whole[0] / whole[1])
    assert found["c4.7b.dyrate_end_to_end_ratio"]["n"] == 20
    assert found["c6.13b.time_share"]["mean"] == pytest.approx((0.03 + 0.002) / 4, rel=0.01)


def test_attention_of_each_layer_from_a_profile():
    assert efficiency_share.by_layer([1.0, 2.0, 3.0, 3.0, 4.0, 5.0], 3) == [2.0, 3.0, 4.0]
    assert efficiency_share.by_layer([1.0, 2.0], 3) == [] == efficiency_share.by_layer([], 3)
    kinds = {"_few": "matrix products", "nvjet_hsh_128": "matrix products", "_attend": "attention", "void foo": "other"}
    assert {name: efficiency_overhead.kind_of(name) for name in kinds} == kinds


def test_profile_sees_the_asked_steps_alone(tiny):
    inputs = latency_inputs(*tiny, batch=1)
    run = make_run("graph", tiny[0], inputs, Replay(2, (20, 5)))
    step = efficiency_share.profile(run, CPU, 12, 2, top=10**6)
    prompt = efficiency_share.profile(run, CPU, 1, None, top=10**6)
    calls = [{name: n for name, n, _ in found["kernels"]} for found in (step, prompt)]
    assert (
        step["steps"] == 8
        and calls[0]["aten::embedding" if "aten::embedding" in calls[0] else "aten::index_select"] % 8 == 0
    )
    assert "aten::sigmoid" in calls[1]  # the vision tower's quick GELU
    assert "aten::sigmoid" not in calls[0]


@pytest.mark.parametrize("where", ["gpu", "cpu"])
def test_operators_count_once(where):
    """Records of version 0.3.0 hold a GPU's operators beside their kernels; on a CPU operators are all there is."""
    kernels = [["nvjet", 8, 80.0], ["aten::mm", 8, 80.0], ["_advance", 4, 4.0]]
    profile = {"decode": {"kernels": kernels, "total_us": 170.0, "steps": 4}}
    record = {"config": {"where": where}, "payload": {"profile": profile}}
    rows, total = efficiency_overhead.kernels_of(record, "decode")
    assert [row for row in rows if row[0] != "aten::mm"] == [("nvjet", 2, 20.0), ("_advance", 1, 1.0)]
    assert (len(rows), total) == ((2, 22.5) if where == "gpu" else (3, 42.5))


def test_first_difference():
    a, b = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[1, 2, 3, 9], [1, 5, 3, 9]])
    assert efficiency_agreement.first_difference(a, a) == [-1, -1]
    assert efficiency_agreement.first_difference(a, b) == [3, 1]


def test_what_pads_a_reply_is_no_difference():
    """A batch is as wide as its longest reply: another's length must not count against the others."""
    end, pad = 2, 0
    a = torch.tensor([[5, end, pad, pad], [5, 6, 7, 8]])
    b = torch.tensor([[5, end, pad, pad, pad], [5, 6, 7, 8, end]])
    assert efficiency_agreement.first_difference(a, b, [end]) == [-1, 4]
    assert efficiency_agreement.first_difference(a, torch.tensor([[5, 9, end, pad], [end, 6, 7, 8]]), [end, 3]) == [1, 0]
    assert efficiency_agreement.first_difference(a[:, :1], a[:, 1:2], [end]) == [0, 0]
    assert efficiency_agreement.first_difference(a, b) == [4, 4]


def test_clock_counts_marks():
    clock = Clock(CPU, (2,))
    clock.begin()
    for what in ("intake", "start", "prefill", "step", "step", "decode"):
        clock.mark(what)
    found = clock.end()
    assert found["tokens"] == 3 and set(found["ms"]) == {"1", "2"} and set(found["host_ms"]) == {"intake", "queued"}
