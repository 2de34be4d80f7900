"""compare: the paper's tables as printed, and verdicts that never pass a claim for want of a measurement."""

import math
import re

import pandas as pd
import pytest
import yaml

from dyrate_lib import compare, paths
from dyrate_lib.compare import BORNE_OUT, CANNOT_JUDGE, NOT_BORNE_OUT, PARTLY, Check, Claim
from dyrate_lib.errors import InputError, ResourceError

PAPER = ["table1", "table2", "table3", "table4a", "table4b"]


def claim(*checks):
    return Claim("X", "t", "t", "p", "n", checks)


def passing(check):
    """A quantity that meets `check`, well inside."""
    if isinstance(check.value, tuple):
        mid = sum(check.value) / 2
    else:
        mid = check.value + (1.0 if ">" in check.op else -1.0)
    return {"mean": mid, "lo": mid, "hi": mid, "n": check.min_n}


def failing(check):
    edge = check.value[1] + 1 if isinstance(check.value, tuple) else check.value + (-1.0 if ">" in check.op else 1.0)
    return {"mean": edge, "lo": edge, "hi": edge, "n": check.min_n}


@pytest.mark.parametrize("name", PAPER)
def test_every_number_stands_in_the_quoted_row(name):
    table = compare.load_paper(name)
    text = pd.read_csv(paths.data() / "paper" / f"{name}.csv", dtype=str, keep_default_na=False)
    numeric = [c for c in table.columns if pd.api.types.is_numeric_dtype(table[c])]
    assert numeric
    for _, row in text.iterrows():
        quoted = [re.sub(r"<.*?>", "", c).strip() for c in row["quoted"].split(" | ")]
        printed = [row[c] for c in numeric if row[c]]
        assert [q for q in quoted if q in printed] == printed  # each as printed, in the paper's order


def test_the_tables_hold_what_the_paper_prints():
    assert compare.load_paper("table1").shape[0] == 16
    two = compare.load_paper("table2").set_index(["model", "method"])
    assert two.loc[("LLaVA-1.5-7B", "dyrate"), ["nocaps", "flickr30k", "coco2017"]].tolist() == [75.00, 108.41, 110.54]
    assert two.loc[("LLaVA-1.5-13B", "original"), "flickr30k"] == 79.56
    three = compare.load_paper("table3").set_index(["model", "method"])
    assert three.loc[("LLaVA-1.5-7B", "dyrate"), ["tflops_percent", "latency_ms"]].tolist() == [33.33, 40.13]
    assert three.loc[("LLaVA-1.5-13B", "vtw"), "latency_ms"] == 80.78
    assert compare.load_paper("table4a").set_index("method")["nocaps"].to_dict() == {
        "greedy": 106.74,
        "beam-2": 109.06,
        "beam-5": 108.28,
        "top-p": 109.57,
    }
    assert compare.load_paper("table4b").set_index("method").loc["depth", ["nocaps", "flops_percent"]].tolist() == [105.0, 58.1]
    one = compare.load_paper("table1").set_index("model")
    assert math.isnan(one.loc["SparseVLM", "vizwiz"]) and one.loc["DyRate(ours)", "bold"] == "gqa sqa vqa pope mmb"


def test_an_unknown_table_names_the_known():
    with pytest.raises(InputError, match="table4a"):
        compare.load_paper("table9")


def test_there_is_a_claim_for_each_of_the_ten_and_every_check_is_distinct():
    all_claims = compare.claims()
    assert set(all_claims) == {*(f"C{i}" for i in range(1, 11)), "F3"}
    for c in all_claims.values():
        assert c.notebook in {p.stem for p in paths.notebooks().glob("0*.ipynb")} or re.fullmatch(r"0[1-7]_\w+", c.notebook)
        assert len({(k.id, k.quantity, k.op) for k in c.checks}) == len(c.checks)
        assert all("{" not in k.id + k.quantity for k in c.checks) and c.beyond


def test_what_is_asked_beyond_comes_only_when_asked_for():
    first, both = compare.claims(), compare.claims(beyond=True)
    own = compare.claims(paths.paper() / compare.BEYOND)
    asked_first = set(first["C10"].quantities)
    assert set(own) == {f"C{i}" for i in range(10, 16)} and list(both) == [*first, *(k for k in own if k not in first)]
    assert all(both[key] == own.get(key, first.get(key)) for key in both) and both["C10"] != first["C10"]
    for c in own.values():
        assert re.fullmatch(r"0[1-7]_\w+", c.notebook) and c.beyond and c.measured_as
        assert len({(k.id, k.quantity, k.op) for k in c.checks}) == len(c.checks)
        assert all("{" not in k.id + k.quantity and k.quantity.startswith(f"{c.id.lower()}.") for k in c.checks)
        assert all(k.min_n == 500 for k in c.checks if k.quantity not in asked_first)
    # nothing of version 1's C10 is lost or judged otherwise, and none of it decides any more
    old = {(k.quantity, k.op, k.value, k.min_n) for k in own["C10"].checks if not k.core}
    assert {(k.quantity, k.op, k.value, k.min_n) for k in first["C10"].checks} <= old
    assert not {k.quantity for k in own["C10"].checks if k.core} & asked_first
    assert set(compare.judge_all({}, beyond=True)) == set(both) and set(compare.judge_all({})) == set(first)


def test_the_scoreboard_beyond_replaces_what_it_asks_anew():
    board, more = compare.scoreboard({}), compare.scoreboard({}, beyond=True)
    assert len(more) == len(board) + 5 and set(more["claim"]) == set(compare.claims(beyond=True))
    one = {"c10.small.gqa.dyrate_minus_original": {"mean": -0.5, "lo": -1, "hi": 0.25, "n": 1000}}
    shown = compare.scoreboard(one, beyond=True)
    assert "small GQA -0.50 [-1.00, +0.25]" in shown[shown["claim"] == "C10"]["ours"].item()
    assert compare.scoreboard(one).equals(board)


def test_nothing_measured_means_nothing_judged():
    assert {v.verdict for v in compare.judge_all({}).values()} == {CANNOT_JUDGE}
    assert set(compare.scoreboard({})["verdict"]) == {CANNOT_JUDGE}
    assert compare.scoreboard({})["ours"].str.contains("not measured").all()


EVERY = [(key, beyond) for beyond in (False, True) for key in compare.claims(beyond=beyond)]


@pytest.mark.parametrize("key, beyond", EVERY)
def test_each_claim_can_come_out_every_way(key, beyond):
    c = compare.claims(beyond=beyond)[key]
    good = {}
    for k in c.checks:  # several checks may read one quantity: the strictest end must meet them all
        q = passing(k)
        if k.quantity in good:
            old = good[k.quantity]
            q = {"mean": min(old["mean"], q["mean"]), "lo": min(old["lo"], q["lo"]), "hi": min(old["hi"], q["hi"]), "n": q["n"]}
            if ">" in k.op:
                q = {"mean": k.value + 9, "lo": k.value + 9, "hi": k.value + 9, "n": q["n"]}
        good[k.quantity] = q
    assert compare.judge(c, good).verdict == BORNE_OUT
    for name in c.quantities:
        assert compare.judge(c, {k: v for k, v in good.items() if k != name}).verdict == CANNOT_JUDGE
    bad = {**good, **{k.quantity: failing(k) for k in c.checks if k.core}}
    assert compare.judge(c, bad).verdict == NOT_BORNE_OUT
    side = [k for k in c.checks if not k.core and k.quantity not in {x.quantity for x in c.checks if x.core}]
    one = side[0] if side else next(k for k in c.checks)
    verdict = compare.judge(c, {**good, one.quantity: failing(one)})
    assert verdict.verdict == PARTLY and one.id in verdict.evidence


def test_a_smoke_runs_few_pictures_judge_nothing():
    few = {q: {"mean": 0.0, "lo": 0.0, "hi": 0.0, "n": 4} for c in compare.claims().values() for q in c.quantities}
    verdicts = compare.judge_all(few)
    assert {v.verdict for v in verdicts.values()} == {CANNOT_JUDGE}
    assert "n = 4, 200 needed" in verdicts["C1"].evidence


@pytest.mark.parametrize(
    "op, value, quantity, held",
    [
        ("lo>", 0.0, {"mean": 1, "lo": 0.1, "hi": 2, "n": 9}, True),
        ("lo>", 0.0, {"mean": 1, "lo": 0.0, "hi": 2, "n": 9}, False),
        ("lo>=", 0.0, {"mean": 1, "lo": 0.0, "hi": 2, "n": 9}, True),
        ("hi<", 0.0, {"mean": -1, "lo": -2, "hi": 0.1, "n": 9}, False),
        ("hi>=", 0.0, {"mean": -1, "lo": -2, "hi": 0.0, "n": 9}, True),
        ("hi>=", 0.0, {"mean": -1, "lo": -2, "hi": -0.1, "n": 9}, False),
        ("lo<=", 0.0, {"mean": 1, "lo": 0.1, "hi": 2, "n": 9}, False),
        ("within", (0.3, 0.4), {"mean": 0.4, "n": 9}, True),
        ("within", (0.3, 0.4), {"mean": 0.401, "n": 9}, False),
        ("<=", 0.05, {"mean": 0.05, "n": 9}, True),
        ("<", 0.05, {"mean": 0.05, "n": 9}, False),
        ("lo>", 0.0, {"mean": 1, "n": 9}, None),  # no interval
        ("<=", 0.05, 0.01, None),  # a bare number says nothing of its n
        ("<=", 0.05, {"mean": 0.01}, None),
        ("<=", 0.05, {"mean": float("nan"), "n": 9}, None),
        ("hi<=", 0.05, {"mean": 0.0, "lo": -1, "hi": float("inf"), "n": 9}, None),
        ("<=", 0.05, {"mean": 0.01, "n": 8}, None),
    ],
)
def test_ops(op, value, quantity, held):
    check = Check("c", "q", op, value, core=True, min_n=9)
    assert check.outcome({"q": quantity})[0] is held


def test_an_exact_check_takes_a_bare_number():
    assert Check("c", "q", "<", 1.0, exact=True).outcome({"q": 0.5})[0] is True


def test_a_failing_core_check_beside_a_holding_one_is_partly():
    a, b = Check("a", "a", "<", 1.0, core=True, exact=True), Check("b", "b", "<", 1.0, core=True, exact=True)
    assert compare.judge(claim(a, b), {"a": 0, "b": 2}).verdict == PARTLY
    assert compare.judge(claim(a, b), {"a": 2, "b": 2}).verdict == NOT_BORNE_OUT


@pytest.mark.parametrize(
    "value", ["0.3", True, {"lo": 1}, {"mean": 1, "lo": 2}, {"mean": 1, "lo": 3, "hi": 2}, {"mean": 1, "std": 2}]
)
def test_a_malformed_quantity_is_refused(value):
    with pytest.raises(InputError):
        compare.Quantity.of(value)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"op": "=="}, "op"),
        ({"op": "within"}, "within"),
        ({"value": [0, 1]}, "within"),
        ({"cor": True}, "unknown field"),
        ({"core": False}, "core"),
    ],
)
def test_a_malformed_claims_file_is_refused(tmp_path, change, text):
    check = {"id": "a", "quantity": "q", "op": "<", "value": 1.0, "core": True, **change}
    body = {"min_n": 1, "claims": {"C1": {"title": "", "text": "", "paper": "", "notebook": "", "checks": [check]}}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(body))
    with pytest.raises(InputError, match=text):
        compare.claims(tmp_path / "c.yaml")


def test_a_missing_claims_file_is_a_clear_error(tmp_path):
    with pytest.raises(ResourceError, match=r"no\.yaml"):
        compare.claims(tmp_path / "no.yaml")


def test_the_scoreboard_covers_every_figure_and_table_and_fills_in_what_was_measured():
    board = compare.scoreboard({"c2.small.coco.fastv2_loss": {"mean": 0.012, "lo": 0.01, "hi": 0.02, "n": 500}})
    for element in ("Fig. 1", "Fig. 3", "Fig. 4", "Table I", "Table II", "Table III", "Table IVa", "Table IVb"):
        assert board["element"].str.startswith(element).any(), element
    assert board[board["claim"] == "C2"]["ours"].item() == "FastV 2 loses 1.2% [1.0%, 2.0%], VTW not measured (small)"
    assert set(board["claim"]) == set(compare.claims())


def test_the_templates_name_quantities_that_the_checks_read():
    known = {q for c in compare.claims().values() for q in c.quantities}
    for name in (compare.FIRST, compare.BEYOND):
        raw = yaml.safe_load((paths.data() / "paper" / name).read_text())
        named = {m for e in raw["elements"] for m in re.findall(r"\{([^{}:]+)", e["ours"])}
        assert named and named <= known | {q for c in compare.claims(beyond=True).values() for q in c.quantities}
        assert name == compare.BEYOND or named <= known


def test_quantities_survive_a_round_trip_and_a_clash_is_found(tmp_path):
    q = {"c6.7b.flops_share": 1e-7, "c4.7b.dyrate_over_vtw": {"mean": 0.9, "lo": 0.8, "hi": 1.0, "n": 12}}
    file = compare.save_quantities(q, "04_efficiency", tmp_path)
    before = file.read_bytes()
    assert compare.load_quantities(tmp_path) == {**q, "c6.7b.flops_share": {"mean": 1e-7}}
    assert compare.save_quantities(dict(reversed(q.items())), "04_efficiency", tmp_path).read_bytes() == before
    (tmp_path / "quantities_03_benchmarks.json").write_bytes(before)
    with pytest.raises(InputError, match="two quantities files"):
        compare.load_quantities(tmp_path)
    later = {"c11.small.late.shares_minus_step": {"mean": 1.0, "lo": 0.0, "hi": 2.0, "n": 1000}}
    assert compare.load_quantities(compare.save_quantities(later, "05_ablations", tmp_path / "later").parent) == later
    with pytest.raises(InputError, match="misspelt"):
        compare.save_quantities({"c2.smal.coco.vtw_loss": 1.0}, "03_benchmarks", tmp_path)


def test_a_quantity_is_saved_by_the_notebook_of_its_claim_alone(tmp_path):
    with pytest.raises(InputError, match="notebook 02_training to save, not for 03_benchmarks"):
        compare.save_quantities({"c5.small.t0.5.abs_error_max": {"mean": 0.01, "n": 200}}, "03_benchmarks", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_summary_line_counts_and_names():
    verdicts = compare.judge_all({})
    assert compare.summary_line(verdicts).startswith("0 of 11 claims borne out; cannot be judged here: C1, C2")


def test_side_by_side_keeps_the_papers_order_and_shows_gaps():
    paper = pd.DataFrame({"method": ["b", "a"], "cider": [1.0, 2.0]})
    ours = pd.DataFrame({"method": ["a", "random"], "cider": [3.0, 4.0]})
    both = compare.side_by_side(paper, ours, ["method"], ["cider"])
    assert both["method"].tolist() == ["b", "a", "random"]
    assert list(both.columns) == ["method", "cider paper", "cider ours"]
    assert both["cider ours"].fillna(-1).tolist() == [-1, 3.0, 4.0]
    with pytest.raises(InputError, match="several rows"):
        compare.side_by_side(pd.concat([paper, paper]), ours, ["method"], ["cider"])
    with pytest.raises(InputError, match="no column"):
        compare.side_by_side(paper, ours, ["method"], ["bleu"])
