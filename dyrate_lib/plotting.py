"""One look for all figures and tables: widths of a two-column paper, one colour a method, the same bytes every time.

Colours are Okabe and Ito's (doi 10.1038/nmeth.1618) and Paul Tol's muted ones, told apart under the common colour
blindnesses; methods differ in marker too, and by line style in where they cut: dashed at layers, dotted before the LLM.
PDFs embed their fonts (Type 42) and hold no date, so a redraw changes a file only when its content changed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from dyrate_lib.errors import InputError, ResourceError

WIDTH_COLUMN = 3.5  # inches, one column of an IEEE page
WIDTH_PAGE = 7.16  # inches, both columns

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
GREY, CRIMSON, OCHRE, VIOLET = "#8C8C8C", "#B2182B", "#8C510A", "#6A3D9A"
# Paul Tol's muted scheme, for the methods that Okabe and Ito's eight colours do not suffice for
INDIGO, FOREST, WINE, ROSE, OLIVE, BROWN, TEAL, MAGENTA = (
    "#332288", "#117733", "#882255", "#CC6677", "#999933", "#661100", "#44AA99", "#AA4499",
)  # fmt: skip

# key -> (label, colour, marker, line style); the keys are those of data/paper/*.csv
METHODS: dict[str, tuple[str, str, str, str]] = {
    "original": ("Original", BLACK, "o", "-"),
    "random": ("Random", GREY, "X", ":"),
    "fastv-2": ("FastV (P=2, R=0.5)", SKY, "s", "--"),
    "fastv-3": ("FastV (P=3, R=0.5)", BLUE, "D", "--"),
    "vtw": ("VTW", ORANGE, "v", "-."),
    "dyrate": ("DyRate", VERMILION, "^", "-"),
    "relook": ("RelookRate (ours)", CRIMSON, "o", "-"),
    "merge": ("MergeRate (ours)", VIOLET, "P", "-"),
    "layer-topk": ("LayerTopK (ours)", OCHRE, "D", "-"),
    "fixed": ("Fixed rate (FP)", GREEN, "P", "--"),
    "depth": ("Depth-based (DP)", PURPLE, "*", "-."),
    "sparsevlm": ("SparseVLM", INDIGO, "<", "--"),
    "pyramiddrop": ("PyramidDrop", TEAL, "h", "--"),
    "st3": ("ST3-style", MAGENTA, "d", "--"),
    "visionzip": ("VisionZip", FOREST, ">", ":"),
    "prumerge": ("PruMerge (fixed count)", WINE, "p", ":"),
    "prumerge+": ("PruMerge+", ROSE, "H", ":"),
    "divprune": ("DivPrune", OLIVE, "8", ":"),
    "cdpruner": ("CDPruner", BROWN, "X", ":"),
}
# What a rate predictor is fed with (predictor_inputs.INPUTS) -> the same; the paper's has DyRate's colour and marker, the oracle
# black, and those that see neither picture nor text are dotted
INPUTS: dict[str, tuple[str, str, str, str]] = {
    "shares": ("Attention shares (paper)", VERMILION, "^", "-"),
    "step": ("Step number only", BLUE, "s", ":"),
    "none": ("Nothing (constant)", GREY, "X", ":"),
    "hidden": ("Hidden state", GREEN, "D", "-"),
    "foreign": ("Another picture's shares", ORANGE, "v", "--"),
    "oracle": ("Oracle (known need)", BLACK, "*", "-."),
}
COLORS = {key: entry[1] for key, entry in METHODS.items()}
LABELS = {key: entry[0] for key, entry in METHODS.items()}
TOKEN_TYPES = ("sys", "img", "ins", "res")
TOKEN_COLORS = {"sys": GREY, "img": VERMILION, "ins": SKY, "res": BLUE}
FAMILY_COLORS = {"short": BLACK, "narrative": BLUE, "late": ORANGE}

_RC: Any = {  # Any: matplotlib types its keys one by one
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False, "lines.linewidth": 1.2, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.4, "grid.alpha": 0.4,
    "axes.axisbelow": True, "figure.constrained_layout.use": True, "figure.figsize": (WIDTH_COLUMN, 2.4), "figure.dpi": 150,
    "savefig.dpi": 300, "savefig.bbox": None, "pdf.fonttype": 42, "ps.fonttype": 42, "text.usetex": False,
    "axes.prop_cycle": plt.cycler(color=[BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK]),
}  # fmt: skip


def style() -> None:
    """Set matplotlib's parameters for every figure made after this call (a notebook calls it once, at its top)."""
    plt.rcParams.update(_RC)


def method_style(key: str) -> dict[str, str]:
    """Keyword arguments for `ax.plot` of a method: label, color, marker, linestyle. InputError on an unknown key."""
    if key not in METHODS:
        raise InputError(f"no style for method {key!r}; there is one for {', '.join(METHODS)}")
    label, color, marker, linestyle = METHODS[key]
    return {"label": label, "color": color, "marker": marker, "linestyle": linestyle}


def input_style(key: str) -> dict[str, str]:
    """Keyword arguments for `ax.plot` of a predictor's inputs, as `method_style`. InputError on an unknown key."""
    if key not in INPUTS:
        raise InputError(f"no style for a predictor fed with {key!r}; there is one for {', '.join(INPUTS)}")
    return dict(zip(("label", "color", "marker", "linestyle"), INPUTS[key], strict=True))


def _write(path: Path, write: Callable[[Path], object]) -> Path:
    """Write to a neighbour and rename, so that a kill or a full disk leaves the old file or the new one, nothing between."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        try:
            write(Path(name))
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path.name} into {path.parent}: {error.strerror or error}; free some room or choose another"
        ) from error
    return path


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{name!r} is no file name for a figure or table: letters, digits, '.', '_' and '-' only")
    return name


def save_figure(fig: Figure, name: str, folder: Path | str, data: pd.DataFrame | None = None) -> list[Path]:
    """Write `folder/name.pdf` (vector, fonts embedded) and `.png` (300 dpi), byte-stable; `data` (what is drawn) as `.csv`.

    Raises InputError for a name with a path or blanks in it, ResourceError when the folder cannot be written.
    """
    _check_name(name)
    folder = Path(folder)
    with mpl.rc_context({key: value for key, value in _RC.items() if key.startswith(("pdf.", "savefig."))}):
        # Keys set to None are left out: the date and the version of matplotlib would change the bytes.
        pdf = {"CreationDate": None, "Producer": "dyrate", "Creator": "dyrate"}
        written = [
            _write(folder / f"{name}.pdf", lambda p: fig.savefig(p, format="pdf", metadata=pdf)),
            _write(folder / f"{name}.png", lambda p: fig.savefig(p, format="png", dpi=300, metadata={"Software": None})),
        ]
    if data is not None:
        written.append(_write(folder / f"{name}.csv", lambda p: _csv(data, p)))
    return written


def _csv(df: pd.DataFrame, path: Path) -> None:
    df.to_csv(path, index=False, lineterminator="\n", float_format="%.10g", encoding="utf-8")


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    "±": r"$\pm$", "×": r"$\times$", "≤": r"$\le$", "≥": r"$\ge$", "–": "--", "−": "$-$", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "→": r"$\rightarrow$", "λ": r"$\lambda$", "…": r"\dots{}",
}  # fmt: skip


def tex_escape(text: str) -> str:
    """`text` as LaTeX prints it literally: special characters escaped, arrows and relations as maths, line breaks as blanks."""
    return "".join(_TEX.get(c, c) for c in " ".join(text.split()))


def _cell(value: Any, digits: int) -> str:
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and np.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.{digits}f}"
    return " ".join(str(value).split())


def save_table(df: pd.DataFrame, name: str, folder: Path | str, caption: str = "", digits: int = 2) -> list[Path]:
    """Write `folder/name.csv` (10 digits), `.md` and `.tex` (booktabs; floats with `digits` decimals, gaps as a dash).

    The index is not written: reset it first if it matters. Raises as save_figure does, and InputError for an empty table.
    """
    _check_name(name)
    if not len(df.columns):
        raise InputError(f"table {name!r} has no columns")
    folder, columns = Path(folder), [str(c) for c in df.columns]
    cells = [[_cell(v, digits) for v in row] for row in df.itertuples(index=False, name=None)]
    numeric = [pd.api.types.is_numeric_dtype(t) and not pd.api.types.is_bool_dtype(t) for t in df.dtypes]

    def md_row(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", r"\|") for c in row) + " |"

    md = [md_row(columns), "|" + "|".join("---:" if n else "---" for n in numeric) + "|", *map(md_row, cells)]
    tex = [
        r"% needs \usepackage{booktabs}", r"\begin{table}[t]", r"  \centering",
        *([f"  \\caption{{{tex_escape(caption)}}}"] if caption else []),
        f"  \\label{{tab:{name}}}", f"  \\begin{{tabular}}{{{''.join('r' if n else 'l' for n in numeric)}}}", r"    \toprule",
        "    " + " & ".join(map(tex_escape, columns)) + r" \\", r"    \midrule",
        *("    " + " & ".join(map(tex_escape, row)) + r" \\" for row in cells),
        r"    \bottomrule", r"  \end{tabular}", r"\end{table}",
    ]  # fmt: skip
    head = [caption, ""] if caption else []
    return [
        _write(folder / f"{name}.csv", lambda p: _csv(df, p)),
        _write(folder / f"{name}.md", lambda p: p.write_text("\n".join([*head, *md]) + "\n", encoding="utf-8")),
        _write(folder / f"{name}.tex", lambda p: p.write_text("\n".join(tex) + "\n", encoding="utf-8")),
    ]


def markdown_table(df: pd.DataFrame, digits: int = 2) -> str:
    """The table as Markdown text, as save_table writes it, to print in a notebook or a README."""
    with tempfile.TemporaryDirectory() as folder:
        return save_table(df, "table", folder, digits=digits)[1].read_text(encoding="utf-8").rstrip("\n")


def seen_by_model(image: Image.Image, size: int = 336) -> Image.Image:
    """The square of a picture that CLIP's processor passes on: shortest edge to `size`, bicubic, centre crop, RGB."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    w, h = (max(size, round(edge * scale)) for edge in image.size)
    left, top = (w - size) // 2, (h - size) // 2
    return image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def dim_dropped(image: Image.Image, kept: Sequence[int] | np.ndarray, n_image: int = 576) -> np.ndarray:
    """The picture as the model sees it, patches not in `kept` faded to light grey: uint8 [336, 336, 3].

    kept: indices of kept image tokens, 0 .. n_image-1 in raster order. InputError when n_image is no square that divides the
    picture into whole patches, or an index lies outside.
    """
    side = round(n_image**0.5)
    if side * side != n_image or 336 % side:
        raise InputError(f"{n_image} image tokens are no square grid that divides 336 pixels; masks are drawn for e.g. 576")
    index = np.asarray(kept, dtype=np.int64).reshape(-1)
    if index.size and (index.min() < 0 or index.max() >= n_image):
        raise InputError(f"kept tokens are numbered 0 to {n_image - 1}, not {index.min()} to {index.max()}")
    grid = np.zeros(n_image, dtype=bool)
    grid[index] = True
    mask = np.kron(grid.reshape(side, side), np.ones((336 // side, 336 // side), dtype=bool))[..., None]
    pixels = np.asarray(seen_by_model(image), dtype=np.float32)
    faded = 0.18 * pixels.mean(axis=2, keepdims=True) + 0.82 * 235.0
    return np.where(mask, pixels, faded).round().astype(np.uint8)


def plot_masks(
    image: Image.Image, kept: Sequence[Sequence[int] | np.ndarray], *, words: Sequence[str] | None = None,
    steps: Sequence[int] | None = None, n_image: int = 576, columns: int = 6, title: str = "",
) -> Figure:  # fmt: skip
    """The picture beside its mask at several steps, dropped patches faded (the paper's Fig. 4).

    kept[t]: indices of the image tokens read at step t (as `out.trace.kept_at(b, t)` gives them). words[t]: the token made at
    step t, shown above its panel. steps: which to draw; by default up to 11, evenly spaced, first and last among them.
    The caller closes the figure.
    """
    if not len(kept):
        raise InputError("there is no step to draw: `kept` is empty")
    if words is not None and len(words) < len(kept):
        raise InputError(f"{len(words)} words for {len(kept)} steps: give one a step")
    if steps is None:
        steps = sorted(set(np.linspace(0, len(kept) - 1, min(11, len(kept))).round().astype(int).tolist()))
    if not all(0 <= t < len(kept) for t in steps):
        raise InputError(f"steps run from 0 to {len(kept) - 1}, not {list(steps)}")
    panels = len(steps) + 1
    columns = min(columns, panels)
    rows = -(-panels // columns)
    with mpl.rc_context(_RC):
        width = WIDTH_PAGE * columns / 6
        height = rows * (width / columns + 0.32) + 0.3 * bool(title)
        fig, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        flat = list(axes.flat)
        flat[0].imshow(np.asarray(seen_by_model(image)))
        flat[0].set_title("picture", fontsize=7)
        for ax, t in zip(flat[1:], steps, strict=False):
            ax.imshow(dim_dropped(image, kept[t], n_image))
            word = f" “{words[t].strip()}”" if words is not None else ""
            # A dollar sign in a token would start matplotlib's maths mode.
            ax.set_title(f"step {t}{word}\n{len(np.asarray(kept[t]).reshape(-1))} kept".replace("$", r"\$"), fontsize=6.5)
        if title:
            fig.suptitle(title.replace("$", r"\$"), fontsize=8)
    return fig
