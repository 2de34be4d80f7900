"""The command line: exit codes, messages without tracebacks, and a real caption from start to mask figure."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyrate_lib import captioning, compare, paths, study
from dyrate_lib.__main__ import main
from dyrate_lib.errors import InputError, ResourceError


@pytest.fixture
def picture(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "a picture.png"
    Image.fromarray(rng.integers(0, 255, (120, 90, 3), dtype=np.uint8)).save(file)
    return file


def stderr_of(capsys, *argv):
    code = main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.startswith("dyrate: ")
    return code, err


@pytest.mark.parametrize("method", ["none", "fastv", "random", "vtw"])
def test_caption_prints_text_counts_and_savings_and_draws_the_masks(picture, tmp_path, capsys, method):
    out = tmp_path / "out"
    argv = ["caption", str(picture), "--model", "random:tiny", "--method", method, "--max-new-tokens", "4", "--out", str(out)]
    assert main([*argv, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    n_image = int(re.search(r"kept of (\d+)", printed)[1])
    kept = [int(k) for k in re.findall(r"^ +\d+ +(\d+) +['\"]", printed, re.M)]
    assert 1 <= len(kept) <= 4
    want = {"none": n_image, "vtw": 0}.get(method, n_image // 2)
    assert kept == [want] * len(kept)
    saved = [float(x) for x in re.findall(r"(-?[\d.]+)% ", printed)]
    assert len(saved) == 2 and (saved == [0.0, 0.0] if method == "none" else all(0 < s < 100 for s in saved))
    assert sorted(p.name for p in out.iterdir()) == [f"masks_a_picture_{method}.{x}" for x in ("pdf", "png")]


@pytest.mark.parametrize("method", [m for m in captioning.METHODS if m not in ("none", "dyrate", "vtw")])
def test_caption_at_a_budget(picture, tmp_path, method):
    """Every method of the command line at 80 % of the FLOPs, counted for this very prompt and a reply of `REPLY` tokens."""
    found = captioning.caption(
        picture, "random:tiny", method, flops=0.8, max_new_tokens=2, out=tmp_path, prompt="a picture"
    )
    assert found.method.name == method and len(found.kept) == 2 and max(found.kept) <= found.n_image
    assert found.saved["paper"] == pytest.approx(0.2, abs=0.06)


def test_caption_with_a_trained_predictor(picture, tmp_path, capsys):
    from dyrate_lib import RatePredictor, load_vlm, model_info

    model, _ = load_vlm("random:tiny", device="cpu")
    file = tmp_path / "p.safetensors"
    RatePredictor(model_info(model).n_heads, n_rates=10, layer=1).save(file)
    argv = ["caption", picture, "--model", "random:tiny", "--predictor", file, "--max-new-tokens", "3", "--out", tmp_path]
    assert main([*map(str, argv), "--device", "cpu"]) == 0
    assert "Image tokens kept" in capsys.readouterr().out and (tmp_path / "masks_a_picture_dyrate.png").is_file()


@pytest.mark.parametrize(
    "extra, text",
    [
        (["--method", "vtw", "--rate", "0.5"], "--rate does not go with method vtw"),
        (["--method", "fastv", "--predictor", "x"], "--predictor does not go with"),
        (["--method", "none", "--layer", "1"], "--layer does not go with"),
        (["--method", "visionzip", "--rate", "0.5"], "--rate does not go with method visionzip"),
        (["--method", "fastv", "--rate", "0.5", "--flops", "0.5"], "one of --flops and --rate"),
        (["--method", "fastv", "--flops", "0.001"], "meets this budget"),
        (["--method", "none", "--flops", "0.5"], "--flops does not go with method none"),
        (["--method", "dyrate", "--flops", "0.5"], "budget is set in training"),
        (["--method", "fastv", "--layer", "99"], "99"),
        (["--method", "fastv", "--rate", "1.5"], "1.5"),
        (["--method", "none", "--max-new-tokens", "0"], "at least 1"),
        (["--method", "none", "--prompt", "two <image> here"], "placeholder"),
        (["--method", "none", "--device", "cuda:99"], ""),
        (["--method", "dyrate"], "no predictor for random:tiny"),
        (["--method", "dyrate", "--predictor", "nosuch.safetensors"], "nosuch"),
    ],
)
def test_bad_options_of_caption_are_one_clear_line(picture, tmp_path, capsys, extra, text):
    code, err = stderr_of(capsys, "caption", picture, "--model", "random:tiny", "--out", tmp_path / "out", *extra)
    assert code == 2 and text in err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_picture_and_one_that_is_not_there(tmp_path, capsys):
    (tmp_path / "x.png").write_text("not a picture")
    for name in ("x.png", "missing.png"):
        code, err = stderr_of(capsys, "caption", tmp_path / name, "--model", "random:tiny", "--method", "none")
        assert code == 2 and name in err


def test_missing_weights_are_a_clear_error(picture, tmp_path, capsys):
    code, _ = stderr_of(capsys, "caption", picture, "--model", tmp_path / "empty-folder", "--method", "none")
    assert code == 2


def test_run_and_list_refuse_what_is_not_there(capsys):
    code, err = stderr_of(capsys, "run", "99")
    assert code == 2 and "03_benchmarks" in err
    assert main(["list", "03_benchmarks"]) == 0
    assert "scale = 'full'" in capsys.readouterr().out
    code, err = stderr_of(capsys, "run", "3", "-p", "sclae", "smoke")
    assert code == 2 and "no parameter 'sclae'" in err and "scale (str, 'full')" in err


def test_a_failing_notebook_exits_with_one_and_ctrl_c_with_130(monkeypatch, capsys):
    for error, code in ((study.NotebookFailed("cell 3"), 1), (ResourceError("no disk"), 2), (KeyboardInterrupt(), 130)):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(study, "reproduce", fail)
        assert stderr_of(capsys, "reproduce", "--scale", "smoke")[0] == code


def test_reproduce_prints_the_scoreboard_that_notebook_07_left(monkeypatch, tmp_path, capsys):
    def fake(scale, *, out, **kwargs):
        folder = tmp_path / out
        (folder / "tables").mkdir(parents=True)
        compare.scoreboard({}).to_csv(folder / "tables" / "scoreboard.csv", index=False)
        return folder

    monkeypatch.setattr(study, "reproduce", fake)
    assert main(["reproduce", "--out", "x"]) == 0
    printed = capsys.readouterr().out
    assert all(e in printed for e in ("Fig. 4 (C9): cannot be judged here", "Table IVb (C8)", "x0.567 (7B)"))


def test_reproduce_without_a_scoreboard_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "reproduce", lambda *a, **k: tmp_path)
    code, err = stderr_of(capsys, "reproduce")
    assert code == 2 and "scoreboard" in err


def test_scoreboard_is_written_between_the_marks(tmp_path, capsys):
    compare.scoreboard({}).to_csv(tmp_path / "scoreboard.csv", index=False)
    readme = tmp_path / "R.md"
    readme.write_text("a\n<!-- scoreboard -->\n<!-- /scoreboard -->\nb\n")
    assert main(["scoreboard", "--tables", str(tmp_path), "--write", str(readme)]) == 0
    assert "| Table IVb | C8 |" in readme.read_text()
    assert main(["scoreboard", "--tables", str(tmp_path)]) == 0 and "Fig. 4 (C9)" in capsys.readouterr().out
    assert stderr_of(capsys, "scoreboard", "--tables", tmp_path / "none")[0] == 2


def test_the_readme_holds_the_marks_and_only_links_that_lead_somewhere():
    text = (paths.root() / "README.md").read_text()
    assert text.count("<!-- scoreboard -->") == text.count("<!-- /scoreboard -->") == 1
    links = [t for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    missing = sorted({t for t in links if not (paths.root() / t).exists()})
    assert links and not missing, f"README links to what is not there: {missing}"


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "dyrate_lib", "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and all(c in done.stdout for c in ("reproduce", "figures", "run", "list", "caption"))


def test_make_method_builds_what_was_asked_for():
    fastv = captioning.make_method("fastv", "m", 3, 0.25, None)
    assert (type(fastv).__name__, fastv.layer, fastv.rate) == ("FastV", 3, 0.25)
    assert captioning.make_method("vtw", "m", 7, None, None).layer == 7
    with pytest.raises(InputError, match="one of none"):
        captioning.make_method("nosuch", "m", None, None, None)


# ------------------------------------------------------------------------------------------------ habits of the command line


def test_caption_as_json_is_one_object_and_nothing_else(picture, tmp_path, capsys):
    argv = ["caption", str(picture), "--model", "random:tiny", "--method", "fastv", "--max-new-tokens", "3", "--json"]
    assert main([*argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["image"] == str(picture) and said["model"] == "random:tiny" and said["method"]["method"] == "fastv"
    assert len(said["words"]) == len(said["kept"]) == 3 and said["kept"][0] == said["n_image"] // 2
    assert 0 < said["flops_saved"]["cached"] < 1 and all(Path(f).is_file() for f in said["files"])
    assert captured.err == ""  # no terminal, so no bar


def test_progress_counts_tokens_and_names_stages(capsys):
    with captioning.Progress(5) as progress:
        progress.say("loading x")
        for token in ("prompt", 1, 2, 3):
            progress.put(token)
        progress.end()
        assert progress._bar.n == 3  # the first call is the prompt
        assert "loading x" in capsys.readouterr().err
    capsys.readouterr()  # the closing bar wipes its line
    with captioning.Progress(5, enabled=False) as silent:
        silent.say("x")
    assert capsys.readouterr().err == ""


def test_verbose_logs_before_or_after_the_command(picture, tmp_path, capsys):
    argv = ["caption", str(picture), "--model", "random:tiny", "--method", "none", "--max-new-tokens", "1", "--device", "cpu"]
    argv += ["--out", str(tmp_path)]
    for words in (["-v", *argv], [*argv, "-v"]):
        assert main(words) == 0
        assert "captioning by none" in capsys.readouterr().err
    logging.getLogger("dyrate_lib").setLevel(logging.WARNING)


def test_a_traceback_only_where_asked_for(tmp_path, capsys):
    for words, shown in (([], False), (["-vv"], True)):
        assert main([*words, "caption", str(tmp_path / "none.png"), "--model", "random:tiny", "--method", "none"]) == 2
        err = capsys.readouterr().err
        assert ("Traceback" in err) == shown and err.rstrip().splitlines()[-1].startswith("dyrate: no image at")
    logging.getLogger("dyrate_lib").setLevel(logging.WARNING)


def test_help_and_version(capsys):
    for words, text in ((["--version"], "dyrate 0."), (["--help"], "Exit codes"), (["caption", "--help"], "--json")):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0 and text in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["captoin"])
    assert stopped.value.code == 2 and "caption" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts_know_commands_and_options(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    words = ["reproduce", "caption", "fetch", "max-new-tokens"]
    words += [] if shell == "tcsh" else ["03_benchmarks", "sparsevlm"]  # shtab writes fewer choices for it
    assert [word for word in words if word not in script] == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "dyrate.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "scene.png").touch()

    def completed(*words):
        listed = " ".join(f"'{w}'" for w in words)
        program = f"""source {script}
        function_name=$(complete -p dyrate | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}
        $function_name dyrate '{words[-1]}' '{words[-2]}'
        printf '%s\\n' "${{COMPREPLY[@]}}" """
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        return done.stdout.split()

    assert completed("dyrate", "cap") == ["caption"]
    assert completed("dyrate", "caption", "--max") == ["--max-new-tokens"]
    assert completed("dyrate", "caption", "--method", "spa") == ["sparsevlm"]
    assert completed("dyrate", "run", "03") == ["03_benchmarks"]
    assert completed("dyrate", "caption", "sc") == ["scene.png"]
