"""What lmms-eval wrote, as rows of Tables I and II beside the paper's.

frame = read_results("results")          # the folder that --output_path named; one row a model, method and benchmark
for title, table in paper_tables(frame).items(): ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import paths
from ..errors import InputError, ResourceError
from .benchmarks import BENCHMARKS, LOCAL
from .settings import read_settings

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("model", "method", "task", "table", "column", "score", "n", "limit", "local", "file")


def read_results(folder: str | Path) -> pd.DataFrame:
    """All scores of the paper's benchmarks in a folder of lmms-eval results; of a repeated run the newest counts.

    Columns: model (pretrained), method (with its settings), task (official name), table and column of the paper, score (on the
    paper's scale), n (documents), limit (None for the whole benchmark), local (from local parquet), file.

    Raises:
        ResourceError: no such folder, or no results of the model dyrate in it. InputError: a file that lmms-eval did not write.
    """
    import pandas as pd

    root = Path(folder).expanduser()
    found = root.rglob("*_results.json") if root.is_dir() else ()
    # beside its results lmms-eval keeps what could be submitted to servers, under like names
    files = sorted((p for p in found if "submissions" not in p.relative_to(root).parts), key=lambda p: p.name)
    if not files:
        raise ResourceError(
            f"there are no *_results.json in {folder}: run python -m dyrate_lib.lmms eval --output_path {folder}"
        )
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for file in files:
        for row in _rows(file, root):
            rows[row["model"], row["method"], row["task"]] = row
    if not rows:
        raise ResourceError(
            f"{len(files)} result files in {folder}, none of the model dyrate on {', '.join(BENCHMARKS)}"
        )
    return pd.DataFrame(list(rows.values()), columns=list(COLUMNS))


def _rows(file: Path, root: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config, results = content["config"], content["results"]
        if config["model"] != "dyrate":
            return []
        settings = read_settings(**split_args(config["model_args"]), batch_size=1)
        out = []
        for name, values in results.items():
            known = BENCHMARKS.get(name.removesuffix(LOCAL))
            if known is None:
                continue
            score = _score(values, known.metric)
            counted = (content.get("n-samples") or {}).get(name) or {}
            out.append(
                {
                    "model": settings.pretrained, "method": settings.label, "task": known.task, "table": known.table,
                    "column": known.column, "score": known.factor * score, "n": counted.get("effective"),
                    "limit": config.get("limit"), "local": name.endswith(LOCAL), "file": str(file.relative_to(root)),
                }
            )  # fmt: skip
        return out
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file.name} is not a result of lmms-eval: {type(error).__name__}: {error}") from error


def _score(values: Mapping[str, Any], metric: str) -> float:
    found = [value for key, value in values.items() if key.partition(",")[0] == metric]
    if len(found) != 1:
        raise KeyError(f"{metric} is there {len(found)} times")
    return float(found[0])


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
