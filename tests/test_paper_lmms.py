"""Notebook 03 on a folder of lmms-eval results: files that lmms-eval 0.7.3 wrote of a tiny model, and made-up figures."""

import json
import shutil

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib import InputError, ResourceError, notebooks, paths, study
from dyrate_lib.__main__ import main
from dyrate_lib.experiments import open_study, paper_lmms
from dyrate_lib.lmms.benchmarks import BENCHMARKS
from dyrate_lib.lmms.results import differences, printed_row, read_results
from dyrate_lib.lmms.settings import read_settings

REAL = paths.root() / "tests" / "golden" / "lmms_eval"


def write_result(folder, name, results, model_args, **config):
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "config": {"model": "dyrate", "model_args": model_args, **config}, "results": results,
        "n-samples": {task: {"original": 9000, "effective": 5000} for task in results},
    }  # fmt: skip
    (folder / f"{name}_results.json").write_text(json.dumps(content))
    return folder


def opened(tmp_path, lmms):
    return open_study("03_benchmarks", scale="smoke", out=str(tmp_path / "out"), lmms=str(lmms), progress=False)


def test_real_results_fill_both_tables(tmp_path):
    one = opened(tmp_path, REAL)
    made = paper_lmms.tables(one)
    first, second = (made[title][made[title]["source"] == "here"].set_index("method") for title in ("Table I", "Table II"))
    assert list(first.index) == list(second.index) == ["none", "fastv(layer=2, rate=0.5)"]
    assert first.loc["none", ["gqa", "vizwiz", "sqa", "vqa", "pope", "mmb", "mme"]].tolist() == [0.0] * 7
    assert second["n"].tolist() == ["5", "5"] and first["n"].tolist() == ["5 to 6", "5 to 6"]
    gaps = made["differences"].set_index(["method", "benchmark"])
    assert len(gaps) == 20 and [b for m, b in gaps.index if m == "none"] == [b.label for b in BENCHMARKS.values()]
    # what lmms-eval gives: standard errors where a metric has one, n of each benchmark
    assert gaps.loc[("none", "GQA"), ["n", "stderr", "paper", "difference"]].tolist() == [5, 0.0, 62.0, -62.0]
    assert np.isnan(gaps.loc[("none", "COCO2017"), "stderr"]) and gaps.loc[("none", "MME"), "n"] == 6
    assert gaps.loc[("fastv(layer=2, rate=0.5)", "COCO2017"), "difference"] == -110.40
    assert gaps.loc[("fastv(layer=2, rate=0.5)", "NoCaps"), "difference"] == -74.86
    assert gaps.loc[("fastv(layer=2, rate=0.5)", "NoCaps"), "to the exchanged column"] == -104.0
    said = paper_lmms.about(one)
    assert said.startswith("20 scores of 2 evaluations in 2 of 2 result files") and "no scores on" not in said


def test_scores_errors_and_counts_are_on_the_papers_scale(tmp_path):
    folder = write_result(
        tmp_path / "r", "1",
        {"gqa": {"exact_match,none": 0.625, "exact_match_stderr,none": 0.004, "exact_match_stderr_clt,none": 9},
         "flickr30k_test_local": {"flickr_CIDEr,none": 1.2, "flickr_CIDEr_stderr,none": "N/A"}},
        "pretrained=/w/llava-1.5-13b-hf", limit=7,
    )  # fmt: skip
    write_result(folder, "2", {"gqa": {"exact_match,none": 0.5, "exact_match_stderr,none": []}}, "pretrained=other-7b")
    found = differences(read_results(folder)).set_index(["model", "benchmark"])
    first = found.loc[("/w/llava-1.5-13b-hf", "GQA")]
    assert (first["here"], first["stderr"], first["n"]) == (62.5, 0.4, 5000)
    assert np.isnan(first["difference"])  # Table I is of Vicuna-7B
    caption = found.loc[("/w/llava-1.5-13b-hf", "Flickr30k")]
    assert caption["paper"] == 79.56 and caption["difference"] == pytest.approx(120 - 79.56)
    assert np.isnan(caption["to the exchanged column"])  # only the 7B rows are exchanged
    other = found.loc[("other-7b", "GQA")]
    assert other["here"] == 50.0 and np.isnan(other["stderr"]) and np.isnan(other["paper"])
    said = paper_lmms.about(opened(tmp_path, folder))
    assert "no scores on VizWiz" in said and "cut short by --limit: 2 of these scores" in said
    assert "from files of this machine: flickr30k_test_local" in said and "without a row in the paper: other-7b, none" in said


@pytest.mark.parametrize(
    "args, row",
    [
        ({}, "original"),
        ({"method": "fastv", "layer": 3, "rate": 0.5}, "fastv-3"),
        ({"method": "fastv"}, "fastv-2"),
        ({"method": "fastv", "rate": 0.9}, ""),
        ({"method": "fastv", "flops": 0.5}, ""),
        ({"method": "vtw"}, "vtw"),
        ({"method": "vtw", "layer": 16}, "vtw"),
        ({"method": "vtw", "layer": 9}, ""),
        ({"method": "dyrate", "predictor": "p/llava-1.5-7b-hf_t0.333_s0.safetensors"}, "dyrate"),
        ({"method": "dyrate", "predictor": "p/llava-1.5-7b-hf_t0.5_s0.safetensors"}, ""),
        ({"method": "dyrate", "predictor": "mine.safetensors", "reversible": True}, ""),
        ({"method": "visionzip"}, "visionzip"),
        ({"method": "random"}, ""),
    ],
)
def test_a_row_is_the_papers_only_at_the_papers_settings(args, row):
    assert printed_row(read_settings(pretrained="llava-hf/llava-1.5-7b-hf", **args)) == ("LLaVA-1.5-7B", row)


@given(st.sampled_from(["llava-1.5-13b-hf", "LLaVA_v1.5_13B", "x/llava-v1.5-13b"]), st.sampled_from(["7b", "llava-1.5-7b"]))
def test_the_model_goes_by_the_last_part_of_its_name(name, parent):
    assert printed_row(read_settings(pretrained=f"/{parent}/{name}"))[0] == "LLaVA-1.5-13B"
    assert printed_row(read_settings(pretrained=f"{name}/other"))[0] == ""
    assert printed_row(read_settings(pretrained="Qwen2.5-VL-7B"))[0] == ""
    # half of 40 layers is not the paper's layer 16
    assert printed_row(read_settings(pretrained=name, method="vtw"))[1] == ""


@pytest.mark.parametrize("make", ["missing", "empty", "damaged", "foreign"])
def test_a_bad_folder_is_refused_before_any_work(tmp_path, monkeypatch, capsys, make):
    folder = tmp_path / "results"
    if make != "missing":
        folder.mkdir()
    if make == "damaged":
        (folder / "1_results.json").write_text('{"config": ')
    if make == "foreign":
        write_result(folder, "1", {"gqa": {"exact_match,none": 1}}, "", model="llava")
    message = {
        "missing": "there is no folder", "empty": "no \\*_results.json", "damaged": "1_results.json is not a result",
        "foreign": "none of the model dyrate",
    }[make]  # fmt: skip

    def never(*args, **kwargs):
        raise AssertionError("a notebook was started")

    monkeypatch.setattr("papermill.execute_notebook", never)
    for call in (
        lambda: opened(tmp_path, folder),
        lambda: notebooks.run_notebook("03_benchmarks", {"lmms": str(folder)}, tmp_path / "done"),
        lambda: study.reproduce("smoke", lmms=folder, out=tmp_path / "study"),
    ):
        with pytest.raises((InputError, ResourceError), match=message):
            call()
    assert not (tmp_path / "study").exists()
    capsys.readouterr()
    assert main(["reproduce", "--scale", "smoke", "--lmms", str(folder), "--out", str(tmp_path / "study")]) == 2
    assert str(folder.name) in capsys.readouterr().err


def test_lmms_goes_to_the_notebook_that_shows_it(tmp_path, monkeypatch, capsys):
    """Through `reproduce`, relative to where the command is given; anew when there are new results."""
    given = []

    def run(file, params, target, progress):
        given.append((file.stem, params.get("lmms")))
        (target / file.name).write_text("{}")

    monkeypatch.setattr(study, "run_notebook", run)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REAL, tmp_path / "results")
    asked = {"records": "committed", "out": tmp_path / "out", "only": ["02", "03"], "lmms": "results"}
    study.reproduce("full", **asked)
    assert given == [("02_training", None), ("03_benchmarks", str(tmp_path / "results"))]
    study.reproduce("full", **asked)
    assert len(given) == 2
    write_result(tmp_path / "results", "3", {"gqa": {"exact_match,none": 1}}, "pretrained=a")
    study.reproduce("full", **asked)
    assert [name for name, _ in given[2:]] == ["03_benchmarks"]
    with pytest.raises(InputError, match="none of the notebooks asked for"):
        study.reproduce("full", **{**asked, "only": ["02"]})
    assert main(["reproduce", "--jobs", "2", "--lmms", "results"]) == 2
    assert "--lmms goes without --jobs" in capsys.readouterr().err


def test_the_notebooks_own_cells_show_the_tables(tmp_path, monkeypatch):
    """Notebook 03 itself, cut to its parameters, its opening and this section, through papermill."""
    whole = nbformat.read(paths.notebooks() / "03_benchmarks.ipynb", 4)
    wanted = [
        c for c in whole.cells
        if c.cell_type == "code" and ("open_study" in c.source or "lmms" in c.source)  # the parameters name it, too
    ]  # fmt: skip
    assert len(wanted) == 3
    whole.cells = wanted
    file = tmp_path / "cut" / "03_benchmarks.ipynb"
    file.parent.mkdir()
    nbformat.write(whole, file)
    shutil.copytree(REAL, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    asked = {"lmms": "results", "out": "out", "scale": "smoke"}
    done = nbformat.read(notebooks.run_notebook(file, asked, tmp_path / "done", progress=False), 4)
    outputs = done.cells[-1].outputs
    assert outputs[0].text.startswith("20 scores of 2 evaluations")
    shown = [o.data["text/markdown"] for o in outputs[1:]]
    assert len(shown) == 3 and "| here | llava-1.5-7b-hf | fastv(layer=2, rate=0.5) |" in shown[0]
    assert "| paper | LLaVA-1.5-7B | DyRate(ours) | 75.00 | 108.41 | 110.54 |" in shown[1]
    assert {p.name for p in (tmp_path / "out" / "tables").glob("*.csv")} == {
        "tab1_lmms.csv", "tab2_lmms.csv", "tab_lmms_differences.csv",
    }  # fmt: skip
    # without results: one line with the command, and tables of the earlier run are gone
    done = nbformat.read(notebooks.run_notebook(file, {**asked, "lmms": ""}, tmp_path / "done", progress=False), 4)
    (output,) = done.cells[-1].outputs
    assert paper_lmms.COMMAND in output.text and "-p lmms results" in output.text and output.text.count("\n") == 1
    assert not list((tmp_path / "out" / "tables").iterdir())


def test_the_command_that_is_named_is_one(tmp_path):
    words = paper_lmms.COMMAND.split()
    args = dict(part.split("=", 1) for part in words[words.index("--model_args") + 1].split(","))
    assert read_settings(**args).label == "fastv(layer=2, rate=0.5)"
    assert "lmms" in notebooks.notebook_parameters("03_benchmarks")
    assert {b.table for b in BENCHMARKS.values()} == {1, 2}
