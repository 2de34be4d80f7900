"""The sheet of hours and memory: its arithmetic, its sources, and the README's table, which is this one."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib import InputError, ResourceError, marks, paths, plan
from dyrate_lib.__main__ import main
from dyrate_lib.accounting import flops
from dyrate_lib.dimensions import llava_dimensions
from dyrate_lib.experiments.scales import SCALES
from dyrate_lib.lmms.benchmarks import BENCHMARKS
from dyrate_lib.memory import CONTEXT, training_memory


def test_the_readme_holds_this_very_table():
    """Written by `python -m dyrate_lib plan --write README.md`; new records or scales need it written anew."""
    assert marks.read(paths.root() / "README.md", plan.MARK) == plan.sheet()


def test_rates_of_7b_are_the_records_medians():
    record, source = plan._timed()
    assert source == "`latency` 7b:16:576, H200" and record["config"]["batch"] == plan.BATCH
    rate = plan.reply_rate("7b")
    walls = record["payload"]["contenders"]["reference original"]["samples"]["wall_ms"]
    assert rate.measured and rate.seconds["original", 64] == pytest.approx(np.median(walls) / 16_000)
    assert 10 < 1 / rate.seconds["original", 64] < 13  # "about 11 captions a second"
    assert rate.seconds["original", 16] < rate.seconds["original", 64]
    fast = plan.reply_rate("7b", "graph")
    assert all(fast.seconds[key] < rate.seconds[key] for key in rate.seconds)
    assert 14.1e9 < rate.memory < 24e9  # weights and more, on a card of 24 GB


def test_rates_of_13b_are_estimates_from_them():
    small, large = plan.reply_rate("7b"), plan.reply_rate("13b")
    info = llava_dimensions("13b"), llava_dimensions("7b")
    ratio = [float(flops(i, 640, 576, np.full((64, i.n_layers), 576))) for i in info]
    assert not large.measured and "by the ratio of FLOPs" in large.source
    assert plan._timed("13b")[1] == "`latency` 13b:16:576, H200"  # the graph engine's are measured
    walls = plan._timed("13b")[0]["payload"]["contenders"]["graph dyrate"]["samples"]["wall_ms"]
    fast = plan.reply_rate("13b", "graph")
    assert fast.measured and fast.seconds["dyrate", 64] == pytest.approx(np.median(walls) / 16_000)
    assert large.seconds["dyrate", 64] / small.seconds["dyrate", 64] == pytest.approx(ratio[0] / ratio[1])
    assert 26.7e9 < large.memory < 40e9
    counted, timed = plan.size_ratio()
    assert counted == pytest.approx(ratio[0] / ratio[1]) and timed == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("size", plan.SIZES)
def test_flops_of_a_training_step_by_hand(size):
    info = llava_dimensions(size)
    products, exact = plan.training_step_flops(info, 1)
    rows, d, m, later = 576 + 64 + 64, info.hidden, info.mlp, info.n_layers - 2
    row = 2 * d * (4 * d + 3 * m)
    attention = 4 * d * rows**2
    language = rows * row * (info.n_layers + 2 * later) + 2 * attention
    head = 2 * 64 * 2 * d * info.vocab
    vision = products - language - head
    assert exact == later * attention * 4
    assert 0.3e12 < vision < 0.5e12  # CLIP ViT-L/14 at 336 px and the projector
    assert plan.training_step_flops(info, 12)[0] == pytest.approx(12 * products)
    limits = {"copy_gb_s": 4000.0, "matmul_tflops": {"bfloat16": 800.0, "float32": 50.0}}
    seconds = plan.training_seconds(info, 12, limits)
    assert seconds > 12 * products / 800e12 + 12 * exact / 50e12
    faster = {"copy_gb_s": 8000.0, "matmul_tflops": {"bfloat16": 1600.0, "float32": 100.0}}
    assert plan.training_seconds(info, 12, faster) == pytest.approx(seconds / 2)


def test_counts_are_of_the_studys_own_lists():
    rows, scale = plan.evaluations(), SCALES["full"]
    assert len({name for name, _ in rows}) == len(rows) == 20 and sum(ours for _, ours in rows) == 5
    items = sum(b.items for b in BENCHMARKS.values())
    assert items == 50_117
    for size in plan.SIZES:
        by_name = {stage.name: stage for stage in plan.stages(size)}
        assert by_name["lmms-eval, captions"].count + by_name["lmms-eval, short answers"].count == len(rows) * items
        trained = by_name["predictors (02)"]
        assert trained.count == 9 * scale.train_steps and trained.parts == 9 and not trained.measured
        info = llava_dimensions(size)
        assert trained.memory == training_memory(info, scale.train_batch, layer=2, checkpoint=True).total + CONTEXT
        every, dyrate = plan.study_replies(size)
        assert by_name["the study's replies (02, 03, 05)"].count == every > dyrate > 0 and every % 50 == 0


@given(st.floats(1, 1e7), st.one_of(st.none(), st.integers(1, 50)), st.integers(1, 64))
def test_hours_of_whole_parts(seconds, parts, gpus):
    stage = plan.Stage("x", 1, "steps", seconds, parts, 0, True, "")
    assert stage.hours(1) == pytest.approx(seconds / 3600)
    ideal = seconds / 3600 / gpus
    assert stage.hours(gpus) >= ideal * (1 - 1e-9) and stage.hours(gpus) <= stage.hours(1) * (1 + 1e-9)
    if parts is None:
        assert stage.hours(gpus) == pytest.approx(ideal)
    else:
        rounds = stage.hours(gpus) * 3600 / (seconds / parts)
        assert rounds == pytest.approx(math.ceil(parts / gpus))


def test_the_table_adds_up_and_names_its_sources():
    table = plan.plan_table(("7b",), 8)
    stages, total = table[table.stage != "all"], table[table.stage == "all"].iloc[0]
    for column in ("one GPU, h", "8 GPUs, h", "8 GPUs, graph engine, h"):
        assert stages[column].sum() == pytest.approx(total[column])
    assert stages.rate.str.startswith(("measured: `latency` 7b:16:576", "estimated: ")).all()
    nine = stages[stages.stage == "predictors (02)"].iloc[0]
    assert nine["8 GPUs, h"] == pytest.approx(nine["one GPU, h"] * 2 / 9)  # nine trainings on eight GPUs are two rounds
    assert (stages["8 GPUs, graph engine, h"] <= stages["8 GPUs, h"]).all()
    study = stages[stages.stage.str.startswith("the study")].iloc[0]  # always by the same loop
    assert study["8 GPUs, graph engine, h"] == study["8 GPUs, h"] and "(" not in study["a second"]


def test_bad_requests_and_missing_records(monkeypatch, capsys):
    assert main(["plan", "--gpus", "0"]) == 2 and "gpus=0" in capsys.readouterr().err
    for call in (lambda: plan.reply_rate("3b"), lambda: plan.reply_rate("7b", "stock"), lambda: plan.plan_table(gpus=True)):
        with pytest.raises(InputError):
            call()
    monkeypatch.setattr(plan, "_counted", dict)
    with pytest.raises(ResourceError, match="no replies of scenes-small"):
        plan.study_replies("7b")
    monkeypatch.setattr("dyrate_lib.experiments.efficiency_cells.record_of", lambda *args: None)
    monkeypatch.setattr(plan, "_timed", plan._timed.__wrapped__)
    with pytest.raises(ResourceError, match="no record of 7b:16:576"):
        plan.reply_rate("7b")


def test_the_command_writes_between_the_marks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "sheet", lambda sizes=plan.SIZES, gpus=8: f"{sizes} on {gpus}")
    assert main(["plan", "--model", "7b", "--gpus", "4"]) == 0 and capsys.readouterr().out == "('7b',) on 4\n"
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- plan -->\nold\n<!-- /plan -->\nafter\n")
    assert main(["plan", "--write", str(file)]) == 0
    assert file.read_text() == "before\n<!-- plan -->\n('7b', '13b') on 8\n<!-- /plan -->\nafter\n"
    for text in ("none", "<!-- /plan --><!-- plan -->", "<!-- plan --><!-- plan --><!-- /plan -->"):
        file.write_text(text)
        assert main(["plan", "--write", str(file)]) == 2 and "each once" in capsys.readouterr().err
        assert file.read_text() == text
    assert main(["plan", "--write", str(tmp_path / "none.md")]) == 2
