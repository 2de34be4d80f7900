"""The contradictions' arithmetic, and the verdict notebook's tables."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dyrate_lib import accounting, compare, load_vlm, model_info
from dyrate_lib.errors import RecordError
from dyrate_lib.experiments import contradictions, open_study, verdict


@pytest.fixture
def study(tmp_path):
    """A smoke study of the tiny model; nothing is computed by opening it."""
    return open_study(
        "07_verdict", scale="smoke", records="fresh", out=str(tmp_path), model_small="random:tiny", model_base="random:tiny",
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_dimensions_are_those_of_the_model(size):
    built = model_info(load_vlm(f"random:llava-1.5-{size}", device="meta")[0])
    written = contradictions.llava_info(size)
    assert {k: v for k, v in vars(built).items() if k != "name"} == {
        k: v for k, v in vars(written).items() if k != "name"
    }


@pytest.mark.parametrize(("layer", "rate", "text"), [(2, 0.5, 0), (3, 0.5, 64), (16, 1.0, 40)])
def test_prefill_ratio_is_the_accounting_of_one_pass(layer, rate, text):
    info = contradictions.llava_info("7b")
    kept = np.full((1, info.n_layers), 576)
    kept[:, layer:] = round(576 * (1 - rate))
    expected = accounting.flops(info, text + 576, 576, kept, "paper-prefill").ratio
    assert contradictions.prefill_ratio(info, layer, rate, text) == pytest.approx(expected, rel=1e-12)


def test_vtw_on_13b_by_hand():
    # without text tokens nothing is left from layer 16 of 40 on
    assert contradictions.prefill_ratio(contradictions.llava_info("13b"), 16, 1.0, 0) == pytest.approx(16 / 40)


def test_text_length_is_the_inverse_of_the_ratio():
    info = contradictions.llava_info("7b")
    ratio = float(contradictions.prefill_ratio(info, 2, 0.5, 50))
    assert contradictions.text_length_for(info, 2, 0.5, ratio) == pytest.approx(50, abs=1e-6)
    assert np.isnan(contradictions.text_length_for(info, 2, 0.5, 0.30))


def test_the_facts_that_method_and_tables_give():
    found = {c.where: c.numbers for c in contradictions.contradictions()}
    assert found["Eq. 3"] == {"printed_r1": 0, "text_r1": 576, "printed_r10": 518, "text_r10": 58}
    assert found["Table II, 7B rows"]["as_printed"] == pytest.approx(abs(74.89 - 105.5) + abs(105.57 - 74.9))
    assert found["Table II, 7B rows"]["swapped"] < 0.1
    assert found["Table III, 7B rows"]["step_max"] <= 1.6 < found["Table III, 7B rows"]["step_printed"]
    three = [found["Table III, 7B rows"][k] for k in ("fastv2", "fastv3", "vtw")]
    assert max(three) - min(three) > 25
    assert found["Table III, 13B rows"]["vtw13_text100"] < 49
    assert found["Tables I and II, bold"]["wrong"] == 6


def test_latency_arithmetic_by_hand():
    a = contradictions.latency_arithmetic()
    assert a["image_kv_7b"] == 2 * 32 * 4096 * 576 * 2
    assert a["weights_7b"] == pytest.approx(13.5e9, rel=0.01)
    assert a["saving_7b"] == pytest.approx(0.022, abs=0.001)
    assert round(a["parity_batch_7b"]) == 45
    assert a["gain_7b"] == pytest.approx(70.80 / 40.13)


def test_wrong_bold_names_column_and_best():
    table = contradictions.wrong_bold("table2").set_index("column")
    assert table.loc["flickr30k", "best"] == 79.56 and table.loc["flickr30k", "best by"] == "Original"
    assert "nocaps" not in table.index


def test_without_quantities_nothing_is_judged():
    table = verdict.verdict_table({})
    assert list(table.claim) == list(compare.claims())
    assert set(table.verdict) == {compare.CANNOT_JUDGE}
    assert set(verdict.check_table({}).outcome) == {"cannot be judged"}
    assert "0 of 11 claims borne out" in verdict.verdict_line({})
    said = verdict.missing_line({})
    assert said.startswith("cannot be judged from these records: ") and all(name in said for name in compare.claims())


def test_tables_follow_the_checks():
    measured = {f"c6.{key}.flops_share": {"mean": 1e-6} for key in ("small", "base", "7b", "13b")}
    measured |= {f"c6.{key}.time_share": {"mean": 0.01, "lo": 0.009, "hi": 0.011, "n": 10} for key in ("7b", "13b")}
    measured |= {f"c6.{key}.share_of_saving": {"mean": 1e-4, "n": 500} for key in ("small", "base")}
    table = verdict.verdict_table(measured).set_index("claim")
    assert table.loc["C6", "verdict"] == compare.BORNE_OUT
    checks = verdict.check_table(measured)
    assert set(checks[checks.claim == "C6"].outcome) == {"holds"}
    measured["c6.7b.time_share"] = {"mean": 0.03, "lo": 0.02, "hi": 0.04, "n": 10}
    assert verdict.verdict_table(measured).set_index("claim").loc["C6", "verdict"] == compare.PARTLY
    board = verdict.board(measured)
    assert set(board.claim) <= set(compare.claims()) and len(board) >= 10


def test_figure_has_a_bar_for_every_outcome():
    fig = verdict.verdict_figure({})
    assert len(fig.axes[0].patches) == 3 * len(compare.claims())
    plt.close(fig)


def test_saved_quantities_must_agree(study):
    measured = {"c6.7b.flops_share": {"mean": 1e-6}}
    line = verdict.check_saved(study, measured)
    compare.save_quantities(measured, "04_efficiency", study.tables)
    assert verdict.check_saved(study, measured) == line  # nbval reads it: what ran before must not show
    with pytest.raises(RecordError, match="the records give"):
        verdict.check_saved(study, {"c6.7b.flops_share": {"mean": 2e-6}})
    with pytest.raises(RecordError, match="not in the records"):
        verdict.check_saved(study, {})


def test_every_source_has_quantities():
    import importlib

    for module in verdict.SOURCES.values():
        assert callable(importlib.import_module(f"dyrate_lib.experiments.{module}").quantities)


def test_contradiction_table_is_text_only():
    table = contradictions.contradiction_table()
    assert list(table) == ["where", "printed", "against", "arithmetic"] and len(table) >= 12
    assert table.map(lambda text: isinstance(text, str) and bool(text)).to_numpy().all()
