"""The paper's numbers beside ours, and the verdict on each claim.

The paper's tables lie in `data/paper/*.csv`, cut from its text. What our records must show for a claim was written down in
`data/paper/claims.yaml` before any full-scale result existed; this module only applies it. A quantity that is missing, not
finite, without the interval that its check needs, or that comes from too few pictures makes the claim 'cannot be judged
here': nothing passes by being absent.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dyrate_lib import paths
from dyrate_lib.errors import InputError, ResourceError

BORNE_OUT = "borne out"
PARTLY = "partly"
NOT_BORNE_OUT = "not borne out"
CANNOT_JUDGE = "cannot be judged here"
VERDICTS = (BORNE_OUT, PARTLY, NOT_BORNE_OUT, CANNOT_JUDGE)

# op -> (which end of the quantity it looks at, comparison)
_OPS: dict[str, tuple[str, str]] = {
    ">=": ("mean", ">="), "<=": ("mean", "<="), ">": ("mean", ">"), "<": ("mean", "<"), "within": ("mean", "within"),
    "lo>": ("lo", ">"), "lo>=": ("lo", ">="), "hi<": ("hi", "<"), "hi<=": ("hi", "<="),
    "hi>=": ("hi", ">="), "lo<=": ("lo", "<="),
}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """One measured number: an estimate and, where it was sampled, its 95 % interval and the n behind it."""

    mean: float
    lo: float | None = None
    hi: float | None = None
    n: int | None = None

    @classmethod
    def of(cls, value: Any) -> Quantity:
        """From a number or from a mapping with `mean` and optionally `lo`, `hi`, `n`. InputError on anything else."""
        if isinstance(value, Quantity):
            return value
        if isinstance(value, Mapping):
            unknown = set(value) - {"mean", "lo", "hi", "n"}
            if unknown or "mean" not in value:
                raise InputError(
                    f"a quantity is a number or {{mean, lo, hi, n}}, not a mapping with keys {sorted(map(str, value))}"
                )
            lo, hi, n = value.get("lo"), value.get("hi"), value.get("n")
            if (lo is None) != (hi is None):
                raise InputError("a quantity has both ends of its interval, lo and hi, or neither")
            if lo is not None and hi is not None and float(lo) > float(hi):
                raise InputError(f"a quantity's interval runs from low to high, not from {lo} to {hi}")
            return cls(
                float(value["mean"]),
                None if lo is None else float(lo),
                None if hi is None else float(hi),
                None if n is None else int(n),
            )
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise InputError(f"a quantity is a number or {{mean, lo, hi, n}}, not {value!r}")
        return cls(float(value))

    def __format__(self, spec: str) -> str:
        """The estimate in `spec`; str(quantity) adds the interval."""
        return format(self.mean, spec) if spec else str(self)

    def __str__(self) -> str:
        if self.lo is None or self.hi is None:
            return f"{self.mean:.4g}"
        n = "" if self.n is None else f", n={self.n}"
        return f"{self.mean:.4g} [{self.lo:.4g}, {self.hi:.4g}{n}]"


@dataclass(frozen=True)
class Check:
    """One condition on one quantity (see the head of claims.yaml for the meaning of each field)."""

    id: str
    quantity: str
    op: str
    value: float | tuple[float, float]
    core: bool = False
    min_n: int = 1
    exact: bool = False
    note: str = ""

    def outcome(self, measured: Mapping[str, Any]) -> tuple[bool | None, str]:
        """(True, False or None for 'cannot be judged', one line of evidence)."""
        if self.quantity not in measured:
            return None, f"{self.id}: {self.quantity} was not measured"
        q = Quantity.of(measured[self.quantity])
        end, comparison = _OPS[self.op]
        if not self.exact and (q.n is None or q.n < self.min_n):
            return None, f"{self.id}: n = {'unknown' if q.n is None else q.n}, {self.min_n} needed"
        shown = {"mean": q.mean, "lo": q.lo, "hi": q.hi}[end]
        if shown is None:
            return None, f"{self.id}: {self.quantity} has no interval"
        if not math.isfinite(shown) or not math.isfinite(q.mean):
            return None, f"{self.id}: {self.quantity} is not finite"
        held = _compare(shown, comparison, self.value)
        return held, f"{self.id}: {q} {'meets' if held else 'misses'} {self.condition}"

    @property
    def condition(self) -> str:
        """The condition in a reader's words, e.g. 'interval above 0'."""
        if isinstance(self.value, tuple):
            return f"within {self.value[0]:g} to {self.value[1]:g}"
        words = {
            "lo>": "interval above", "lo>=": "interval at or above", "hi<": "interval below", "hi<=": "interval at or below",
            "hi>=": "interval reaching", "lo<=": "interval reaching down to",
        }  # fmt: skip
        return f"{words.get(self.op, self.op)} {self.value:g}"


def _compare(x: float, comparison: str, value: float | tuple[float, float]) -> bool:
    if isinstance(value, tuple):
        return value[0] <= x <= value[1]
    return {">": x > value, ">=": x >= value, "<": x < value, "<=": x <= value}[comparison]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with the checks that decide on it."""

    id: str
    title: str
    text: str
    paper: str
    notebook: str
    checks: tuple[Check, ...]
    measured_as: str = ""
    beyond: str = ""

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of all quantities the checks read, each once, in order."""
        return tuple(dict.fromkeys(c.quantity for c in self.checks))


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


def _expand(raw: Mapping[str, Any], min_n: int, claim: str) -> Iterable[Check]:
    unknown = set(raw) - {"id", "quantity", "op", "value", "core", "min_n", "exact", "note", "for_each"}
    if unknown:
        raise InputError(f"claims.yaml, {claim}: unknown field {sorted(unknown)} in check {raw.get('id')!r}")
    if raw["op"] not in _OPS:
        raise InputError(f"claims.yaml, {claim}: op {raw['op']!r} is not one of {', '.join(_OPS)}")
    is_range = isinstance(raw["value"], list)
    if is_range != (raw["op"] == "within") or (is_range and len(raw["value"]) != 2):
        raise InputError(f"claims.yaml, {claim}: only op 'within' takes a value [low, high], in check {raw['id']!r}")
    value = (float(raw["value"][0]), float(raw["value"][1])) if is_range else float(raw["value"])
    names = raw.get("for_each", {})
    for combination in itertools.product(*names.values()):
        filled = dict(zip(names, map(str, combination), strict=True))
        yield Check(
            id=raw["id"].format(**filled), quantity=raw["quantity"].format(**filled), op=raw["op"], value=value,
            core=bool(raw.get("core", False)), min_n=int(raw.get("min_n", min_n)), exact=bool(raw.get("exact", False)),
            note=raw.get("note", ""),
        )  # fmt: skip


def _claims_file(path: Path | str | None) -> dict[str, Any]:
    file = Path(path) if path else paths.paper() / "claims.yaml"
    if not file.is_file():
        raise ResourceError(f"{file.name} is missing from data/paper: get a full checkout")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def claims(path: Path | str | None = None) -> dict[str, Claim]:
    """All claims by id, read from `data/paper/claims.yaml` (or `path`), checks written out. InputError on a malformed check."""
    raw = _claims_file(path)
    out: dict[str, Claim] = {}
    for key, c in raw["claims"].items():
        checks = tuple(check for r in c["checks"] for check in _expand(r, int(raw["min_n"]), key))
        if not any(check.core for check in checks):
            raise InputError(f"claims.yaml, {key}: no check is marked core, so nothing could refute the claim")
        out[key] = Claim(
            key, c["title"], c["text"].strip(), c["paper"], c["notebook"], checks,
            c.get("measured_as", "").strip(), c.get("beyond", "").strip(),
        )  # fmt: skip
    return out


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


def judge_all(measured: Mapping[str, Any]) -> dict[str, Verdict]:
    """A verdict on every claim of claims.yaml."""
    return {key: judge(claim, measured) for key, claim in claims().items()}


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


def scoreboard(measured: Mapping[str, Any]) -> pd.DataFrame:
    """One row for each figure and table of the paper: element, claim, notebook, paper, ours, verdict, evidence (all text).

    `ours` shows the measured quantities with their 95 % intervals, 'not measured' where one is missing.
    """
    all_claims, verdicts = claims(), judge_all(measured)
    rows = []
    for e in _claims_file(None)["elements"]:
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
    """Write a notebook's quantities to `folder/quantities_<notebook>.json`, sorted, atomically. InputError if malformed."""
    known = {q for c in claims().values() for q in c.quantities}
    plain = {}
    for name, value in sorted(measured.items()):
        if name not in known:
            raise InputError(f"no check in claims.yaml reads {name!r}: misspelt? See dyrate_lib.compare.claims()")
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
