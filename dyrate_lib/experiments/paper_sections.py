"""Notebook 07's sections in Markdown: the setting, and for each claim question, evidence, verdict, and what it hangs on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..compare import judge
from ..criteria import Claim
from .claim_words import FIGURES, QUESTIONS
from .conditions import changes, claim_of
from .context import Study
from .paper_verdicts import all_claims, conditions_line, counts, turning_points
from .paper_words import extent_line


def setting(study: Study, measured: Mapping[str, Any]) -> str:
    """What was run on what: models, data, and how much there is to judge by."""
    models = ", ".join(study.label(key) for key in study.keys)
    data = "rendered scenes whose captions follow grammars" if study.on_scenes else f"the sets {study.data}"
    return f"Models: {models}. Data: {data}; seed {study.seed}, scale {study.scale.name}. {extent_line(measured)}."


def links(claim: str, folder: Path) -> str:
    """The figures of a claim that lie in `folder`, as Markdown links from the notebooks' folder; '' without any."""
    found = [file.stem for start in FIGURES[claim] for file in sorted(folder.glob(f"{start}*.png"))]
    return ", ".join(f"[{name}](../figures/{name}.png)" for name in found)


def section(claim: Claim, measured: Mapping[str, Any], figures: Path, elsewhere: str = "") -> str:
    """One claim. elsewhere: a line on other conditions (see `conditions.changes`)."""
    evidence = [
        f"- {'**core** ' if count.core else ''}{count.held} of {count.of} hold; "
        f"{'not judged' if count.judged < count.of else 'worst' if count.of > 1 else 'it is'}: {count.line}"
        for count in counts(claim, measured)
    ]  # fmt: skip
    seen = links(claim.id, figures)
    where = f"Notebook [{claim.notebook[:2]}]({claim.notebook}.ipynb)" + (f"; {seen}" if seen else "")
    turns = turning_points(claim, measured)
    hangs = [f"- A part alone: {conditions_line(claim, measured)}.", *(f"- The criterion: {line}." for line in turns)]
    if elsewhere:
        hangs.append(f"- Other conditions: {elsewhere}.")
    return "\n\n".join(
        [
            f"### {claim.id} {claim.title}",
            f"**Question.** {QUESTIONS[claim.id]} *Paper:* {claim.paper}.",
            "**Evidence.**" + (f" {claim.measured_as}" if claim.measured_as else "") + f" {where}.",
            "\n".join(evidence),
            f"**Verdict: {judge(claim, measured).verdict}.** What it hangs on:",
            "\n".join(hangs),
        ]
    )  # fmt: skip


def sections(measured: Mapping[str, Any], figures: Path, long: pd.DataFrame | None = None) -> str:
    """Every claim's section. long: the conclusions by condition, where they were measured."""
    told = [] if long is None or not len(long) else list(dict.fromkeys(long.conclusion))
    parts = []
    for key, claim in all_claims().items():
        mine = [conclusion for conclusion in told if claim_of(conclusion) == key]
        elsewhere = changes(long, mine) if long is not None and mine else ""
        parts.append(section(claim, measured, figures, elsewhere))
    return "\n\n".join(parts)
