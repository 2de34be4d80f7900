"""Verdicts as notebook 07 words them: what decides a claim, what it hangs on, and under which condition it would be another.

Pure functions of the measured quantities (name -> number or {mean, lo, hi, n}) and of the criteria in `data/paper`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from .. import paths
from ..compare import CANNOT_JUDGE, Verdict, claims, judge, summary_line
from ..criteria import Check, Claim, Quantity
from .claim_words import QUESTIONS

# what a segment of a quantity's name stands for: (kind of condition, label)
SEGMENTS: dict[str, tuple[str, str]] = {
    "small": ("model", "small"), "base": ("model", "base"), "7b": ("model", "7B"), "13b": ("model", "13B"),
    "coco": ("kind of captions", "short"), "nocaps": ("kind of captions", "short, unseen pairs"),
    "flickr30k": ("kind of captions", "narrative"), "short": ("kind of captions", "short"),
    "narrative": ("kind of captions", "narrative"), "late": ("kind of captions", "late"),
    "shallow": ("depth", "shallow"), "deep": ("depth", "deep"),
    "gqa": ("task", "GQA"), "vizwiz": ("task", "VizWiz"), "scienceqa": ("task", "ScienceQA"), "textvqa": ("task", "TextVQA"),
    "pope": ("task", "POPE"), "mmbench": ("task", "MMBench"), "mme": ("task", "MME"),
}  # fmt: skip


@functools.cache
def _claims(folder: Path) -> dict[str, Claim]:
    return claims(beyond=True)


def all_claims() -> dict[str, Claim]:
    """Every claim, C1 to C15 by number and F3 last. Read once for each folder of criteria, which takes a moment."""
    found = _claims(paths.paper())
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != "C", int(item[0][1:]))))


def verdicts(measured: Mapping[str, Any]) -> dict[str, Verdict]:
    """The verdict on every claim, in the order of `all_claims`."""
    return {key: judge(claim, measured) for key, claim in all_claims().items()}


def verdict_line(measured: Mapping[str, Any]) -> str:
    """One stable line for all claims."""
    return summary_line(verdicts(measured))


def shortfall(check: Check, measured: Mapping[str, Any]) -> float | None:
    """By how much a check misses its criterion, in the quantity's own unit; negative is slack. None where it cannot be judged.

    On the criterion itself it is 0, whether the check takes that for held (>=) or not (>).
    """
    if check.outcome(measured)[0] is None:
        return None
    shown, value = judged_end(check, Quantity.of(measured[check.quantity])), check.value
    if isinstance(value, tuple):
        return max(value[0] - shown, shown - value[1])
    return value - shown if ">" in check.op else shown - value


def judged_end(check: Check, quantity: Quantity) -> float:
    """The number that a check looks at: the estimate, or an end of its interval."""
    end = quantity.lo if check.op.startswith("lo") else quantity.hi if check.op.startswith("hi") else quantity.mean
    return float("nan") if end is None else end


def kinds(checks: Sequence[Check]) -> list[tuple[Check, ...]]:
    """Checks that were written as one, for several models, sets or tasks: same criterion, same weight, same note."""
    found: dict[tuple, list[Check]] = {}
    for check in checks:
        found.setdefault((check.op, check.value, check.core, check.note, _stem(check.quantity)), []).append(check)
    return [tuple(group) for group in found.values()]


def _stem(quantity: str) -> str:
    """The end of a quantity's name, of differences without what is subtracted."""
    return quantity.rsplit(".", 1)[-1].partition("_minus_")[0]


def decisive(claim: Claim, measured: Mapping[str, Any]) -> Check:
    """The check that a reader should see: the worst case of the first kind of core check that fails.

    Where all of those hold, of the first kind of other checks that fails; where everything holds, of the first kind of core
    check. Where the claim cannot be judged, the first check that cannot.
    """
    outcomes = {check: check.outcome(measured)[0] for check in claim.checks}
    missing = [check for check, held in outcomes.items() if held is None]
    if missing:
        return missing[0]
    core = [check for check in claim.checks if check.core]
    failed = [check for check in claim.checks if not outcomes[check]]
    pool = [check for check in failed if check.core] or failed or core
    first = next(group for group in kinds(claim.checks) if pool[0] in group)
    return max((check for check in pool if check in first), key=lambda check: shortfall(check, measured) or 0.0)


@dataclass(frozen=True)
class Count:
    """How many checks of a kind hold, of how many, and the line of evidence of the worst (of one that cannot be judged first)."""

    core: bool
    held: int
    of: int
    judged: int
    line: str


def counts(claim: Claim, measured: Mapping[str, Any]) -> list[Count]:
    """One entry a kind of check, in the order of the criteria."""
    out = []
    for group in kinds(claim.checks):
        outcomes = [check.outcome(measured) for check in group]
        short = [float("inf") if (by := shortfall(check, measured)) is None else by for check in group]
        worst = short.index(max(short))
        out.append(Count(group[0].core, sum(held is True for held, _ in outcomes), len(group),
                         sum(held is not None for held, _ in outcomes), outcomes[worst][1]))
    return out


def _labels(check: Check) -> dict[str, str]:
    return dict(SEGMENTS[part] for part in check.quantity.split(".")[1:-1] if part in SEGMENTS)


def by_condition(claim: Claim, measured: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The verdict if only one model, one kind of captions, one depth or one task had been asked: kind -> label -> verdict.

    Kinds with one label only, and labels without a core check, tell nothing and are left out.
    """
    found: dict[str, dict[str, list[Check]]] = {}
    for check in claim.checks:
        for kind, label in _labels(check).items():
            found.setdefault(kind, {}).setdefault(label, []).append(check)
    out: dict[str, dict[str, str]] = {}
    for kind, groups in found.items():
        judged = {
            label: judge(dataclasses.replace(claim, checks=tuple(checks)), measured).verdict
            for label, checks in groups.items()
            if any(check.core for check in checks)
        }
        if len(judged) > 1:
            out[kind] = judged
    return out


def turning_points(claim: Claim, measured: Mapping[str, Any]) -> list[str]:
    """For each kind of core check of which some fail: the criterion at which all of them would hold. Lines of text."""
    out = []
    for group in kinds([check for check in claim.checks if check.core]):
        failed = [check for check in group if check.outcome(measured)[0] is False]
        if not failed or isinstance(group[0].value, tuple):
            continue
        ends = [judged_end(check, Quantity.of(measured[check.quantity])) for check in failed]
        worst = min(ends) if ">" in group[0].op else max(ends)
        name = failed[ends.index(worst)].id
        out.append(
            f"{len(failed)} of {len(group)} fail {group[0].condition}; the criterion would have to be {worst:.3g} ({name})"
        )
    return out


def conditions_line(claim: Claim, measured: Mapping[str, Any]) -> str:
    """What the verdict would be for one model, kind of captions, depth or task alone, where that is another one."""
    whole = judge(claim, measured).verdict
    if whole == CANNOT_JUDGE:
        able = {
            k: {label: v for label, v in by.items() if v != CANNOT_JUDGE}
            for k, by in by_condition(claim, measured).items()
        }
        told = [f"{label} alone: {v}" for by in able.values() for label, v in by.items()]
        return "; ".join(told) or "nothing can be said for any part of it either"
    split = by_condition(claim, measured)
    told = [f"{label} alone: {v}" for by in split.values() for label, v in by.items() if v != whole]
    if not split:
        return "the checks are not divided by model, captions or task"
    return "; ".join(told) or f"the same for every {' and every '.join(split)} alone"


def verdict_table(measured: Mapping[str, Any]) -> pd.DataFrame:
    """One row a claim: question, verdict, how many checks hold (core, all), what decides, what it would be for a part alone."""
    rows = []
    for key, claim in all_claims().items():
        verdict, core = judge(claim, measured), [check for check in claim.checks if check.core]
        held = {check: check.outcome(measured)[0] is True for check in claim.checks}
        rows.append(
            {
                "claim": key, "question": QUESTIONS[key], "verdict": verdict.verdict,
                "core checks that hold": f"{sum(held[check] for check in core)} of {len(core)}",
                "all checks": f"{sum(held.values())} of {len(held)}",
                "what decides": decisive(claim, measured).outcome(measured)[1],
                "for a part alone": conditions_line(claim, measured),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)
