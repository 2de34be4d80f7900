"""plotting: files that are the same bytes from any process, tables that LaTeX and Markdown read, masks at the right patches."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dyrate_lib import plotting
from dyrate_lib.errors import InputError, ResourceError

DRAW = """
import sys
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pandas as pd
from PIL import Image
from dyrate_lib import plotting as p
p.style()
fig, ax = plt.subplots()
for i, key in enumerate(p.METHODS):
    ax.plot([0, 1, 2], np.array([0, 1, 4]) + i, **p.method_style(key))
ax.set_xlabel("step, λ ≥ 0"); ax.legend()
p.save_figure(fig, "lines", sys.argv[1], data=pd.DataFrame({"x": [0.1, 1 / 3]}))
pic = Image.fromarray(np.arange(400 * 500 * 3, dtype=np.uint32).reshape(400, 500, 3).astype(np.uint8))
p.save_figure(p.plot_masks(pic, [range(576), range(100), []], words=["a", "$x$", "_b"], title="t"), "masks", sys.argv[1])
"""


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_two_processes_write_the_same_bytes(tmp_path):
    digests = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        # Another hash seed a process: an order taken from a set would show.
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", DRAW, str(folder)], check=True, env=env, cwd=tmp_path)
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()})
    assert digests[0] == digests[1]
    assert sorted(digests[0]) == ["lines.csv", "lines.pdf", "lines.png", "masks.pdf", "masks.png"]


def test_pdf_embeds_true_type_fonts_and_holds_no_date(tmp_path):
    fig, ax = plt.subplots()
    ax.set_title("embedded")
    pdf = plotting.save_figure(fig, "f", tmp_path)[0].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert b"CreationDate" not in pdf and b"atplotlib" not in pdf


def test_figures_have_the_papers_width(tmp_path):
    plotting.style()
    fig, _ = plt.subplots(figsize=(plotting.WIDTH_PAGE, 2))
    png = plotting.save_figure(fig, "f", tmp_path)[1]
    assert Image.open(png).width == int(plotting.WIDTH_PAGE * 300)
    assert not list(tmp_path.glob(".*"))


def test_what_a_predictor_is_fed_with_has_one_look_each():
    assert list(plotting.INPUTS) == ["shares", "step", "none", "hidden", "foreign", "oracle"]
    styles = [plotting.input_style(key) for key in plotting.INPUTS]
    for part in ("label", "color", "marker"):
        assert len({style[part] for style in styles}) == len(styles)
    paper, dyrate = plotting.input_style("shares"), plotting.method_style("dyrate")
    assert {k: paper[k] for k in ("color", "marker", "linestyle")} == {k: dyrate[k] for k in ("color", "marker", "linestyle")}
    with pytest.raises(InputError, match="fed with 'clock'"):
        plotting.input_style("clock")


def test_every_method_has_its_own_look():
    looks = {(c, m, s) for _, c, m, s in plotting.METHODS.values()}
    assert len(looks) == len(plotting.METHODS) == len(set(plotting.COLORS.values()))
    with pytest.raises(InputError, match="dyrate"):
        plotting.method_style("nosuch")


@pytest.mark.parametrize("name", ["a/b", "../x", "", "a b", ".hidden"])
def test_a_bad_name_is_refused(name, tmp_path):
    with pytest.raises(InputError):
        plotting.save_table(pd.DataFrame({"a": [1]}), name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"cannot write t\.csv"):
        plotting.save_table(pd.DataFrame({"a": [1]}), "t", tmp_path / "file")


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    fig, _ = plt.subplots()
    plotting.save_figure(fig, "f", tmp_path)
    before = (tmp_path / "f.pdf").read_bytes()

    def full(*args, **kwargs):
        Path(args[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fig, "savefig", full)
    with pytest.raises(ResourceError, match="No space left"):
        plotting.save_figure(fig, "f", tmp_path)
    assert (tmp_path / "f.pdf").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.pdf", "f.png"]


def test_tables_escape_what_their_format_would_misread(tmp_path):
    df = pd.DataFrame({"method_name": ["50% & more|less", r"{a}\b $c$ #1 ~^"], "CIDEr ↑": [74.891, float("nan")], "n": [1, 2]})
    _, md, tex = (p.read_text() for p in plotting.save_table(df, "t", tmp_path, caption="Loss in % of R_0", digits=1))
    assert r"50\% \& more\textbar{}less & 74.9 & 1 \\" in tex
    assert r"\{a\}\textbackslash{}b \$c\$ \#1 \textasciitilde{}\textasciicircum{} & -- & 2 \\" in tex
    assert r"\caption{Loss in \% of R\_0}" in tex and r"\begin{tabular}{lrr}" in tex
    assert [r for r in ("toprule", "midrule", "bottomrule") if f"\\{r}" in tex] == ["toprule", "midrule", "bottomrule"]
    assert r"method\_name & CIDEr $\uparrow$ & n" in tex
    assert r"| 50% & more\|less | 74.9 | 1 |" in md and "|---|---:|---:|" in md
    assert pd.read_csv(tmp_path / "t.csv")["CIDEr ↑"][0] == 74.891
    # Every special character that is left stands behind a backslash or in the maths that the escaping wrote.
    for row in [line for line in tex.splitlines() if r"\\" in line]:
        bare = re.sub(r"\\[&%$#_{}]|\\text\w+\{\}|\$\\\w+\$", "", row)
        assert not re.search(r"[%$#_~^]", bare)


def test_a_cell_with_a_line_break_stays_one_row(tmp_path):
    _, md, tex = (p.read_text() for p in plotting.save_table(pd.DataFrame({"a": ["x\ny"]}), "t", tmp_path))
    assert "| x y |" in md and "    x y \\\\" in tex


def test_masks_fade_exactly_the_dropped_patches():
    pixels = np.full((336, 336, 3), (200, 20, 20), dtype=np.uint8)
    image = Image.fromarray(pixels)
    kept = [0, 25, 575]
    shown = plotting.dim_dropped(image, kept)
    changed = (shown != pixels).any(axis=2).reshape(24, 14, 24, 14).transpose(0, 2, 1, 3).reshape(576, -1)
    assert changed.all(axis=1).sum() == 573 and not changed[kept].any()


@pytest.mark.parametrize("size", [(640, 480), (333, 1000), (1, 1), (336, 336), (337, 336)])
def test_the_square_shown_is_always_336(size):
    assert plotting.seen_by_model(Image.new("RGB", size)).size == (336, 336)


def test_the_square_shown_is_the_one_clip_passes_on():
    from transformers import CLIPImageProcessor

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_normalize=False, do_rescale=False
    )
    ours = np.asarray(plotting.seen_by_model(image), dtype=float)
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0], dtype=float).transpose(1, 2, 0)
    assert np.abs(ours - theirs).mean() < 1.0


def test_masks_show_the_count_and_the_word_of_each_step():
    fig = plotting.plot_masks(Image.new("RGB", (50, 40)), [range(576), range(9)], words=["a", "$1"])
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[1] == "step 0 “a”\n576 kept" and titles[2] == "step 1 “\\$1”\n9 kept"


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"kept": []}, "no step"),
        ({"kept": [[0]], "steps": [1]}, "0 to 0"),
        ({"kept": [[0], [0]], "words": ["a"]}, "one a step"),
        ({"kept": [[576]]}, "0 to 575"),
        ({"kept": [[0]], "n_image": 500}, "square grid"),
    ],
)
def test_masks_refuse_what_they_cannot_draw(kwargs, text):
    with pytest.raises(InputError, match=text):
        plotting.plot_masks(Image.new("RGB", (40, 40)), **kwargs)
