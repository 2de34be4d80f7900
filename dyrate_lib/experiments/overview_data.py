"""The numbers that the overview figure draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from ..compare import judge
from ..criteria import Check, Quantity
from ..errors import ResourceError
from .claim_words import NUMBERS
from .context import Study
from .paper_verdicts import SEGMENTS, all_claims, decisive
from .reading import part, reader

SETS = {"coco": "short", "flickr30k": "narrative", "late": "late"}
MODELS = ("small", "base")
SHOWN = ("oracle", "shares", "foreign", "step")  # top to bottom; nothing (a constant rate) is the zero line


def input_data(measured: Mapping[str, Any], study: Study | None = None) -> pd.DataFrame:
    """Predictors fed with something, minus a constant rate, in CIDEr at equal FLOPs: model, set, fed with, mean, lo, hi, n.

    From the controls' records where `study` has them; else from the quantities of C11, which hold an interval for the shares and
    the oracle only: of the others the estimate alone is known, as a difference of two (lo, hi are NaN). Rows that nothing is
    known of are left out.
    """
    rows = _from_records(study) if study is not None else []
    return pd.DataFrame(rows or _from_quantities(measured), columns=["model", "set", "fed with", "mean", "lo", "hi", "n"])


def _from_records(study: Study) -> list[dict[str, Any]]:
    numbers, controls = part("controls_numbers"), part("controls")
    if numbers is None or controls is None:
        return []
    rows = []
    with TemporaryDirectory() as folder:
        there = reader(study, Path(folder))
        try:
            for key, role in numbers.cells(there):
                none = numbers.fed(there, key, role, "none")
                for kind in [kind for kind in SHOWN if kind in controls.inputs(there)]:
                    found = numbers.difference(there, numbers.fed(there, key, role, kind).equal, none.equal)
                    rows.append({"model": key, "set": role, "fed with": kind, **found})
        except ResourceError:  # not all of them are there: one source for all rows, the quantities
            return []
    return rows


def _from_quantities(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for role in SETS:
        for key in MODELS:
            head = f"c11.{key}.{role}"
            shares = measured.get(f"{head}.shares_minus_none")
            known = {"oracle": measured.get(f"{head}.oracle_minus_none"), "shares": shares}
            for kind in ("foreign", "step"):
                other = measured.get(f"{head}.shares_minus_{kind}")
                if shares is not None and other is not None:
                    mean = Quantity.of(shares).mean - Quantity.of(other).mean
                    known[kind] = {"mean": mean, "n": Quantity.of(other).n}
            for kind in SHOWN:
                if known.get(kind) is not None:
                    q = Quantity.of(known[kind])
                    interval = {"lo": np.nan if q.lo is None else q.lo, "hi": np.nan if q.hi is None else q.hi}
                    rows.append({"model": key, "set": role, "fed with": kind, "mean": q.mean, **interval, "n": q.n})
    return rows


def strip_data(measured: Mapping[str, Any]) -> pd.DataFrame:
    """One row a claim: claim, verdict, checks in all and of the core, how many hold, fail and cannot be judged, what decides."""
    rows = []
    for key, claim in all_claims().items():
        outcomes = [(check.core, check.outcome(measured)[0]) for check in claim.checks]
        check = decisive(claim, measured)
        row: dict[str, Any] = {"claim": key, "verdict": judge(claim, measured).verdict}
        for name, held in (("hold", True), ("fail", False), ("unknown", None)):
            row[f"core {name}"] = sum(core and found is held for core, found in outcomes)
            row[f"other {name}"] = sum(not core and found is held for core, found in outcomes)
        rows.append({**row, "check": check.id, "held": check.outcome(measured)[0], "shown": shown_number(check, measured)})
    return pd.DataFrame(rows)


def shown_number(check: Check, measured: Mapping[str, Any]) -> str:
    """What a check reads, in one line: 'CIDEr −12 [−15, −9] base late (≥ 0)'; or why it cannot be judged."""
    if check.quantity not in measured:
        return "not measured"
    q = Quantity.of(measured[check.quantity])
    if check.outcome(measured)[0] is None:
        few = not check.exact and (q.n is None or q.n < check.min_n)
        n = "unknown" if q.n is None else str(q.n)
        return f"too few to judge (n = {n})" if few else "no interval, or not finite"
    name, percent = number_name(check.quantity)
    factor = 100.0 if percent else 1.0
    size = factor * max(abs(q.mean), abs(q.hi or 0), abs(q.lo or 0))
    digits = 0 if size >= 20 and not percent else 1 if size >= 2 or percent else 2

    if q.lo is not None and q.hi is not None and q.lo < q.hi and f"{q.lo * factor:.{digits}f}" == f"{q.hi * factor:.{digits}f}":
        digits += 1  # an interval must not look like a point

    def show(x: float) -> str:
        text = f"{x * factor:.{digits}f}"
        if q.lo is None and x and not float(text):
            text = f"{x * factor:.1g}"
        return text.replace("-", "−")

    ends = "" if q.lo is None or q.hi is None else f" [{show(q.lo)}, {show(q.hi)}]"
    value = check.value if isinstance(check.value, tuple) else (check.value,)
    asked = " to ".join(f"{v * factor:.4g}".replace("-", "−") for v in value)
    sign = check.op.removeprefix("lo").removeprefix("hi").replace(">=", "≥").replace("<=", "≤").replace("within", "in")
    case = " ".join(SEGMENTS[part][1] for part in check.quantity.split(".")[1:-1] if part in SEGMENTS)
    return f"{name} {show(q.mean)}{' %' if percent else ''}{ends} {case + ' ' if case else ''}({sign} {asked})"


def number_name(quantity: str) -> tuple[str, bool]:
    """A quantity's name for a narrow column, e.g. CIDEr for c3.small.coco.dyrate_minus_original; whether it is a share."""
    claim, last = quantity.partition(".")[0], quantity.rsplit(".", 1)[-1]
    if claim == "c10":
        return "points", False
    for ending, found in NUMBERS.items():
        if last.endswith(ending):
            return found
    return last.replace("_", " "), False
