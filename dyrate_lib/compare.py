"""The paper's numbers beside ours, and the verdict on each claim.

The paper's tables lie in `data/paper/*.csv`, cut from its text. What our records must show for a claim was written down in
`data/paper/claims.yaml` before any full-scale result existed (in `claims_beyond.yaml` for what was asked later, before its
records did); this module only applies it. A quantity that is missing, not finite, without the interval that its check needs,
or that comes from too few pictures makes the claim 'cannot be judged here': nothing passes by being absent.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dyrate_lib import paths
from dyrate_lib.criteria import BEYOND, FIRST, Check, Claim, Quantity, claims, claims_file
from dyrate_lib.errors import InputError

__all__ = [
    "BEYOND", "BORNE_OUT", "CANNOT_JUDGE", "Check", "Claim", "FIRST", "NOT_BORNE_OUT", "PARTLY", "Quantity", "VERDICTS",
    "Verdict", "claims", "judge", "judge_all", "load_paper", "load_quantities", "save_quantities", "scoreboard", "side_by_side",
    "summary_line",
]  # fmt: skip

BORNE_OUT = "borne out"
PARTLY = "partly"
NOT_BORNE_OUT = "not borne out"
CANNOT_JUDGE = "cannot be judged here"
VERDICTS = (BORNE_OUT, PARTLY, NOT_BORNE_OUT, CANNOT_JUDGE)


@dataclass(frozen=True)
class Verdict:
    """What came of a claim. `checks` has one row a check: (id, core, True | False | None, evidence line)."""

    claim: str
    verdict: str
    evidence: str
    checks: tuple[tuple[str, bool, bool | None, str], ...] = field(default=())


def load_paper(name: str) -> pd.DataFrame:
    """One of the paper's tables as printed: table1, table2, table3, table4a, table4b, or text (numbers in the prose).

    Numeric cells are floats, unprinted ones NaN; `bold` names the columns set in bold; `quoted` is the row as printed.
    """
    folder = paths.paper()
    file = folder / f"{name}.csv"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.csv"))) or "none: is this a full checkout?"
        raise InputError(f"no table {name!r} of the paper in data/paper; there are: {known}")
    table = pd.read_csv(file, keep_default_na=False, na_values=[""], encoding="utf-8")
    if "bold" in table:
        table["bold"] = table["bold"].astype(object).where(table["bold"].notna(), "")
    return table


def judge(claim: Claim, measured: Mapping[str, Any]) -> Verdict:
    """Apply a claim's checks to `measured` (name -> number or {mean, lo, hi, n}).

    'cannot be judged here' if any check lacks what it needs; else 'borne out' if all hold, 'not borne out' if no core check
    holds, 'partly' in between. The evidence names what failed, or what is missing, and counts the checks.
    """
    rows = tuple((c.id, c.core, *c.outcome(measured)) for c in claim.checks)
    missing = [line for _, _, held, line in rows if held is None]
    failed = [line for _, _, held, line in rows if held is False]
    count = f"{len(rows) - len(missing) - len(failed)} of {len(rows)} checks hold"
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        return Verdict(claim.id, CANNOT_JUDGE, f"{missing[0]}{more}", rows)
    if not failed:
        return Verdict(claim.id, BORNE_OUT, count, rows)
    kept_core = any(held for _, core, held, _ in rows if core)
    return Verdict(claim.id, PARTLY if kept_core else NOT_BORNE_OUT, f"{count}; {'; '.join(failed)}", rows)


def judge_all(measured: Mapping[str, Any], beyond: bool = False) -> dict[str, Verdict]:
    """A verdict on every claim of claims.yaml, and where `beyond` of claims_beyond.yaml."""
    return {key: judge(claim, measured) for key, claim in claims(beyond=beyond).items()}


_FIELD = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")


def _fill(template: str, measured: Mapping[str, Any]) -> str:
    def put(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        if name not in measured:
            return "not measured"
        q = Quantity.of(measured[name])
        shown = format(q, spec) if spec else f"{q.mean:.4g}"
        if q.lo is None or q.hi is None:
            return shown
        return f"{shown} [{format(q.lo, spec or '.4g')}, {format(q.hi, spec or '.4g')}]"

    return _FIELD.sub(put, template).replace("xnot measured", "not measured")  # no factor before a missing number


def scoreboard(measured: Mapping[str, Any], beyond: bool = False) -> pd.DataFrame:
    """One row for each figure and table of the paper: element, claim, notebook, paper, ours, verdict, evidence (all text).

    `ours` shows the measured quantities with their 95 % intervals, 'not measured' where one is missing. beyond: with the elements
    of claims_beyond.yaml, which replace those of the same element and claim.
    """
    all_claims, verdicts = claims(beyond=beyond), judge_all(measured, beyond)
    files = [claims_file(None, name)[0] for name in ((FIRST, BEYOND) if beyond else (FIRST,))]
    elements = {(e["element"], e["claim"]): e for file in files for e in file["elements"]}
    rows = []
    for e in elements.values():
        if e["claim"] not in all_claims:
            raise InputError(f"claims.yaml: element {e['element']!r} names the unknown claim {e['claim']!r}")
        verdict = verdicts[e["claim"]]
        rows.append(
            {
                "element": e["element"], "claim": e["claim"], "notebook": all_claims[e["claim"]].notebook, "paper": e["paper"],
                "ours": _fill(e["ours"], measured), "verdict": verdict.verdict, "evidence": verdict.evidence,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def summary_line(verdicts: Mapping[str, Verdict]) -> str:
    """One stable line: '7 of 11 claims borne out; partly: C1, C7; not borne out: C4'."""
    by = {v: [key for key, got in verdicts.items() if got.verdict == v] for v in VERDICTS}
    rest = [f"{v}: {', '.join(by[v])}" for v in VERDICTS[1:] if by[v]]
    return "; ".join([f"{len(by[BORNE_OUT])} of {len(verdicts)} claims borne out", *rest])


def save_quantities(measured: Mapping[str, Any], notebook: str, folder: Path | str) -> Path:
    """Write a notebook's quantities to `folder/quantities_<notebook>.json`, sorted, atomically.

    Raises:
        InputError: one is malformed, or no check reads it, or the claim that does names another notebook: two must not save one.
    """
    known = {q: c.notebook for c in [*claims().values(), *claims(beyond=True).values()] for q in c.quantities}
    plain = {}
    for name, value in sorted(measured.items()):
        if name not in known:
            raise InputError(f"no check in {FIRST} or {BEYOND} reads {name!r}: misspelt? See dyrate_lib.compare.claims()")
        if known[name] != notebook:
            raise InputError(f"{name!r} is for notebook {known[name]} to save, not for {notebook}: see its claim in data/paper")
        q = Quantity.of(value)
        plain[name] = {k: v for k, v in vars(q).items() if v is not None}
    file = Path(folder) / f"quantities_{notebook}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False, suffix=".tmp") as handle:
        handle.write(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    os.replace(handle.name, file)
    return file


def load_quantities(folder: Path | str) -> dict[str, dict[str, float]]:
    """All quantities saved in `folder`, by name. InputError when two notebooks wrote the same name."""
    out: dict[str, dict[str, float]] = {}
    for file in sorted(Path(folder).glob("quantities_*.json")):
        for name, value in json.loads(file.read_text(encoding="utf-8")).items():
            if name in out:
                raise InputError(f"{name!r} stands in two quantities files of {Path(folder).name}, one of them {file.name}")
            out[name] = value
    return out


def side_by_side(paper: pd.DataFrame, ours: pd.DataFrame, on: list[str], values: list[str]) -> pd.DataFrame:
    """The paper's values and ours side by side: columns `<value> paper`, `<value> ours`; rows only we have come last."""
    for name, table in (("paper", paper), ("ours", ours)):
        lacking = [c for c in [*on, *values] if c not in table.columns]
        if lacking:
            raise InputError(f"the {name} table has no column {lacking}; it has {list(table.columns)}")
        if table.duplicated(on).any():
            raise InputError(f"the {name} table has several rows for one {' and '.join(on)}")
    keys = pd.concat([paper[on], ours[on]]).drop_duplicates()
    out = keys.merge(paper[[*on, *values]], on=on, how="left").merge(
        ours[[*on, *values]], on=on, how="left", suffixes=(" paper", " ours")
    )
    return out[[*on, *(f"{v} {who}" for v in values for who in ("paper", "ours"))]]
