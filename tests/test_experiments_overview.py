"""Notebook 07 as a paper: verdicts and what they hang on, sentences, the overview figure, commands, computing time."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import shlex
import warnings
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from dyrate_lib import __main__ as cli
from dyrate_lib import compare, paths, plotting
from dyrate_lib.compare import BORNE_OUT, CANNOT_JUDGE, NOT_BORNE_OUT, PARTLY, judge
from dyrate_lib.criteria import Check, Claim
from dyrate_lib.errors import InputError, ResourceError
from dyrate_lib.experiments import (
    claim_words,
    computing_time,
    conditions,
    open_study,
    original_weights,
    overview,
    overview_data,
    paper_sections,
    paper_verdicts,
    paper_words,
    reading,
)
from dyrate_lib.experiments.context import data_specs
from dyrate_lib.experiments.efficiency_bench import METHODS as TIMED
from dyrate_lib.lmms.__main__ import _parser as lmms_parser
from dyrate_lib.lmms.benchmarks import BENCHMARKS, GROUP
from dyrate_lib.lmms.settings import build_method, read_settings
from dyrate_lib.notebooks import check_parameters, notebook_parameters
from dyrate_lib.store import Store, get_or_run

from .made_quantities import planted, plausible

CLAIMS = paper_verdicts.all_claims()


@pytest.fixture
def study(tmp_path):
    return open_study(
        "07_verdict", scale="smoke", records="fresh", out=str(tmp_path), model_small="random:tiny", model_base="random:tiny",
        progress=False,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("key", CLAIMS)
def test_each_verdict_shows_where_it_is_planted(key):
    claim = CLAIMS[key]
    for holds, verdict in ((True, BORNE_OUT), (False, NOT_BORNE_OUT)):
        measured = planted(claim, holds)
        row = overview_data.strip_data(measured).set_index("claim").loc[key]
        assert row.verdict == verdict
        assert paper_verdicts.verdict_table(measured).set_index("claim").loc[key, "verdict"] == verdict
        assert f"**Verdict: {verdict}.**" in paper_sections.section(claim, measured, paths.figures())
    lacking = dict(list(planted(claim, True).items())[1:])
    assert paper_verdicts.verdicts(lacking)[key].verdict == CANNOT_JUDGE
    assert overview_data.strip_data(lacking).set_index("claim").loc[key].shown == "not measured"


def test_partly_and_what_it_would_be_for_one_model():
    claim = CLAIMS["C9"]
    measured = planted(claim, {name: ".base." not in name for name in claim.quantities})
    assert judge(claim, measured).verdict == PARTLY
    assert paper_verdicts.by_condition(claim, measured) == {"model": {"small": BORNE_OUT, "base": NOT_BORNE_OUT}}
    assert paper_verdicts.conditions_line(claim, measured) == "small alone: borne out; base alone: not borne out"
    assert ".base." in paper_verdicts.decisive(claim, measured).quantity
    whole = paper_verdicts.conditions_line(claim, planted(claim, True))
    assert whole == "the same for every model alone"


def check(name, op, value, core=True):
    return Check(f"check of {name}", name, op, value, core, min_n=10)


@pytest.mark.parametrize(
    ("op", "value", "expected"),
    [(">=", 3.0, 1.0), ("<=", 1.0, 1.0), ("lo>", 0.0, -1.0), ("lo>=", 2.0, 1.0), ("hi<", 5.0, -1.0), ("hi>=", 6.0, 2.0),
     ("within", (2.5, 9.0), 0.5), ("within", (0.0, 1.5), 0.5)],
)  # fmt: skip
def test_shortfall_by_hand(op, value, expected):
    measured = {"q": {"mean": 2.0, "lo": 1.0, "hi": 4.0, "n": 10}}
    assert paper_verdicts.shortfall(check("q", op, value), measured) == pytest.approx(expected)
    assert paper_verdicts.shortfall(check("q", op, value), {"q": {"mean": 2.0, "lo": 1.0, "hi": 4.0, "n": 9}}) is None


def test_the_decisive_check_is_the_worst_of_the_first_kind_that_fails():
    names = ["x.small.coco.gain", "x.base.coco.gain", "x.small.coco.cost"]
    checks = (check(names[0], "lo>=", -0.05), check(names[1], "lo>=", -0.05), check(names[2], "<=", 1.0, core=False))
    claim = Claim("C1", "t", "t", "p", "01_attention_analysis", checks)

    def measured(*values):
        return {name: {"mean": v, "lo": v, "hi": v, "n": 10} for name, v in zip(names, values, strict=True)}

    assert paper_verdicts.decisive(claim, measured(-0.1, -0.3, 9.0)) is checks[1]
    assert paper_verdicts.decisive(claim, measured(-0.1, 0.3, 9.0)) is checks[0]
    assert paper_verdicts.decisive(claim, measured(0.1, 0.3, 9.0)) is checks[2]
    assert paper_verdicts.decisive(claim, measured(0.1, 0.0, 0.0)) is checks[1]  # all hold: the nearest to its criterion
    line = paper_verdicts.turning_points(claim, measured(-0.1, -0.3, 9.0))
    assert line == [
        "2 of 2 fail interval at or above -0.05; the criterion would have to be -0.3 (check of x.base.coco.gain)"
    ]
    moved = Claim("C1", "t", "t", "p", "01_attention_analysis", tuple(check(n, "lo>=", -0.3) for n in names[:2]))
    assert judge(moved, measured(-0.1, -0.3, 9.0)).verdict == BORNE_OUT  # the line is true
    counted = paper_verdicts.counts(claim, measured(-0.1, 0.3, 9.0))
    assert [(c.core, c.held, c.of) for c in counted] == [(True, 1, 2), (False, 0, 1)]
    assert "-0.1" in counted[0].line


def test_every_claim_has_its_words_and_figures():
    for words in (claim_words.QUESTIONS, claim_words.SHORT, claim_words.FIGURES):
        assert set(words) == set(CLAIMS)
    assert max(map(len, claim_words.SHORT.values())) <= 30
    assert list(CLAIMS)[-1] == "F3" and list(CLAIMS)[:11] == [f"C{i}" for i in range(1, 12)]
    for key in ("C1", "C2", "C4", "C5", "C7", "C8", "C9", "F3"):  # drawn and committed
        assert paper_sections.links(key, paths.figures())
    for claim in CLAIMS.values():
        for one in claim.checks:
            assert overview_data.number_name(one.quantity)[0]


# ---------------------------------------------------------------------------------------------------------- sentences


def test_without_quantities_every_sentence_says_so():
    said = paper_words.abstract({})
    for text in said.split("\n\n")[1:]:
        assert "not measured" in text and not any(c in text for c in "[]")
    assert "11 cannot be judged here" in said


def test_sentences_follow_the_numbers():
    many = plausible()
    before = paper_words.attention_sentence(many)
    better = {"mean": 9.0, "lo": 5.0, "hi": 13.0, "n": 1000}
    turned = many | {name: better for name in paper_words.cells("c11.{model}.{set}.shares_minus_step")}
    assert "the step number alone: better in 6 of 6" in paper_words.attention_sentence(turned) != before
    few = {name: better | {"n": 4} for name in turned}
    assert paper_words.estimates(few, paper_words.cells("c11.{model}.{set}.share_of_gap")) == []
    assert "not measured" in overview.recovered_line(few) and "6 of 6 cells" in overview.recovered_line(many)
    assert "better in 0 of 6, on too few pictures to say in 6" in paper_words.attention_sentence(few)
    share = {"q": {"mean": -0.135, "lo": -0.2, "hi": -0.1, "n": 7}}
    assert paper_words.told(share, "q", "+.1%") == "-13.5% [-20.0%, -10.0%] (n = 7)"


@pytest.mark.parametrize(("lo", "hi", "word"), [(0.1, 2, "better"), (-2, -0.1, "worse"), (-1, 1, "undecided")])
def test_direction_is_the_intervals(lo, hi, word):
    name = "c11.small.coco.shares_minus_step"
    assert paper_words.direction({name: {"mean": (lo + hi) / 2, "lo": lo, "hi": hi, "n": 500}}, name) == word
    assert paper_words.direction({name: {"mean": (lo + hi) / 2, "lo": lo, "hi": hi, "n": 499}}, name) == "too few"


# ------------------------------------------------------------------------------------------------------------- figure


@pytest.mark.parametrize("measured", [{}, plausible(), {k: v for k, v in plausible().items() if "base" not in k}])
def test_overview_is_drawn_whatever_is_missing(measured):
    plotting.style()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = overview.overview(measured)
        fig.canvas.draw()
    assert fig.get_size_inches()[0] <= 7.2 and fig.get_size_inches()[1] <= 4.0
    texts = [t for ax in fig.axes for t in ax.texts] + list(fig.texts)
    assert min(t.get_fontsize() for t in texts) >= 6.0
    page = fig.bbox
    for text in [*texts, *(label for ax in fig.axes for label in ax.get_yticklabels())]:
        box = text.get_window_extent()
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, text.get_text()
    strip = fig.axes[0]
    numbers = [t for t in strip.texts if t.get_position()[0] == overview._NUMBER]
    ends = max(t.get_window_extent().x1 for t in numbers)
    assert ends < fig.axes[1].get_position().x0 * page.width  # no word of the strip in the panels
    said = " ".join(t.get_text() for t in texts)
    told = overview_data.input_data(measured)
    assert ("not measured" in said) == (not measured or len(told) < 24)
    plt.close(fig)


def test_strip_counts_every_check():
    data = overview_data.strip_data(plausible())
    for row in data.to_dict("records"):
        sums = sum(row[f"{kind} {name}"] for kind in ("core", "other") for name in ("hold", "fail", "unknown"))
        assert sums == len(CLAIMS[row["claim"]].checks)
    assert overview.tally(data).startswith(f"{(data.verdict == BORNE_OUT).sum()} of 16 claims borne out")


def test_shown_number_has_estimate_interval_case_and_criterion():
    one = next(c for c in CLAIMS["C13"].checks if c.quantity == "c13.base.late.final_against_reversible")
    q = {one.quantity: {"mean": -0.105, "lo": -0.125, "hi": -0.085, "n": 1000}}
    assert overview_data.shown_number(one, q) == "to reversible −10.5 % [−12.5, −8.5] base late (≥ −5)"
    assert overview_data.shown_number(one, {one.quantity: {**q[one.quantity], "n": 4}}) == "too few to judge (n = 4)"


def test_inputs_from_quantities_are_differences_to_a_constant():
    head = "c11.small.late"
    measured = {
        f"{head}.shares_minus_none": {"mean": 10.0, "lo": 5.0, "hi": 15.0, "n": 9},
        f"{head}.shares_minus_step": {"mean": 4.0, "lo": 1.0, "hi": 7.0, "n": 9},
    }
    data = overview_data.input_data(measured).set_index("fed with")
    assert set(data.index) == {"shares", "step"}
    assert data.loc["step", "mean"] == 6.0 and np.isnan(data.loc["step", "lo"])  # of a difference of two, the interval is unknown
    assert data.loc["shares", ["lo", "hi"]].tolist() == [5.0, 15.0]


def test_inputs_from_records_have_intervals(study, monkeypatch):
    values = {"none": 0.0, "shares": 3.0, "oracle": 8.0, "foreign": 1.0, "step": 2.0}
    numbers = SimpleNamespace(
        cells=lambda s: [("small", "late")], fed=lambda s, key, role, kind: SimpleNamespace(equal=np.full(5, values[kind])),
        difference=lambda s, a, b: {"mean": float((a - b).mean()), "lo": (a - b).min(), "hi": (a - b).max(), "n": 5},
    )  # fmt: skip
    controls = SimpleNamespace(inputs=lambda s: tuple(values))
    monkeypatch.setattr(overview_data, "part", {"controls_numbers": numbers, "controls": controls}.get)
    data = overview_data.input_data({}, study).set_index("fed with")
    assert data["mean"].to_dict() == {k: v for k, v in values.items() if k != "none"} and data.lo.notna().all()


# --------------------------------------------------------------------------------------------------------- conditions


def test_conditions_without_the_experiment_or_its_records(study, monkeypatch):
    monkeypatch.setattr(conditions, "part", lambda name: None)
    long, wide, why = conditions.conditions(study)
    assert not len(long) and not len(wide) and "no such experiment" in why

    def data(there):
        return get_or_run("nothing", {}, lambda: 1, store=there.store)

    monkeypatch.setattr(conditions, "part", lambda name: SimpleNamespace(data=data, table=data))
    said = conditions.conditions(study)[2]
    assert "not measured: no record nothing/" in said and str(study.out) not in said and "tmp" not in said


def test_changes_name_the_conditions_that_turn_a_conclusion_round():
    rows = [("A", "late", "small", name, outcome) for name, outcome in
            (("as above", "holds"), ("P = 1", "holds"), ("P = 3", "does not"), ("5 rates", "undecided"))]  # fmt: skip
    long = pd.DataFrame(rows, columns=["conclusion", "set", "model", "condition", "outcome"])
    assert conditions.changes(long, ["A"]) == (
        "the conclusion turns round in 1 of 3 cells under other conditions: 'A' holds on late (small), but does not under P = 3"
    )
    assert "in none of 3 cells" in conditions.changes(long.assign(outcome="holds"), ["A"])
    assert conditions.changes(long, ["B"]) == ""


# ------------------------------------------------------------------------------------------------------------- reading


def test_gather_reads_what_the_notebooks_saved(study):
    assert reading.gather(study) == {}
    compare.save_quantities({"c7.best_minus_worst": {"mean": 1.0, "lo": 0.0, "hi": 2.0, "n": 4}}, "05_ablations", study.tables)
    assert set(reading.gather(study)) == {"c7.best_minus_worst"}
    assert reading.figures_folder(study) == study.figures
    shipped = open_study("07_verdict", out=str(study.out), progress=False)
    assert reading.is_shipped(shipped) and reading.gather(shipped) == compare.load_quantities(paths.figures())


def test_a_part_that_is_not_there_is_none_but_a_broken_one_is_an_error(monkeypatch):
    assert reading.part("no_such_part") is None
    assert reading.part("attention").__name__.endswith("attention")

    def broken(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError):
        reading.part("attention")


# ------------------------------------------------------------------------------------------------------ computing time


def test_seconds_count_once_for_the_first_notebook_that_asks(study, monkeypatch):
    def made(name, seconds):
        return study.record(name, {}, lambda: {}, about={"device": "made-up GPU", "seconds": seconds})

    shared, own = lambda s: s.record("shared", {}, dict), lambda s: s.record("own", {}, dict)
    made("shared", 60.0), made("own", 30.0)
    lacking = lambda s: s.record("lacking", {}, dict)  # noqa: E731
    parts = {
        "a": SimpleNamespace(compute=lambda s: [shared(s)]),
        "b": SimpleNamespace(compute=lambda s: [shared(s), own(s), lacking(s)]),
    }
    monkeypatch.setattr(computing_time, "part", parts.get)
    monkeypatch.setattr(computing_time, "PARTS", {"01_first": ("a", "not there"), "02_second": ("b",)})
    data = computing_time.spent(study).set_index("notebook")
    assert data.loc["01_first", ["seconds", "complete"]].tolist() == [60.0, "yes"]
    assert data.loc["02_second", ["seconds", "complete"]].tolist() == [30.0, "no"]
    table = computing_time.time_table(data.reset_index())
    assert table[table.notebook == "sum"].minutes.tolist() == [1.5]
    line = computing_time.limit_line(data.reset_index(), limit=1.0)
    assert line.startswith("made-up GPU: 1.5 min, 0.5 over the 1 asked for") and "02_second" in line
    assert not Store(study.store.root).records("lacking")  # nothing was computed


# ----------------------------------------------------------------------------------------------------------- commands


def lmms_eval_parsed(rest, command):
    """Options of lmms-eval that the commands use, each with a value."""
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    assert set(options) == {"--tasks", "--batch_size", "--output_path", "--model_args"}, command
    assert all(task in (*BENCHMARKS, GROUP) for task in options["--tasks"].split(","))
    settings = read_settings(**dict(part.split("=", 1) for part in options["--model_args"].split(",")))
    assert settings.pretrained in (original_weights.MODEL_7B, original_weights.MODEL_13B)
    if settings.predictor is None:
        assert build_method(settings).name == settings.method
    else:
        assert settings.method == "dyrate"


@pytest.mark.parametrize("command", original_weights.commands())
def test_every_command_parses_with_the_real_parsers(command):
    words = shlex.split(command)
    assert words[0] == "python"
    if words[1] == "-c":
        tree = ast.parse(words[2])
        for node in (n for n in tree.body if isinstance(n, ast.ImportFrom)):
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
        call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "train_predictor")
        from dyrate_lib.training import train_predictor

        given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        inspect.signature(train_predictor).bind("model", "processor", "dataset", **given)
        return
    assert words[1] == "-m"
    if words[2] == "dyrate_lib.lmms":
        args, rest = lmms_parser().parse_known_args(words[3:])
        if args.command == "eval":
            lmms_eval_parsed(rest, command)
        else:
            assert not rest
        return
    assert words[2] == "dyrate_lib"
    args = cli._parser().parse_args(words[3:])
    if args.command == "run":
        given = dict(args.parameter)
        check_parameters(args.notebook, given)
        data_specs(given["data"])
    else:
        assert args.command == "bench" and set(args.methods) <= set(TIMED)


def test_a_method_with_a_schedule_of_its_own_needs_no_predictor():
    settings = read_settings(pretrained="some/model", method="relook", layer=2, rates="[0.5]")
    assert build_method(settings).rates == (0.5,) and build_method(settings).predictor is None
    with pytest.raises(ResourceError, match="no predictor for some/model"):
        read_settings(pretrained="some/model", method="relook", layer=2)
    with pytest.raises(InputError):  # one of the two
        build_method(read_settings(pretrained="some/model", method="relook", rates="[0.5]", predictor="a.safetensors"))


def test_every_open_end_has_a_settling_and_the_rate_is_a_quarter():
    made = original_weights.settlings()
    assert {key for key, claim in CLAIMS.items() if claim.beyond} <= set(made)
    assert all(s.commands or s.note for s in made.values())
    table = original_weights.settling_table(paper_verdicts.verdicts({}))
    numbers = {int(n) for run in table.run for n in run.split(", ") if n.isdigit()}
    assert numbers == set(range(1, len(original_weights.commands()) + 1))
    text = original_weights.settling_text()
    assert all(command in text for command in original_weights.commands())
    from dyrate_lib.experiments.contradictions import llava_info, prefill_ratio

    layer, rate = original_weights.BETTER_LAYER, original_weights.quarter_rate()
    assert float(prefill_ratio(llava_info("7b"), layer, rate, 64)) == pytest.approx(0.25, abs=0.002)


# ----------------------------------------------------------------------------------------------------------- notebook


def test_notebook_declares_its_parameters_and_holds_no_output_and_no_result():
    file = paths.data() / "next" / "notebooks" / "07_verdict.ipynb"
    if not file.is_file():
        file = paths.notebooks() / "07_verdict.ipynb"
    known = notebook_parameters(file)
    assert set(known) == set(notebook_parameters("07_verdict"))
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
