"""Timing: known durations, prefill apart from decode, and both engines on a real (tiny) model."""

import time

import pytest
import torch

from dyrate_lib.benchmark import (
    Timing,
    generate_run,
    latency,
    latency_table,
    machine_ceilings,
    stock_run,
    time_callable,
)
from dyrate_lib.errors import InputError, ResourceError

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def sleeper(prefill, step, calls=None):
    """A stand-in engine with known times, in seconds."""

    def run(new_tokens):
        if calls is not None:
            calls.append(new_tokens)
        time.sleep(prefill + step * (new_tokens - 1))

    return run


def test_time_callable_measures_what_it_calls():
    calls = []
    timing = time_callable(lambda: (calls.append(1), time.sleep(0.01)), "cpu", warmup=2, repeats=5)
    assert len(calls) == 7 and timing.n == 5 == len(timing.samples_ms)
    assert 10 <= timing.median_ms < 100 and timing.iqr_ms >= 0


def test_timing_is_robust_against_one_slow_call():
    timing = Timing.of([10.0, 11.0, 12.0, 13.0, 900.0])
    assert (timing.median_ms, timing.iqr_ms) == (12.0, 2.0)


def test_latency_keeps_prefill_and_decode_apart():
    calls = []
    result = latency(sleeper(0.05, 0.02, calls), new_tokens=11, device="cpu", warmup=1, repeats=5, batch=2)
    assert calls == [1, 11] * 6  # alternating, the warm-up included
    assert 50 <= result["prefill_ms"] < 90
    assert 16 <= result["decode_ms_per_token"] < 35
    assert 250 <= result["end_to_end_ms"] < 400
    assert result["tokens_per_second"] == pytest.approx(2 * 11 / result["end_to_end_ms"] * 1000)
    assert (result["peak_bytes"], result["working_bytes"]) == (None, None)
    assert (result["new_tokens"], result["batch"], result["repeats"]) == (11, 2, 5)


def test_the_garbage_collector_is_on_again_after_a_failure():
    import gc

    def breaks(new_tokens):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        latency(breaks, 4, "cpu", warmup=0, repeats=1)
    assert gc.isenabled()


@pytest.mark.parametrize(
    "call",
    [
        lambda: time_callable(print, "cpu", repeats=0),
        lambda: time_callable(print, "cpu", warmup=-1),
        lambda: latency(print, new_tokens=1, device="cpu"),
        lambda: latency(print, repeats=0, device="cpu"),
        lambda: latency(print, batch=0, device="cpu"),
        lambda: latency_table({}),
    ],
)
def test_bad_input(call, capsys):
    with pytest.raises(InputError):
        call()
    assert capsys.readouterr().out == ""  # nothing was run


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    for call in (
        lambda: time_callable(print, "cuda"),
        lambda: latency(print, 4, "cuda"),
        lambda: machine_ceilings("cuda"),
    ):
        with pytest.raises(ResourceError, match="there is none"):
            call()


def test_table_with_ratios_to_the_first_row():
    base = {"new_tokens": 8, "batch": 1, "peak_bytes": None}
    rows = {
        "original": {**base, "prefill_ms": 10.0, "decode_ms_per_token": 2.0, "end_to_end_ms": 24.0},
        "FastV": {**base, "prefill_ms": 5.0, "decode_ms_per_token": 1.0, "end_to_end_ms": 12.0},
    }
    table = latency_table(rows)
    assert table.index.tolist() == ["original", "FastV"] and table.index.name == "method"
    assert table["prefill_ms_ratio"].tolist() == [1.0, 0.5] and table["end_to_end_ms_ratio"].tolist() == [1.0, 0.5]
    rows["FastV"]["new_tokens"] = 9
    with pytest.raises(InputError, match="different lengths"):
        latency_table(rows)


def test_ceilings_of_this_machine():
    result = machine_ceilings("cpu", repeats=3)
    assert 0.1 < result["copy_gb_s"] < 5000 and set(result["matmul_tflops"]) == {"float32"}
    assert 1e-4 < result["matmul_tflops"]["float32"] < 100 and result["threads"] >= 1 and result["device"]


@pytest.fixture(scope="module")
def tiny():
    from dyrate_lib import load_vlm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = load_vlm("random:tiny", device=device)
    size, n_image = model.config.vision_config.image_size, (model.config.vision_config.image_size // 14) ** 2
    ids = torch.tensor([[1, *[model.config.image_token_id] * n_image, 5, 6, 7]], device=device)
    pixels = torch.rand(1, 3, size, size, device=device, dtype=model.dtype)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("method", [None, "FastV"])
@pytest.mark.parametrize("engine", [generate_run, stock_run])
def test_engines_make_exactly_the_tokens_that_are_timed(tiny, engine, method):
    from dyrate_lib import FastV

    model, inputs = tiny
    passes = []
    hook = model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    try:
        run = engine(model, inputs, FastV(2, 0.5) if method else None)
        run(1)
        assert len(passes) == 1
        run(6)
        assert len(passes) == 7
    finally:
        hook.remove()
    result = latency(run, new_tokens=8, device=model.device, warmup=1, repeats=2)
    assert 0 < result["prefill_ms"] < result["end_to_end_ms"]


def test_stock_run_notices_a_model_that_stops_early(tiny):
    model, inputs = tiny

    class Stops:
        def generate(self, **kwargs):
            return kwargs["input_ids"]

    with pytest.raises(InputError, match="made 0 tokens where 3"):
        stock_run(Stops(), inputs)(3)


@pytest.mark.parametrize("model", ["random:tiny", "scenes-small"])
def test_bench_times_loops_in_turns_and_gives_ratios(model):
    from dyrate_lib.experiments.efficiency_bench import bench

    loops = ("graph", "reference", "stock") if model == "random:tiny" else ("reference",)
    table, about = bench(model, 2, 1, new=3, repeats=2, loops=loops, methods=("original", "fastv-2", "dyrate"), device="cpu")
    assert len(table) == (8 if model == "random:tiny" else 3) and model in about and "medians of 2" in about
    first = table[table.method == "Original"]
    assert (first["x faster than unpruned"] == 1).all() and table["end to end ms"].gt(table["prefill ms"]).all()
    if "stock" in loops:
        stock = table[table.loop == "stock generate"]
        assert stock["x faster than stock"].iloc[0] == 1 and len(stock) == 2  # FastV's context, but no DyRate's
        ratio = stock["end to end ms"].iloc[0] / table["end to end ms"]
        assert table["x faster than stock"].to_numpy() == pytest.approx(ratio.to_numpy())
    assert table["decode x floor"].gt(0).all() and table["prefill x floor"].gt(0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, "at least 1"), ({"new": 1}, "at least 2"), ({"loops": ("fast",)}, "no loop or method 'fast'"),
        ({"methods": ("fastv-2",)}, "'original'"), ({"methods": ("original", "x")}, "no loop or method 'x'"),
    ],
)  # fmt: skip
def test_bench_refuses_before_it_loads_a_model(options, says, monkeypatch):
    from dyrate_lib.experiments import efficiency_bench

    monkeypatch.setattr(efficiency_bench, "load_vlm", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=says):
        efficiency_bench.bench("random:tiny", device="cpu", **options)


def test_bench_from_the_command_line(monkeypatch, capsys):
    import pandas as pd

    from dyrate_lib.__main__ import main
    from dyrate_lib.experiments import efficiency_bench

    asked = []
    monkeypatch.setattr(efficiency_bench, "bench", lambda *a: asked.append(a) or (pd.DataFrame({"x": [1.5]}), "here"))
    assert main(["bench", "--model", "random:tiny", "--batch", "4", "--loops", "graph", "stock"]) == 0
    assert asked == [("random:tiny", 4, 1, 64, 5, ["graph", "stock"], ["original", "fastv-2", "vtw", "dyrate"], None)]
    assert "| 1.50 |" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["bench", "--batch", "0", "--device", "cpu"]) == 2 and "at least 1" in capsys.readouterr().err


def test_where_the_reference_loop_spends_its_time():
    from dyrate_lib.experiments.efficiency_bench import bench_profile

    table = bench_profile("random:tiny", new=18)
    assert {"matrix products", "attention", "other"} <= set(table.operators)
    assert table[["prompt's pass, %", "decode steps, %"]].sum().to_numpy() == pytest.approx(100, abs=0.5)


@gpu
@needs_gpu
def test_gpu_work_is_waited_for_and_memory_counted():
    a = torch.randn(4096, 4096, device="cuda")
    timing = time_callable(lambda: [a @ a for _ in range(20)], repeats=3)
    assert timing.median_ms > 1  # queueing alone takes far less
    result = latency(lambda n: torch.empty(n * 2**20, dtype=torch.uint8, device="cuda"), new_tokens=64, repeats=2)
    assert result["working_bytes"] == 64 * 2**20 and result["peak_bytes"] > result["working_bytes"]
    ceilings = machine_ceilings()
    assert set(ceilings["matmul_tflops"]) == {"bfloat16", "float32"} and ceilings["copy_gb_s"] > 50
