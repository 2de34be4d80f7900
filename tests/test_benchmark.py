"""Timing of known durations, ceilings, and the `bench` command on real (tiny) models."""

import time

import pytest
import torch

from dyrate_lib.benchmark import Timing, machine_ceilings, time_callable
from dyrate_lib.errors import InputError, ResourceError

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_time_callable_measures_what_it_calls():
    calls = []
    timing = time_callable(lambda: (calls.append(1), time.sleep(0.01)), "cpu", warmup=2, repeats=5)
    assert len(calls) == 7 and timing.n == 5 == len(timing.samples_ms)
    assert 10 <= timing.median_ms < 100 and timing.iqr_ms >= 0


def test_timing_is_robust_against_one_slow_call():
    timing = Timing.of([10.0, 11.0, 12.0, 13.0, 900.0])
    assert (timing.median_ms, timing.iqr_ms) == (12.0, 2.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: time_callable(print, "cpu", repeats=0),
        lambda: time_callable(print, "cpu", warmup=-1),
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
        lambda: machine_ceilings("cuda"),
    ):
        with pytest.raises(ResourceError, match="there is none"):
            call()


def test_ceilings_of_this_machine():
    result = machine_ceilings("cpu", repeats=3)
    assert 0.1 < result["copy_gb_s"] < 5000 and set(result["matmul_tflops"]) == {"float32"}
    assert 1e-4 < result["matmul_tflops"]["float32"] < 100 and result["threads"] >= 1 and result["device"]


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
        ({"device": "gpu"}, "no device 'gpu'"),
    ],
)  # fmt: skip
def test_bench_refuses_before_it_loads_a_model(options, says, monkeypatch):
    from dyrate_lib.experiments import efficiency_bench

    monkeypatch.setattr(efficiency_bench, "load_vlm", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=says):
        efficiency_bench.bench("random:tiny", **{"device": "cpu", **options})


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


def test_the_profile_is_of_what_is_benchmarked(monkeypatch, capsys):
    import pandas as pd

    from dyrate_lib.__main__ import main
    from dyrate_lib.experiments import efficiency_bench
    from dyrate_lib.experiments.efficiency_clock import latency_inputs
    from dyrate_lib.loading import load_vlm

    asked = []
    monkeypatch.setattr(efficiency_bench, "bench", lambda *a: (pd.DataFrame({"x": [1.5]}), "here"))
    monkeypatch.setattr(efficiency_bench, "load_vlm", lambda name, **k: asked.append((name, k)) or load_vlm(name, **k))
    monkeypatch.setattr(efficiency_bench, "latency_inputs", lambda *a: asked.append(a[2:]) or latency_inputs(*a))
    assert main(["bench", "--model", "random:tiny", "--batch", "2", "--pictures", "3", "--device", "cpu", "--profile"]) == 0
    assert asked == [("random:tiny", {"device": "cpu"}), (2, 3)]
    assert "by kind of operator (random:tiny, 2 prompt(s), FastV)" in capsys.readouterr().out
    # without a model the same one is chosen as for the table
    chosen = [efficiency_bench.subject(None, device) for device in ("cuda", "cpu")]
    assert chosen == ["random:llava-1.5-7b", "scenes-small"]


@gpu
@needs_gpu
def test_gpu_work_is_waited_for():
    a = torch.randn(4096, 4096, device="cuda")
    timing = time_callable(lambda: [a @ a for _ in range(20)], repeats=3)
    assert timing.median_ms > 1  # queueing alone takes far less
    ceilings = machine_ceilings()
    assert set(ceilings["matmul_tflops"]) == {"bfloat16", "float32"} and ceilings["copy_gb_s"] > 50
