"""What lmms-eval wrote, as rows of Tables I and II beside the paper's.

frame = read_results("results")          # the folder that --output_path named; one row a model, method and benchmark
for title, table in paper_tables(frame).items(): ...
differences(frame)                       # each score with its n and standard error, minus what the paper prints
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import paths
from ..errors import InputError, ResourceError
from .benchmarks import BENCHMARKS, LOCAL
from .settings import Settings, method_options, read_settings

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "model", "method", "task", "table", "column", "score", "stderr", "n", "limit", "local", "size", "row", "file",
)  # fmt: skip
TARGET = 0.333  # of the paper's FLOPs, for DyRate's rows
# a method here -> its label in Table I, whose settings are not printed
TABLE_1 = {
    "original": "LLaVAv1.5", "fastv-2": "FastV", "fastv-3": "FastV", "vtw": "VTW", "dyrate": "DyRate(ours)",
    "prumerge": "PruMerge", "sparsevlm": "SparseVLM", "visionzip": "VisionZip",
}  # fmt: skip


def read_results(folder: str | Path) -> pd.DataFrame:
    """All scores of the paper's benchmarks in a folder of lmms-eval results; of a repeated run the newest counts.

    Columns: model (pretrained), method (with its settings), task (official name), table and column of the paper, score (on the
    paper's scale), stderr (lmms-eval's standard error on that scale, NaN where it gives none), n (documents), limit (None for
    the whole benchmark), local (from local parquet), size and row (`printed_row`), file.

    Raises:
        ResourceError: no such folder, or no results of the model dyrate in it. InputError: a file that lmms-eval did not write.
    """
    import pandas as pd

    root, files = Path(folder).expanduser(), result_files(folder)
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for file in files:
        for row in _rows(file, root):
            rows[row["model"], row["method"], row["task"]] = row
    if not rows:
        raise ResourceError(
            f"{len(files)} result files in {folder}, none of the model dyrate on {', '.join(BENCHMARKS)}"
        )
    return pd.DataFrame(list(rows.values()), columns=list(COLUMNS))


def result_files(folder: str | Path) -> list[Path]:
    """The files of results in a folder that lmms-eval wrote into, the oldest first. ResourceError where there is none."""
    root = Path(folder).expanduser()
    found = root.rglob("*_results.json") if root.is_dir() else ()
    # beside its results lmms-eval keeps what could be submitted to servers, under like names
    files = sorted((p for p in found if "submissions" not in p.relative_to(root).parts), key=lambda p: p.name)
    if not files:
        missing = "there are no *_results.json in" if root.is_dir() else "there is no folder"
        raise ResourceError(f"{missing} {folder}: run python -m dyrate_lib.lmms eval --output_path {folder}")
    return files


def _rows(file: Path, root: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config, results = content["config"], content["results"]
        if config["model"] != "dyrate":
            return []
        settings = read_settings(**split_args(config["model_args"]), batch_size=1)
        size, row = printed_row(settings)
        out = []
        for name, values in results.items():
            known = BENCHMARKS.get(name.removesuffix(LOCAL))
            if known is None:
                continue
            score, error = _number(values, known.metric), _number(values, f"{known.metric}_stderr", needed=False)
            n = ((content.get("n-samples") or {}).get(name) or {}).get("effective")
            for value in (n, config.get("limit")):
                if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                    raise ValueError(f"{value!r} is no number of documents")
            out.append(
                {
                    "model": settings.pretrained, "method": settings.label, "task": known.task, "table": known.table,
                    "column": known.column, "score": known.factor * score, "stderr": known.factor * error,
                    "n": n, "limit": config.get("limit"), "local": name.endswith(LOCAL), "size": size,
                    "row": row, "file": str(file.relative_to(root)),
                }
            )  # fmt: skip
        return out
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{file.name} is not a result of lmms-eval: {type(error).__name__}: {error}") from error


def _number(values: Mapping[str, Any], metric: str, needed: bool = True) -> float:
    found = [value for key, value in values.items() if key.partition(",")[0] == metric]
    if needed and len(found) != 1:
        raise KeyError(f"{metric} is there {len(found)} times")
    if not needed and not (found and isinstance(found[0], int | float)):
        return math.nan  # lmms-eval writes "N/A" for a standard error that a metric has none of
    return float(found[0])


def printed_row(settings: Settings) -> tuple[str, str]:
    """The row of the paper's Table II that an evaluation repeats: (model, method), as ("LLaVA-1.5-7B", "fastv-2").

    Settings must be the printed ones; DyRate's predictor, if its name tells a target, one for a third of the FLOPs. Methods of
    Table I alone go by their names. "" where the paper has no such model or method.
    """
    name = Path(settings.pretrained).name.lower()
    size = next((s for s in ("7b", "13b") if re.search(rf"llava[-_]?v?1\.5[-_]{s}", name)), "")
    options = {**method_options(settings.method), **settings.options}
    row = ""
    if settings.flops is not None:
        pass  # a setting that was searched for is none that is printed
    elif settings.method == "none":
        row = "original"
    elif settings.method == "fastv" and (options["layer"], options["rate"]) in ((2, 0.5), (3, 0.5)):
        row = f"fastv-{options['layer']}"
    elif settings.method == "vtw" and options["layer"] in (16, *((None,) if size == "7b" else ())):
        row = "vtw"  # None is half the depth
    elif settings.method == "dyrate" and options == method_options("dyrate"):
        told = re.search(r"_t([0-9.]+)_s[0-9]+\.", str(settings.predictor))
        row = "dyrate" if told is None or float(told[1]) == TARGET else ""
    elif settings.method in ("prumerge", "sparsevlm", "visionzip"):
        row = settings.method
    return f"LLaVA-1.5-{size.upper()}" if size else "", row


def split_args(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """model_args as lmms-eval splits them: at commas that are not inside brackets or braces.

    Raises InputError for a part without an equals sign.
    """
    if not isinstance(text, str):
        return dict(text)
    parts = [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text) if part.strip()]
    if not all("=" in part for part in parts):
        raise InputError(f"model_args {text!r} are not name=value, separated by commas")
    # batch_size and device come apart from these
    pairs = (part.partition("=") for part in parts)
    return {k.strip(): v for k, _, v in pairs if k.strip() not in ("batch_size", "max_batch_size")}


def paper_tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> table, for Tables I and II as far as there are scores: the paper's rows (source "paper"), then ours ("here").

    A column `n` tells how many documents a row of ours rests on, as "500" or "4,999 to 9,000". Raises InputError for no scores.
    """
    import pandas as pd

    if not len(frame):
        raise InputError("there are no scores to fill the tables with")
    out = {}
    for table, title in ((1, "Table I"), (2, "Table II")):
        part = frame[frame["table"] == table]
        if not len(part):
            continue
        columns = [b.column for b in BENCHMARKS.values() if b.table == table]
        printed = pd.read_csv(paths.paper() / f"table{table}.csv")
        quoted = printed[["model", "label" if table == 2 else "llm", *columns]].copy()
        quoted.columns = ["model", "method", *columns]
        quoted.insert(0, "source", "paper")
        ours = []
        for (model, method), rows in part.groupby(["model", "method"], sort=False):
            scores = dict(zip(rows["column"], rows["score"], strict=True))
            counts = sorted({int(n) for n in rows["n"].dropna()})
            told = "" if not counts else f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
            ours.append(
                {"source": "here", "model": model, "method": method, **{c: scores.get(c) for c in columns}, "n": told}
            )
        out[title] = pd.concat([quoted, pd.DataFrame(ours)], ignore_index=True)
    return out


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Each score beside the one that the paper prints for the same model, method and benchmark, in the order of its columns.

    Columns: table, benchmark, model, method, n, here, stderr, paper, difference (here - paper) and "to the exchanged column": the
    paper's 7B columns Nocaps and Flickr30k are each other's by all other evidence. NaN where lmms-eval or the paper has no
    figure. Raises InputError for no scores.
    """
    import pandas as pd

    if not len(frame):
        raise InputError("there are no scores to compare")
    tables = {table: pd.read_csv(paths.paper() / f"table{table}.csv") for table in (1, 2)}
    exchanged = {"nocaps": "flickr30k", "flickr30k": "nocaps"}
    place = {task: i for i, task in enumerate(BENCHMARKS)}
    evaluations = [rows for _, rows in frame.groupby(["model", "method"], sort=False)]
    out = []
    for row in pd.concat([rows.sort_values("task", key=lambda t: t.map(place)) for rows in evaluations]).itertuples():
        printed = _printed(tables[row.table], row)
        other = exchanged.get(row.column, "") if row.size == "LLaVA-1.5-7B" else ""
        out.append(
            {
                "table": "I" if row.table == 1 else "II", "benchmark": BENCHMARKS[row.task].label, "model": row.model,
                "method": row.method, "n": row.n, "here": row.score, "stderr": row.stderr, "paper": printed.get(row.column),
                "difference": row.score - printed.get(row.column, math.nan),
                "to the exchanged column": row.score - printed.get(other, math.nan),
            }
        )  # fmt: skip
    found = pd.DataFrame(out)
    found[["stderr", "paper"]] = found[["stderr", "paper"]].astype(float)
    return found


def _printed(table: pd.DataFrame, row: Any) -> Mapping[str, Any]:
    """The paper's row for a row of `read_results`, {} where it has none. Table I has Vicuna-7B's alone."""
    if row.table == 1:
        found = table[(table["model"] == TABLE_1.get(row.row)) & (row.size == "LLaVA-1.5-7B")]
    else:
        found = table[(table["model"] == row.size) & (table["method"] == row.row)]
    return found.iloc[0].to_dict() if len(found) else {}
