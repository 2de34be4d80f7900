"""Notebook 04: measured times beside the paper's, over batch, image and new tokens, against floors, and memory."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..compare import load_paper
from ..plotting import METHODS as STYLES
from .context import Study
from .efficiency_rows import LOOPS, PAPER_MODELS, all_rows, headline, label


def latency_table(study: Study) -> pd.DataFrame:
    """Table III: every loop and method at one picture a prompt and the headline length, beside the paper's milliseconds."""
    rows, printed = headline(study), load_paper("table3").set_index(["model", "method"]).latency_ms
    if not len(rows):
        return rows
    out = []
    for _, row in rows[(rows["image tokens"] == rows["image tokens"].min()) & (rows.n > 0)].iterrows():
        name = PAPER_MODELS.get(row.key, "")
        ours = row.loop == "graph" and row.batch == 1
        paper = printed.get((name, row.method), np.nan) if ours else np.nan
        out.append(
            {
                "model": label(study, row.key), "batch": row.batch, "loop": LOOPS[row.loop], "method": STYLES[row.method][0],
                "prefill ms": row["prefill ms"], "ms a token": row["ms a token"], "end to end ms": row["end to end ms"],
                "middle half ms": f"{row['end to end ms, q1']:.1f} to {row['end to end ms, q3']:.1f}", "n": row.n,
                "of unpruned graph": 1 / row["x unpruned graph"], "paper ms": paper,
                "paper, of unpruned": paper / printed.get((name, "original"), np.nan),
                "peak GB": row["peak GB"], "KV held GB": row["KV held GB"], "FLOPs %, cached": row["% of unpruned, cached"],
                "FLOPs %, paper": row["% of unpruned, paper"],
            }
        )  # fmt: skip
    return pd.DataFrame(out)


def sweep_table(study: Study) -> pd.DataFrame:
    """Every number of every cell: loops, methods, batches, image tokens, new tokens, with quartiles and floors."""
    rows = all_rows(study)
    if not len(rows):
        return rows
    table = rows.copy()
    table.insert(0, "model", [label(study, key) for key in table["key"]])
    return table.drop(columns="key")


def compact_table(study: Study) -> pd.DataFrame:
    """The graph engine: speed-up of each method over the unpruned engine, end to end, by batch, image and new tokens."""
    rows = all_rows(study)
    if not len(rows):
        return rows
    some = rows[(rows.loop == "graph") & (rows.n > 0) & (rows.method != "original")]
    places = ["key", "image tokens", "batch", "new tokens"]
    wide = some.pivot_table(index=places, columns="method", values="x unpruned graph", sort=False).reset_index()
    whole = rows[(rows.loop == "graph") & (rows.method == "original")].set_index(places)["end to end ms"]
    wide.insert(4, "unpruned, ms", [whole.get(tuple(row), np.nan) for row in wide[places].to_numpy()])
    wide.insert(0, "model", [label(study, key) for key in wide.pop("key")])
    order = [method for method in STYLES if method in wide.columns]
    wide = wide[[*[c for c in wide.columns if c not in order], *order]]
    return wide.rename(columns={method: f"{STYLES[method][0]}, x faster" for method in order}).rename_axis(columns=None)


def floor_table(study: Study) -> pd.DataFrame:
    """The graph engine's prompt pass and decode step against their floors, by method, batch and image tokens."""
    rows = headline(study)
    if not len(rows):
        return rows
    some = rows[(rows.loop == "graph") & (rows.n > 0)]
    return pd.DataFrame(
        {
            "model": [label(study, key) for key in some["key"]], "image tokens": some["image tokens"], "batch": some["batch"],
            "method": [STYLES[method][0] for method in some["method"]],
            "prefill ms": some["prefill ms"], "prefill floor ms": some["prefill floor ms"],
            "prefill x floor": some["prefill x floor"], "ms a token": some["ms a token"],
            "decode floor ms": some["decode floor ms"], "decode x floor": some["decode x floor"],
            "host, intake ms": some["host intake ms"],
        }
    ).reset_index(drop=True)  # fmt: skip


def memory_table(study: Study) -> pd.DataFrame:
    """Peak memory of a run that has the GPU for itself, and the keys and values held and read, by method."""
    rows = headline(study)
    if not len(rows) or rows["peak GB"].isna().all():
        return pd.DataFrame()
    out = []
    for _, row in rows.iterrows():
        if row.loop == "graph" or row.failed:
            out.append(
                {
                    "model": label(study, row.key), "image tokens": row["image tokens"], "batch": row.batch,
                    "loop": LOOPS[row.loop], "method": STYLES[row.method][0], "peak GB": row.get("peak GB"),
                    "KV held GB": row.get("KV held GB"), "KV read at the last step GB": row.get("KV read GB"),
                    "does not fit; samples that would": _samples_that_would(row) if row.failed else np.nan,
                }
            )  # fmt: skip
    return pd.DataFrame(out)


def _samples_that_would(row: pd.Series) -> str:
    """What a refusal says would fit; another's loop just runs out of memory."""
    found = row.get("samples that would fit")
    return "not told" if found is None or np.isnan(found) else f"{found:.0f}"
