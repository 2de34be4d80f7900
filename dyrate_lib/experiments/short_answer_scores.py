"""Notebook 03, Table I on scenes: scores of its cells, differences to the unpruned model, and what C10 is judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ..errors import InputError
from ..stats import bootstrap_sums, paired_statistic
from ..stats_tests import holm, paired_p_value
from ..task_metrics import TaskScores, score_task
from .benchmark_tables import per_picture
from .benchmarks import Row, remembered, row_by_key
from .context import Study
from .roles import TABLE1
from .short_answers import BOTH_PROTOCOLS, WITH_TEXT, models, rows, tasks
from .summaries import Quantity, show_interval

ALPHA = 0.05
FLIPS = 9999  # of the test's random patterns: with 240 comparisons Holm's smallest p is then 0.024


def scores(study: Study, row: Row, role: str) -> TaskScores:
    """A row's scores of one task; of several seeds each picture's statistics are averaged first."""
    return remembered(study, ("task scores", role, id(row)), lambda: _scores(study, row, role))


def _scores(study: Study, row: Row, role: str) -> TaskScores:
    items = remembered(study, ("items", role), lambda: list(study.dataset(role)))
    found = [score_task(role, {r["id"]: r["text"] for r in cell["payload"]}, items) for cell in row.cells]
    one, sums = found[0], np.mean([entry.sums for entry in found], axis=0)
    parts = {name: float(np.mean([entry.parts[name] for entry in found])) for name in one.parts}
    return TaskScores(role, one.headline, float(one.of(sums.sum(axis=0))), parts, one.ids, sums)


def unit(found: TaskScores) -> float:
    """What a headline figure is multiplied by to be in points of 100: MME's by one over twice its categories, others by 1."""
    return 1 / (2 * (found.sums.shape[1] // 3)) if found.task == "mme" else 1.0


def drawn(study: Study, found: TaskScores, seed: int = 0) -> np.ndarray:
    """[1 + resamples] headline figure of the set and of its resamples, those of `TaskScores.interval` under the same seed.

    Made once for each cell: its interval, its difference to another cell's and the share of it are all read from these.
    """

    def make() -> np.ndarray:
        resampled = bootstrap_sums(found.sums, study.scale.bootstrap, study.seed + seed)
        return found.of(np.vstack([found.sums.sum(axis=0), resampled]))

    return remembered(study, ("task draws", id(found), seed), make)


def difference(study: Study, a: TaskScores, b: TaskScores) -> Quantity:
    """{mean, lo, hi, n} of a - b over the same pictures, in points of 100 (as `task_metrics.paired`)."""
    if a.task != b.task or a.ids != b.ids:
        raise InputError(f"scores of {a.task} and {b.task} on {len(a.ids)} and {len(b.ids)} pictures are not paired")
    middle, lo, hi = interval_of((drawn(study, a) - drawn(study, b)) * unit(a))
    return {"mean": middle, "lo": lo, "hi": hi, "n": len(a.ids)}


def retained(study: Study, a: TaskScores, b: TaskScores, *, seed: int = 0) -> np.ndarray:
    """[1 + resamples] share of b's score that a has, of the set and of its resamples; not finite where b scores nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return drawn(study, a, seed) / drawn(study, b, seed)


def interval_of(draws: np.ndarray) -> tuple[float, float, float]:
    """(estimate, lo, hi), 95 %, of an estimate followed by those of resamples; NaN where any is not finite."""
    if not np.isfinite(draws).all():
        return (float("nan"),) * 3
    lo, hi = np.quantile(draws[1:], [0.025, 0.975])
    return float(draws[0]), float(lo), float(hi)


# ------------------------------------------------------------------------------------------------------------ all cells


def cells(study: Study) -> pd.DataFrame:
    """Every cell of Table I on scenes, one a line; the tests of all of them are one family for Holm's correction.

    Columns: model, task, key, method, score, lo, hi (the benchmark's unit), change, change lo, change hi (to the unpruned
    model, paired, points of 100), p (exchanging the two models' replies picture by picture), p Holm, retained %, retained lo,
    retained hi, FLOPs % (paper), FLOPs % (cached), n (pictures), seeds.
    """
    return remembered(study, ("short answer cells",), lambda: _cells(study))


def _cells(study: Study) -> pd.DataFrame:
    lines = [
        _line(study, key, task, row) for key in models(study) for task in tasks(study) for row in rows(study, key, task)
    ]
    table = pd.DataFrame(lines)
    tested = table["p"].notna() if len(table) else []
    if any(tested):
        table.loc[tested, "p Holm"] = holm(table.loc[tested, "p"].to_numpy())
    return table


def _line(study: Study, key: str, task: str, row: Row) -> dict[str, Any]:
    base, found = (scores(study, r, task) for r in (rows(study, key, task)[0], row))
    _, lo, hi = interval_of(drawn(study, found))
    line: dict[str, Any] = {
        "model": study.label(key), "task": task, "key": row.key, "method": row.label, "score": found.score, "lo": lo, "hi": hi,
    }  # fmt: skip
    nothing = float("nan")
    if row.key == "original":
        line |= {name: nothing for name in ("change", "change lo", "change hi", "p", "p Holm")}
    else:
        gap = difference(study, found, base)
        line |= {"change": gap["mean"], "change lo": gap["lo"], "change hi": gap["hi"]}
        line |= {"p": paired_p_value(found.sums, base.sums, found.of, FLIPS, study.seed), "p Holm": nothing}
    kept = [100 * value for value in interval_of(retained(study, found, base))]
    line |= dict(zip(("retained %", "retained lo", "retained hi"), kept, strict=True))
    for convention in ("paper", "cached"):
        line[f"FLOPs % ({convention})"] = 100 * per_picture(row, "flops", convention).mean()
    return line | {"n": len(found.ids), "seeds": len(row.cells)}


def mean_retained(study: Study, key: str, name: str) -> tuple[float, float, float]:
    """The mean over the seven tasks of the share retained, %, with its interval; NaN where the row misses a task.

    The tasks' pictures are drawn apart, as they are different pictures.
    """
    draws = []
    for i, task in enumerate(tasks(study)):
        here = {row.key: row for row in rows(study, key, task)}
        if name not in here:
            return (float("nan"),) * 3
        found, base = (scores(study, here[row], task) for row in (name, "original"))
        draws.append(retained(study, found, base, seed=i))
    middle, lo, hi = interval_of(np.mean(draws, axis=0))
    return 100 * middle, 100 * lo, 100 * hi


# ------------------------------------------------------------------------------------------------------- what it says


def comparisons(study: Study) -> str:
    """A stable note on how many comparisons the table makes, and what is left of them."""
    table = cells(study)
    tested = table[table["p"].notna()] if len(table) else table
    if not len(tested):
        return "no comparison: these tasks are asked on scenes"
    raw, adjusted = int((tested["p"] < ALPHA).sum()), int((tested["p Holm"] < ALPHA).sum())
    return (
        f"{len(tested)} differences to the unpruned model are tested. If none were real, about {ALPHA * len(tested):.0f} would "
        f"have p < {ALPHA:g}; {raw} have. After Holm's correction over all of them {adjusted} are left and marked: the chance "
        f"that any of these is luck is at most {ALPHA:.0%}. An interval of one cell without 0 says less."
    )


def findings(study: Study) -> str:
    """Stable lines: what does not differ from the unpruned model, and what is above it, task by task (after Holm)."""
    table, lines = cells(study), []
    for key in models(study):
        for task in tasks(study):
            some = table[(table.model == study.label(key)) & (table.task == task) & (table.key != "original")]
            shown = some["p Holm"] < ALPHA
            above, even, below = some[shown & (some.change > 0)], some[~shown], some[shown & (some.change < 0)]
            said = f"not told apart from unpruned: {', '.join(even.method) or 'none'}"
            said += f"; above: {', '.join(above.method)}" if len(above) else ""
            lines.append(f"{study.label(key)}, {TABLE1[task][1]}: {said}; below: {len(below)} of {len(some)}")
    return "\n".join(lines)


def protocols(study: Study) -> pd.DataFrame:
    """TextVQA without and with the text in the prompt: soft accuracy of each, and what the text is worth, paired."""
    out = []
    for key in models(study) if study.on_scenes else ():
        for name in BOTH_PROTOCOLS:
            row, other = (row_by_key(rows(study, key, role), name) for role in ("textvqa", WITH_TEXT))
            without, given = scores(study, row, "textvqa"), scores(study, other, WITH_TEXT)
            options = (study.scale.bootstrap, study.seed)
            gain, lo, hi = paired_statistic(given.sums, without.sums, given.of, *options)
            out.append(
                {
                    "model": study.label(key), "method": row.label,
                    "no text given [95%]": show_interval(_quantity(study, without), 1),
                    "text given [95%]": show_interval(_quantity(study, given), 1),
                    "what the text adds [95%]": f"{gain:+.1f} [{lo:+.1f}, {hi:+.1f}]", "n": len(given.ids),
                }
            )  # fmt: skip
    return pd.DataFrame(out)


def _quantity(study: Study, found: TaskScores) -> Quantity:
    middle, lo, hi = interval_of(drawn(study, found))
    return {"mean": middle, "lo": lo, "hi": hi, "n": len(found.ids)}


def quantities(study: Study) -> dict[str, Any]:
    """c10.{model}.{task}.dyrate_minus_original as claims_beyond.yaml names them: points of 100, paired over pictures."""
    return {
        f"c10.{key}.{task}.dyrate_minus_original": difference(
            study, *(scores(study, row_by_key(rows(study, key, task), name), task) for name in ("dyrate", "original"))
        )
        for key in models(study)
        for task in tasks(study)
    }
