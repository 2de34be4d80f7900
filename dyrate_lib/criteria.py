"""What the records must show for each claim, as written in `data/paper/claims.yaml` and `claims_beyond.yaml`.

`compare` applies these criteria to what was measured and words the verdicts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dyrate_lib import paths
from dyrate_lib.errors import InputError, ResourceError

FIRST, BEYOND = "claims.yaml", "claims_beyond.yaml"

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


def _expand(raw: Mapping[str, Any], min_n: int, claim: str, file: str) -> Iterable[Check]:
    unknown = set(raw) - {"id", "quantity", "op", "value", "core", "min_n", "exact", "note", "for_each"}
    if unknown:
        raise InputError(f"{file}, {claim}: unknown field {sorted(unknown)} in check {raw.get('id')!r}")
    if raw["op"] not in _OPS:
        raise InputError(f"{file}, {claim}: op {raw['op']!r} is not one of {', '.join(_OPS)}")
    is_range = isinstance(raw["value"], list)
    if is_range != (raw["op"] == "within") or (is_range and len(raw["value"]) != 2):
        raise InputError(f"{file}, {claim}: only op 'within' takes a value [low, high], in check {raw['id']!r}")
    value = (float(raw["value"][0]), float(raw["value"][1])) if is_range else float(raw["value"])
    names = raw.get("for_each", {})
    for combination in itertools.product(*names.values()):
        filled = dict(zip(names, map(str, combination), strict=True))
        yield Check(
            id=raw["id"].format(**filled), quantity=raw["quantity"].format(**filled), op=raw["op"], value=value,
            core=bool(raw.get("core", False)), min_n=int(raw.get("min_n", min_n)), exact=bool(raw.get("exact", False)),
            note=raw.get("note", ""),
        )  # fmt: skip


def claims_file(path: Path | str | None, name: str = FIRST) -> tuple[dict[str, Any], str]:
    """A file of criteria as read, and its name."""
    file = Path(path) if path else paths.paper() / name
    if not file.is_file():
        raise ResourceError(f"{file.name} is missing from data/paper: get a full checkout")
    return yaml.safe_load(file.read_text(encoding="utf-8")), file.name


def claims(path: Path | str | None = None, beyond: bool = False) -> dict[str, Claim]:
    """All claims by id, read from `data/paper/claims.yaml` (or `path`), checks written out.

    beyond: with those of `claims_beyond.yaml`, which replace the ones of the same id.

    Raises:
        InputError: a malformed check, or a claim that nothing could refute.
    """
    raw, file = claims_file(path)
    out: dict[str, Claim] = {}
    for key, c in raw["claims"].items():
        checks = tuple(check for r in c["checks"] for check in _expand(r, int(raw["min_n"]), key, file))
        if not any(check.core for check in checks):
            raise InputError(f"{file}, {key}: no check is marked core, so nothing could refute the claim")
        out[key] = Claim(
            key, c["title"], c["text"].strip(), c["paper"], c["notebook"], checks,
            c.get("measured_as", "").strip(), c.get("beyond", "").strip(),
        )  # fmt: skip
    return out | claims(paths.paper() / BEYOND) if beyond else out
