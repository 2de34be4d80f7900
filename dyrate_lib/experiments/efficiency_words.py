"""Notebook 04, words: what the records say in lines, and what that means for a user. Nothing here is written by hand but the
sentences' frames."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..plotting import METHODS as STYLES
from .context import Record, Study
from .efficiency_cells import Cell, courses
from .efficiency_figures import speed_data
from .efficiency_rows import LOOPS, PAPER_MODELS, headline, label, samples, speed_up, time_records
from .efficiency_targets import possible_table, target_table

NOTHING = "no latency was measured: there is no record of it and this machine has no GPU"
PAYS = 1.2  # times faster end to end: below it, pruning is hardly noticed


def findings(study: Study) -> str:
    """Stable lines on where time goes, from the records."""
    lines = []
    for cell, record in time_records(study).items():
        ours, base = (samples(record, f"graph {method}") for method in ("dyrate", "original"))
        ratio = speed_up(record, "graph original", "graph dyrate")
        if ours is None or base is None or ratio is None:
            failed = record["payload"]["failed"].get("graph original", "")
            lines.append(
                f"{_where(study, cell, record)}: the unpruned model does not fit{'' if not failed else f' ({failed})'}"
            )
            continue
        prefill, token = (np.median(ours[name]) / np.median(base[name]) for name in ("prefill", "token"))
        share = np.median(base["prefill"]) / np.median(base["whole"])
        lines.append(
            f"{_where(study, cell, record)}: DyRate takes x{prefill:.2f} of the prefill and x{token:.2f} of a decode step; the "
            f"prefill is {share:.0%} of {record['config']['new_tokens'][1]} tokens, so {ratio['mean']:.2f} times faster end to "
            f"end [{ratio['lo']:.2f}, {ratio['hi']:.2f}]"
        )
    return "\n".join(lines) if lines else NOTHING


def _where(study: Study, cell: Cell, record: Record) -> str:
    return f"{label(study, cell.model)}, batch {cell.batch}, {record['config']['image_tokens']} image tokens"


def possible_words(study: Study) -> str:
    """What part of the paper's gain at batch 1 the hardware allows."""
    table = possible_table(study)
    lines = []
    for _, row in (table[table["paper, x"].notna()] if len(table) else table).iterrows():
        lines.append(
            f"{row.model}: the paper prints x{row['paper, x']:.2f}. By this machine's measured bandwidth and matrix rate, "
            f"{row.part}, DyRate's course can give x{row['floors allow DyRate, x']:.2f} and no method more than "
            f"x{row['floors allow no image token, x']:.2f}, which is {max(0.0, row['of the gain printed, at most %']):.0f} % of "
            f"the gain printed; measured, with both runs above their floors: x{row['measured, x']:.2f}"
        )
    return "\n".join(lines) if lines else NOTHING


def recommendation(study: Study) -> str:
    """Plain advice, as Markdown, from what was measured."""
    data = speed_data(study)
    data = data[data.key.isin(PAPER_MODELS)] if len(data) else data
    if not len(data):
        return f"*No advice without timings on a GPU: {NOTHING}.*"
    return "\n".join(
        f"- {line}" for line in [*_engine_first(study), *_where_it_pays(data), *_lengths(data), *_methods(study)]
    )


def _engine_first(study: Study) -> list[str]:
    lines = []
    for cell, record in time_records(study).items():
        if cell.model in PAPER_MODELS and cell.batch == 1 and cell.pictures == 1:
            engine = speed_up(record, "stock original", "graph original")
            pruning = speed_up(record, "graph original", "graph dyrate")
            if engine and pruning:
                more = "the engine" if engine["mean"] > pruning["mean"] else "pruning"
                lines.append(
                    f"One user, one picture ({PAPER_MODELS[cell.model]}): the engine alone is {engine['mean']:.1f} times as fast "
                    f"as stock `generate`; pruning on top of it gives another x{pruning['mean']:.2f}. Most comes from {more}."
                )
    return lines


def _where_it_pays(data: pd.DataFrame) -> list[str]:
    lines = []
    for (model, tokens), some in data.groupby(["model", "image tokens"], sort=False):
        middle = sorted(some["new tokens"].unique())[len(some["new tokens"].unique()) // 2]
        some = some[some["new tokens"] == middle].sort_values("batch")
        pays, best = some[some.lo >= PAYS], some.loc[some.measured.idxmax()]
        start = f"{model}, {tokens} image tokens, {middle} new tokens: DyRate's course is "
        timed = ", ".join(str(b) for b in some.batch)
        if not len(pays):
            lines.append(
                f"{start}nowhere {PAYS} times faster at batch {timed} (at best x{best.measured:.2f}): leave the tokens in."
            )
        else:
            lines.append(
                f"{start}at least {PAYS} times faster at batch {', '.join(str(b) for b in pays.batch)}; the most is "
                f"x{best.measured:.2f} at batch {best.batch}."
            )
    return lines


def _lengths(data: pd.DataFrame) -> list[str]:
    wide = data.pivot_table(index=["key", "image tokens", "batch"], columns="new tokens", values="measured")
    short, long = wide.columns.min(), wide.columns.max()
    both = wide[[short, long]].dropna()
    if short == long or not len(both):
        return []
    falls = int((both[long] < both[short]).sum())
    return [
        f"Long replies: with {long} instead of {short} new tokens the gain is smaller in {falls} of {len(both)} settings: the "
        "prompt's pass, where most is saved at small batches, weighs less in them."
    ]  # fmt: skip


def _methods(study: Study) -> list[str]:
    rows = headline(study)
    some = rows[(rows.loop == "graph") & (rows.method != "original") & rows.key.isin(PAPER_MODELS)]
    some = some[some["x unpruned graph"].notna()]
    if not len(some):
        return []
    best = some.loc[some.groupby(["key", "image tokens", "batch"])["x unpruned graph"].idxmax()].method.value_counts()
    named = ", ".join(f"{STYLES[method][0]} in {count}" for method, count in best.items())
    return [
        f"Fastest method by setting: {named}, of {int(best.sum())}. This compares speed alone: quality is notebook 03's."
    ]


def missed(study: Study) -> str:
    """The aims that were missed, as Markdown; says so where none was, or nothing was measured."""
    table = target_table(study)
    if not len(table):
        return f"*{NOTHING[0].upper()}{NOTHING[1:]}.*"
    bad = table[table.met == "no"]
    if not len(bad):
        return f"All {len(table)} aims were met."
    return "\n".join(
        [f"{len(table) - len(bad)} of {len(table)} aims were met. Missed:", ""]
        + [f"- {row.model}, {row.what}: {row.measured}, aimed for {row.aim}{_beyond(row)}" for _, row in bad.iterrows()]
    )


def _beyond(row: pd.Series) -> str:
    """Whether an aim that was missed lies beyond what the floors allow."""
    aim, bound = float(row.aim.split()[-1]), row["floors allow"]
    return f" (floors allow {bound:.2f} at most)" if row.aim.startswith("at least") and bound < aim else ""


def conditions(study: Study) -> str:
    """On what was measured: device, ceilings and course by model; what did not run, compiled graphs, samples cut short; ""
    where nothing was."""
    records, lines = time_records(study), []
    for key in dict.fromkeys(cell.model for cell in records):
        mine = {cell: record for cell, record in records.items() if cell.model == key}
        payload = next(iter(mine.values()))["payload"]
        limits = [record["payload"]["ceilings"] for record in mine.values()]
        copies = [limit["copy_gb_s"] for limit in limits]
        kind = "bfloat16" if "bfloat16" in limits[0]["matmul_tflops"] else "float32"
        rates = [limit["matmul_tflops"][kind] for limit in limits]
        devices = ", ".join(dict.fromkeys(limit["device"] for limit in limits))
        config = next(iter(mine.values()))["config"]
        share = np.mean(payload["reads"]["dyrate"]["kept"][: config["new_tokens"][1]]) / config["image_tokens"]
        lines.append(
            f"{label(study, key)}: {len(mine)} cells on {devices}; copies {min(copies):.0f} to {max(copies):.0f} GB/s, {kind} "
            f"products {min(rates):.3g} to {max(rates):.3g} TFLOP/s; DyRate's course keeps {share:.1%} on average"
        )
        for cell, record in mine.items():
            lines += [f"  {_where(study, cell, record)}: {text}" for text in _incidents(record)]
    return "\n".join(lines)


def _incidents(record: Record) -> list[str]:
    """What a cell's record says beside its times."""
    payload, out = record["payload"], []
    if "static original" in payload["contenders"]:
        found, seconds = payload["compiling"], payload["contenders"]["static original"]["first_seconds"]
        out.append(
            f"{LOOPS['static']}: first three runs {seconds:.0f} s, {found['unique_graphs']} graphs, {found['graph_breaks']} "
            f"breaks, CUDA graphs skipped {found['cudagraph_skips']} times"
            + "".join(f"; '{text}'" for text in found["said"])
        )
    out += [f"{name}: {why.partition('. ')[0].rstrip('.')}" for name, why in payload["failed"].items()]
    asked = {name.split()[0] for name in record["config"]["contenders"]}
    out += [f"{LOOPS[kind]} was left out" for kind in payload["skipped"] if kind in asked]
    if "long" in payload["skipped"]:
        out.append(f"runs of {record['config']['new_tokens'][2]} new tokens were left out")
    graph = [found["samples"] for name, found in payload["contenders"].items() if name.startswith("graph")]
    taken = [len(rows.get("wall_ms", ())) for rows in graph]
    if taken and min(taken) < record["config"]["repeats"][0]:
        out.append(f"time was up after {min(taken)} of {record['config']['repeats'][0]} samples")
    return out


def same_course(study: Study) -> str:
    """Whether the courses replayed are those of today's predictors, which may have been trained anew since; "" if they are."""
    lines = []
    for cell, record in time_records(study).items():
        if cell.batch == 1 and cell.pictures == 1:
            used, now = (
                list(course) for course in (record["payload"]["reads"]["dyrate"]["kept"], courses(study, cell))
            )
            if used != now:
                shares = [100 * np.mean(course) / record["config"]["image_tokens"] for course in (used, now)]
                lines.append(
                    f"{label(study, cell.model)}: what was timed keeps {shares[0]:.1f} % of the image tokens on average, the "
                    f"present predictor {shares[1]:.1f} %."
                )
    return "\n".join(lines)
