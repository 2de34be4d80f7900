"""study and notebooks: tiny notebooks run for real through papermill, in a project folder made for the test."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from dyrate_lib import compare, notebooks, paths, study
from dyrate_lib.errors import InputError, ResourceError

PARAMETERS = """\
scale = "full"  # "full" or "smoke"
records = "committed"
out = ""
seed = 0  # a whole number
rate = 0.5
names = ["a"]
data: str = "scenes"
"""
LOG = "import os; open(os.environ['DYRATE_HOME'] + '/log', 'a').write(NAME)"
BOARD = """\
import os, pathlib, shutil
home = os.environ["DYRATE_HOME"]  # not through the library: its import would take longer than the test
tables = pathlib.Path(home, "figures") if out == home else pathlib.Path(out or home + "/build", "tables")
tables.mkdir(parents=True, exist_ok=True)
shutil.copy(home + "/board.csv", tables / "scoreboard.csv")
"""


def write_notebook(file, *cells, parameters=PARAMETERS):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}})
    nb.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb.cells += [nbformat.v4.new_code_cell(c) for c in cells]
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, file)
    return file


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two notebooks that log their runs; the second writes a scoreboard. Others of the list are left out."""
    compare.scoreboard({}).to_csv(tmp_path / "board.csv", index=False)
    monkeypatch.setenv("DYRATE_HOME", str(tmp_path))
    monkeypatch.setattr(study, "NOTEBOOKS", ["00_scenes_vlm", "07_verdict"])
    (tmp_path / "data" / "paper").mkdir(parents=True)
    (tmp_path / "data" / "paper" / "x.csv").write_text("a\n1\n")
    write_notebook(tmp_path / "notebooks" / "00_scenes_vlm.ipynb", LOG.replace("NAME", "'0'"))
    write_notebook(
        tmp_path / "notebooks" / "07_verdict.ipynb",
        BOARD,
        LOG.replace("NAME", "'7'"),
    )
    return tmp_path


def log(project):
    file = project / "log"
    return file.read_text() if file.exists() else ""


def test_parameters_are_read_with_type_and_help(project):
    known = study.notebook_parameters("0")
    assert list(known) == ["scale", "records", "out", "seed", "rate", "names", "data"]
    assert known["seed"] == study.Parameter("seed", 0, "a whole number") and known["rate"].type_name == "float"


@pytest.mark.parametrize(
    "given, read",
    [
        ({"seed": "3"}, {"seed": 3}),
        ({"rate": "1"}, {"rate": 1.0}),
        ({"rate": 1}, {"rate": 1.0}),
        ({"scale": "smoke"}, {"scale": "smoke"}),
        ({"names": "['x', 'y']"}, {"names": ["x", "y"]}),
        ({"scale": "3"}, {"scale": "3"}),
    ],
)
def test_values_from_the_command_line_take_the_type_of_the_default(project, given, read):
    got = notebooks.check_parameters("00_scenes_vlm", given)
    assert got == read and [type(v) for v in got.values()] == [type(v) for v in read.values()]


@pytest.mark.parametrize("given", [{"seed": "x"}, {"seed": "1.5"}, {"seed": True}, {"rate": "fast"}, {"names": "3"}])
def test_a_value_of_another_type_is_refused(project, given):
    with pytest.raises(InputError, match="is of type"):
        notebooks.check_parameters("00_scenes_vlm", given)


def test_true_is_a_bool_and_nothing_else(project):
    flag = study.Parameter("quick", False)
    assert flag.parse("true") is True and flag.parse("False") is False
    with pytest.raises(InputError):
        flag.parse("1")


def test_an_unknown_parameter_lists_the_known_and_runs_nothing(project):
    with pytest.raises(InputError, match=r"(?s)no parameter 'sede'.*seed \(int, 0\) a whole number"):
        study.run_notebook("00_scenes_vlm", {"sede": 1})
    assert log(project) == "" and not (project / "build").exists()


@pytest.mark.parametrize("name", ["99", "03_bench", "nosuch", "nosuch.ipynb", "²"])
def test_an_unknown_notebook_is_refused(project, name):
    with pytest.raises(InputError):
        study.run_notebook(name)


def test_a_notebook_missing_from_the_checkout_is_told_apart(project):
    with pytest.raises(ResourceError, match="03_benchmarks"):
        study.run_notebook("3")


def test_without_a_parameters_cell_nothing_runs(project):
    file = project / "n.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1/0")]), file)
    with pytest.raises(InputError, match="tagged"):
        study.run_notebook(file)
    file.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        study.run_notebook(file)


def test_a_run_uses_this_python_in_the_notebooks_folder_whatever_kernels_are_installed(project, monkeypatch):
    bogus = project / "share" / "kernels" / "python3"
    bogus.mkdir(parents=True)
    spec = {"argv": ["/no/python", "{connection_file}"], "display_name": "x", "language": "python"}
    (bogus / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "share"))
    file = write_notebook(
        project / "notebooks" / "x.ipynb", "import os, sys; print(sys.executable); print(os.getcwd()); print(seed + 1)"
    )
    done = study.run_notebook(file, {"seed": "41"}, project / "done", progress=False)
    printed = nbformat.read(done, 4).cells[-1].outputs[0].text.splitlines()
    assert printed == [sys.executable, str(file.parent), "42"]
    assert os.environ["JUPYTER_PATH"] == str(project / "share")


def test_a_failing_notebook_shows_its_error_and_leaves_the_last_good_one(project):
    file = write_notebook(project / "notebooks" / "x.ipynb", "print('fine')\n", "boom = 1\nraise ValueError('rate 7')\n")
    target = project / "done"
    target.mkdir()
    (target / "x.ipynb").write_text("the last good one")
    with pytest.raises(study.NotebookFailed, match=r"(?s)cell \[3\].*'boom = 1'.*ValueError: rate 7"):
        study.run_notebook(file, out_dir=target, progress=False)
    assert (target / "x.ipynb").read_text() == "the last good one"
    assert "rate 7" in (target / "x.failed.ipynb").read_text()
    write_notebook(file, "print('fine')")
    study.run_notebook(file, out_dir=target, progress=False)
    assert sorted(p.name for p in target.iterdir()) == ["x.ipynb"]


def test_a_notebook_that_stops_as_asked_is_no_failure_and_no_finished_one(project):
    cell = "class StageDone(Exception): pass\nraise StageDone('all records are there')"
    file = write_notebook(project / "notebooks" / "x.ipynb", cell)
    assert study.run_notebook(file, out_dir=project / "done", progress=False).name == "x.records.ipynb"
    assert [p.name for p in (project / "done").iterdir()] == ["x.records.ipynb"]


def test_reproduce_resumes_after_a_failure_and_runs_again_what_changed(project, capsys):
    broken = write_notebook(project / "notebooks" / "07_verdict.ipynb", "raise RuntimeError('later')")
    with pytest.raises(study.NotebookFailed):
        study.reproduce("smoke", progress=False)
    assert log(project) == "0"
    write_notebook(broken, LOG.replace("NAME", "'7'"))
    study.reproduce("smoke", progress=False)
    assert log(project) == "07"  # the first was not run again
    study.reproduce("smoke", progress=False)
    assert log(project) == "07" and "finished before" in capsys.readouterr().out
    (project / "data" / "paper" / "x.csv").write_text("a\n2\n")
    study.reproduce("smoke", progress=False)
    assert log(project) == "0707"  # other data: nothing is kept
    write_notebook(project / "notebooks" / "00_scenes_vlm.ipynb", LOG.replace("NAME", "'o'"))
    study.reproduce("smoke", progress=False)
    assert log(project) == "0707o7"  # a changed notebook takes the later ones with it
    study.reproduce("smoke", again=True, progress=False)
    assert log(project) == "0707o7o7"


def test_reproduce_is_fresh_by_default_and_passes_the_common_parameters(project):
    folder = study.reproduce("smoke", data="coco:/x", out=project / "elsewhere", progress=False)
    nb = nbformat.read(folder / "notebooks" / "00_scenes_vlm.ipynb", 4)
    assert nb.metadata.papermill.parameters == {
        "scale": "smoke",
        "records": "fresh",
        "out": str(project / "elsewhere"),
        "data": "coco:/x",
    }
    assert (folder / "tables" / "scoreboard.csv").is_file()


def test_figures_redraws_into_the_committed_folder(project):
    assert study.figures(progress=False) == project / "figures"
    assert (project / "figures" / "scoreboard.csv").is_file() and not (project / "state.json").exists()
    before = log(project)
    study.figures(progress=False)
    assert log(project) == before * 2


def test_every_notebook_is_checked_before_the_first_one_runs(project):
    write_notebook(project / "notebooks" / "07_verdict.ipynb", parameters='scale = "full"\nout = ""\n')
    with pytest.raises(InputError, match="no parameter 'records'"):
        study.reproduce("smoke", progress=False)
    assert log(project) == ""


@pytest.mark.parametrize("kwargs", [{"scale": "big"}, {"records": "old"}, {"only": ["9"]}])
def test_reproduce_refuses_what_it_does_not_know(project, kwargs):
    with pytest.raises(InputError):
        study.reproduce(**{"scale": "smoke", **kwargs})


def test_two_runs_in_one_folder_are_refused(project):
    build = paths.build()
    build.mkdir()
    with study._only_run(build), pytest.raises(ResourceError, match="another run"):
        study.reproduce("smoke", progress=False)
    study.reproduce("smoke", progress=False)


def test_a_torn_state_file_costs_a_rerun_only(project):
    study.reproduce("smoke", progress=False)
    (paths.build() / "state.json").write_text('{"00_sc')
    study.reproduce("smoke", progress=False)
    assert log(project) == "0707"


def test_a_kill_in_the_middle_keeps_what_was_finished(project):
    write_notebook(project / "notebooks" / "07_verdict.ipynb", LOG.replace("NAME", "'a'"), "import time; time.sleep(600)")
    script = (
        "from dyrate_lib import study; study.NOTEBOOKS = ['00_scenes_vlm', '07_verdict']\n"
        "study.reproduce('smoke', progress=False)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(study.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, cwd=project, start_new_session=True)
    try:
        for _ in range(600):
            if log(project) == "0a":
                break
            assert process.poll() is None
            time.sleep(0.1)
        assert log(project) == "0a"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the test's own session only
        process.wait()
    write_notebook(project / "notebooks" / "07_verdict.ipynb", LOG.replace("NAME", "'b'"))
    study.reproduce("smoke", progress=False)
    assert log(project) == "0ab"


def test_the_scoreboard_goes_between_its_marks_and_nowhere_else(project):
    study.reproduce("smoke", progress=False)
    tables = paths.build() / "tables"
    readme = project / "README.md"
    readme.write_text("before\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\nafter\n")
    study.write_scoreboard(readme, tables)
    text = readme.read_text()
    assert text.startswith("before\n<!-- scoreboard -->\n| Figure, table |") and text.endswith("|\n<!-- /scoreboard -->\nafter\n")
    assert "old" not in text and "cannot be judged here" in text and "(notebooks/03_benchmarks.ipynb)" in text
    study.write_scoreboard(readme, tables)
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(InputError, match="scoreboard"):
        study.write_scoreboard(readme, tables)
    assert readme.read_text() == "no marks"


def test_the_announced_times_cover_every_notebook():
    assert all(set(table) == set(notebooks.NOTEBOOKS) for table in study.MINUTES.values())


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_committed_notebooks_are_executed_in_order_and_thin(name):
    """nbval passes a cell that was never executed; so that is looked at here."""
    file = notebooks.find_notebook(name)
    nb = json.loads(file.read_text())
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert nb["cells"][0]["cell_type"] == "markdown" and nb["metadata"]["kernelspec"]["name"] == "python3"
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    known = study.notebook_parameters(name)
    assert known["scale"].default == "full" and known["records"].default == "committed" and known["out"].default == ""
    lines = "\n".join("".join(c["source"]) for c in code)
    for body in re.findall(r"^def .*\n((?:[ \t].*\n|\n)*)", lines + "\n", re.M):
        assert body.strip().count("\n") < 5
    text = json.dumps([c["outputs"] for c in code])
    assert str(Path.home()) + "/" not in text and str(paths.root()) not in text
