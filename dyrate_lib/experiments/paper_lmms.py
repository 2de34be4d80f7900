"""Notebook 03: Tables I and II by lmms-eval on the original weights, from a folder of its results beside the paper's values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..lmms.benchmarks import BENCHMARKS, LOCAL
from ..lmms.results import differences, paper_tables, read_results, result_files
from .benchmarks import remembered
from .context import Study

if TYPE_CHECKING:
    import pandas as pd

# with DATA a folder of parquet (`python -m dyrate_lib.lmms parquet`), once for each method
COMMAND = (
    "python -m dyrate_lib.lmms eval --tasks dyrate_paper_local --data DATA --batch_size 16 --output_path results "
    "--model_args pretrained=llava-hf/llava-1.5-7b-hf,method=fastv,layer=2,rate=0.5"
)
THEN = "python -m dyrate_lib run 03_benchmarks -p lmms results"
NAMES = {"Table I": "tab1_lmms", "Table II": "tab2_lmms", "differences": "tab_lmms_differences"}


def scores(study: Study) -> pd.DataFrame | None:
    """`read_results` of the study's folder; None where it names none."""
    return remembered(study, ("lmms",), lambda: read_results(study.lmms)) if study.lmms else None


def about(study: Study) -> str:
    """What was read, in lines that depend on the results alone; or the one line that says how to get them."""
    frame = scores(study)
    if frame is None:
        return f"Not filled in here. To get them: {COMMAND} (once a method), then {THEN}"
    said = [
        f"{len(frame)} scores of {frame.groupby(['model', 'method']).ngroups} evaluations in {frame['file'].nunique()} of "
        f"{len(result_files(study.lmms))} result files"
    ]
    missing = [b.label for b in BENCHMARKS.values() if b.task not in set(frame["task"])]
    if missing:
        said.append(f"no scores on {', '.join(missing)}")
    cut = frame[frame["limit"].notna()]
    if len(cut):
        said.append(f"cut short by --limit: {len(cut)} of these scores; they are not the benchmarks'")
    local = sorted({f"{task}{LOCAL}" for task in frame[frame["local"]]["task"]})
    if local:
        said.append(f"from files of this machine: {', '.join(local)}")
    unlike = frame[(frame["size"] == "") | (frame["row"] == "")][["model", "method"]].drop_duplicates()
    if len(unlike):
        said.append(f"without a row in the paper: {'; '.join(f'{m}, {k}' for m, k in unlike.itertuples(index=False))}")
    return "\n".join(said)


def tables(study: Study) -> dict[str, pd.DataFrame]:
    """Title -> table: Tables I and II with rows of the paper and ours, and every score's difference. Empty without results."""
    import pandas as pd

    frame = scores(study)
    made = {} if frame is None else {**paper_tables(frame), "differences": differences(frame)}
    return {title: made.get(title, pd.DataFrame()) for title in NAMES}


def show(study: Study) -> None:
    """Print `about` and display the tables, written to the study's folder; those of an earlier run with other results go."""
    from IPython.display import display

    print(about(study))
    captions: dict[str, Any] = {
        "Table I": "Table I: the paper's rows as printed, and lmms-eval's here",
        "Table II": "Table II: the paper's rows as printed, and lmms-eval's here",
        "differences": "lmms-eval here against the paper, with n and lmms-eval's standard error",
    }
    for title, table in tables(study).items():
        shown = study.save_table(table, NAMES[title], captions[title], digits=2)
        if len(table):
            display(shown)
