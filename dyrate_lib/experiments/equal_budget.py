"""Notebook 03: every method at one FLOPs budget, and the curves of quality against FLOPs. The expensive half.

The budget is counted as the tables count it: paper's convention, for the prompts and the mean reply length of the
unpruned model on the same set. Replies differ in length under pruning, so what a row really cost is shown beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..budgets import TOLERANCE, Fit, fit_budget
from ..methods import (
    ST3,
    VTW,
    CDPruner,
    DivPrune,
    FastV,
    MergeRate,
    Method,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    RandomPrune,
    SparseVLM,
    VisionZip,
)
from .benchmarks import Row, remembered
from .context import Record, Study
from .kept_positions import RENUMBER, WHOLE, with_positions
from .training_runs import BUDGET

CURVE_ROLES = ("coco", "flickr30k", "late", "questions")  # short, narrative and late captions, and questions
QUESTIONS_SHARE = 2  # questions of a curve's cell for each picture of a caption's: answers are short and vary more


@dataclass(frozen=True)
class Rival:
    """A method in the tables at equal budget: its key and colour, its label, and the kind whose setting is searched."""

    key: str
    label: str
    style: str
    make: Callable[[], Method]


RIVALS = (
    Rival("random", "Random (P=2)", "random", lambda: RandomPrune(2)),
    Rival("fastv", "FastV (P=2)", "fastv-2", lambda: FastV(2)),
    Rival("vtw", "VTW (nearest layer)", "vtw", VTW),
    Rival("sparsevlm", "SparseVLM", "sparsevlm", SparseVLM),
    Rival("pyramiddrop", "PyramidDrop", "pyramiddrop", PyramidDrop),
    Rival("st3", "ST3-style (our reading)", "st3", ST3),
    Rival("visionzip", "VisionZip", "visionzip", VisionZip),
    Rival("prumerge", "PruMerge (fixed count)", "prumerge", PruMerge),
    Rival("prumerge+", "PruMerge+ (fixed count)", "prumerge+", PruMergePlus),
    Rival("divprune", "DivPrune", "divprune", DivPrune),
    Rival("cdpruner", "CDPruner", "cdpruner", CDPruner),
)
SMOKE = ("random", "fastv", "sparsevlm", "visionzip")  # at smoke scale these alone answer questions and are set twice
# in Table I and on the fronts; the tables at equal budget and their old curves have no records of it yet
OURS = (Rival("merge", "MergeRate (ours)", "merge", lambda: MergeRate(rates=(0.5,))),)
BY_KEY = {rival.key: rival for rival in (*RIVALS, *OURS)}


# ------------------------------------------------------------------------------------------------------- settings


def run_shape(study: Study, key: str, role: str) -> dict[str, int]:
    """The run that is counted: median prompt, image tokens and mean passes of the unpruned model's replies to a set."""
    return run_shape_of(study.captions(key, role, study.method("original", key)))


def run_shape_of(record: Record) -> dict[str, int]:
    """The same of a record of captions."""
    payload = record["payload"]
    return {
        "prompt_length": int(np.median([row["prompt_length"] for row in payload])),
        "n_image": int(np.median([row["n_image"] for row in payload])),
        "steps": round(float(np.mean([row["steps"] for row in payload]))),
    }


def fit(study: Study, key: str, role: str, rival: Rival, level: float) -> Fit:
    """The rival's setting nearest to a share `level` of the unpruned FLOPs, in the paper's convention."""

    def search() -> Fit:
        return fit_budget(rival.make(), study.info(key), flops=level, convention="paper", **run_shape(study, key, role))

    return remembered(study, ("fit", key, role, rival.key, level), search)


def reaches(found: Fit) -> bool:
    """Whether the budget lies within the method's reach; between two whole layers the nearer one is taken."""
    return abs(found.error) <= TOLERANCE or found.lowest <= found.wanted <= found.highest


# ------------------------------------------------------------------------------------------------------------ cells


def models(study: Study) -> tuple[str, ...]:
    """The models of these tables: both sizes, at smoke scale the small one alone."""
    return study.keys if study.scale.name == "full" else study.keys[:1]


def roles(study: Study) -> tuple[str, ...]:
    """The caption sets of the table at equal budget: all of them, at smoke scale the first."""
    return study.roles if study.scale.name == "full" else study.roles[:1]


def curve_roles(study: Study) -> tuple[str, ...]:
    """The sets that curves are drawn on: a set without budgets of its own at this scale is left out."""
    return tuple(role for role in CURVE_ROLES if levels(study, role) and (study.on_scenes or role in study.roles))


def rivals(study: Study, all_of: bool = True) -> tuple[Rival, ...]:
    """The rivals; at smoke scale only some of them where not all are needed."""
    return RIVALS if all_of or study.scale.name == "full" else tuple(BY_KEY[key] for key in SMOKE)


def rivals_and_ours(study: Study) -> tuple[Rival, ...]:
    """Every rival (at smoke scale some), and our own method, which is judged by the same table."""
    return (*rivals(study, all_of=False), *OURS)


def levels(study: Study, role: str, key: str = "") -> tuple[float, ...]:
    """The budgets of a set's curve; of model `key` if given, whose curve may be a single point."""
    if f"{key}:{role}" in study.scale.one_budget:
        return (study.scale.equal_level,)
    return study.scale.pareto_levels if role == "coco" else study.scale.family_levels


def part(record: Record, n: int) -> Record:
    """The first n pictures of a record of captions."""
    return record if len(record["payload"]) <= n else {**record, "payload": record["payload"][:n]}


def equal_n(study: Study, role: str) -> int:
    """Pictures (or questions) of each cell of the tables at equal budget: of the short sets all, else those of the curves."""
    return len(study.dataset(role)) if role in ("coco", "nocaps") else curve_n(study, role)


def equal_rows(study: Study, key: str, role: str) -> list[Row]:
    """Every method at the scale's budget on one set (captions or questions): unpruned, the rivals, DyRate."""
    return remembered(study, ("equal", key, role), lambda: _equal_rows(study, key, role))


def _equal_rows(study: Study, key: str, role: str) -> list[Row]:
    level, seeds, n = study.scale.equal_level, study.scale.predictor_seeds, equal_n(study, role)
    original = part(study.captions(key, role, study.method("original", key)), n)
    rows = [Row("original", "Original", "original", (original,))]
    for rival in rivals(study, all_of=role != "questions"):
        found = fit(study, key, role, rival, level)
        if reaches(found):
            rows.append(Row(rival.key, rival.label, rival.style, (study.captions(key, role, found.method, n=n),)))
    made = [study.method("dyrate", key, target=BUDGET, seed=seed) for seed in seeds]
    cells = tuple(part(study.captions(key, role, method), n) for method in made)
    return [*rows, Row("dyrate", "DyRate (trained for 0.333)", "dyrate", cells)]


RELEASED: tuple[tuple[str, str, str, Callable[[], Method]], ...] = (
    ("sparsevlm-released", "SparseVLM (192)", "sparsevlm", SparseVLM),
    ("pyramiddrop-released", "PyramidDrop", "pyramiddrop", PyramidDrop),
    ("st3-released", "ST3-style", "st3", ST3),
    ("visionzip-released", "VisionZip (54 + 10)", "visionzip", VisionZip),
    ("prumerge-adaptive", "PruMerge (adaptive)", "prumerge", PruMerge),
    ("prumerge+-adaptive", "PruMerge+ (adaptive)", "prumerge+", PruMergePlus),
    ("divprune-released", "DivPrune", "divprune", DivPrune),
    ("cdpruner-released", "CDPruner", "cdpruner", CDPruner),
)


def released_rows(study: Study, key: str, role: str = "coco") -> list[Row]:
    """The methods that Table II does not have, at the settings that their code is released with; none at smoke scale."""
    if study.scale.name != "full":
        return []
    rows = [("original", "Original", "original", lambda: study.method("original", key)), *RELEASED]
    return remembered(
        study, ("released", key, role),
        lambda: [Row(name, label, style, (study.captions(key, role, make()),)) for name, label, style, make in rows],
    )  # fmt: skip


def position_rows(study: Study, key: str, role: str = "coco") -> list[Row]:
    """Methods that renumber, at the common budget, each with positions renumbered and kept; none at smoke scale.

    Those that merge are run so on the short captions alone, and the late captions are left out: time is scarce.
    """
    if study.scale.name != "full" or role == "late" or f"{key}:{role}" in study.scale.one_budget:
        return []
    return remembered(study, ("positions", key, role), lambda: _position_rows(study, key, role))


def _position_rows(study: Study, key: str, role: str) -> list[Row]:
    rows = []
    for row in equal_rows(study, key, role):
        if row.key in RENUMBER and (role == "coco" or row.key in WHOLE):
            method = with_positions(row.key, fit(study, key, role, BY_KEY[row.key], study.scale.equal_level).method)
            cell = study.captions(key, role, method, n=equal_n(study, role))
            rows += [row, Row(row.key, f"{row.label}, positions kept", row.style, (cell,))]
    return rows


def curve_n(study: Study, role: str) -> int:
    """Pictures (or questions) of each cell of a curve."""
    n = study.scale.n_pareto * (QUESTIONS_SHARE if role == "questions" else 1)
    return min(n, len(study.dataset(role)))


@dataclass(frozen=True)
class Point:
    """One cell of a curve: the method's key, the budget asked for, and the replies behind it (several for several seeds)."""

    key: str
    level: float
    row: Row


def curve(study: Study, key: str, role: str) -> list[Point]:
    """Every method at every budget that it reaches, on the first pictures of a set; DyRate at what it was trained for."""
    return remembered(study, ("curve", key, role), lambda: _curve(study, key, role))


def _curve(study: Study, key: str, role: str) -> list[Point]:
    n, out = curve_n(study, role), []
    equal = {row.key: row for row in equal_rows(study, key, role)} if _has_equal(study, role) else {}
    for rival in RIVALS:
        for level in levels(study, role, key):
            found = fit(study, key, role, rival, level)
            if not reaches(found) or rival not in rivals(study, all_of=level == study.scale.equal_level):
                continue
            if level == study.scale.equal_level and rival.key in equal:  # the same pictures, without running them again
                cell = part(equal[rival.key].cells[0], n)
            else:
                cell = study.captions(key, role, found.method, n=n)
            out.append(Point(rival.key, level, Row(rival.key, rival.label, rival.style, (cell,))))
    for target in _targets(study, role, key):
        cells = dyrate_cells(study, key, role, target, n, whole=role != "questions" or target == BUDGET)
        out.append(Point("dyrate", target, Row("dyrate", "DyRate", "dyrate", cells)))
    return out


def dyrate_seeds(study: Study, target: float) -> tuple[int, ...]:
    """The seeds that a curve shows a target by: every one at the paper's budget, else the first."""
    return study.scale.predictor_seeds[: None if target == BUDGET else 1]


def dyrate_cells(study: Study, key: str, role: str, target: float, n: int, whole: bool) -> tuple[Record, ...]:
    """DyRate at a target on the first n pictures of a set. whole: other tables have these cells, so they are cut to n."""
    made = [study.method("dyrate", key, target=target, seed=seed) for seed in dyrate_seeds(study, target)]
    return tuple(part(study.captions(key, role, method, n=None if whole else n), n) for method in made)


def _has_equal(study: Study, role: str) -> bool:
    return role == "questions" or role in roles(study)


def _targets(study: Study, role: str, key: str) -> tuple[float, ...]:
    """DyRate's targets on a set; at smoke scale those that Table II has there anyway."""
    every = role == "coco" or study.scale.name == "full"
    return study.scale.targets if every and f"{key}:{role}" not in study.scale.one_budget else (BUDGET,)


def unreached(study: Study) -> list[tuple[str, str, str, Fit]]:
    """(rival, model, set, what its settings reach) of the budgets of the curves that a method cannot meet."""
    return missed(study, [(key, role, levels(study, role, key)) for key in models(study) for role in curve_roles(study)])


def missed(
    study: Study, asked: Sequence[tuple[str, str, Sequence[float]]], who: Sequence[Rival] = RIVALS
) -> list[tuple[str, str, str, Fit]]:
    """(rival, model, set, what its settings reach) of the budgets that a method cannot meet, of (model, set, budgets)."""
    return [
        (rival.key, key, role, found)
        for key, role, budgets in asked
        for rival in who
        for level in budgets
        if not reaches(found := fit(study, key, role, rival, level))
    ]


def compute(study: Study, keys: Sequence[str] | None = None) -> list[Record]:
    """Every caption and answer of the tables at equal budget and of the curves."""
    found: list[Record] = []
    chosen = [key for key in models(study) if keys is None or key in keys]
    sets: list[Any] = [(key, role) for key in chosen for role in roles(study)]
    sets += [(key, "questions") for key in chosen if study.on_scenes]
    for key, role in study.each(sets, "equal budgets"):
        found += [cell for row in equal_rows(study, key, role) for cell in row.cells]
    found += [cell for key in chosen for row in released_rows(study, key) for cell in row.cells]
    for key, role in study.each([(key, role) for key in chosen for role in curve_roles(study)], "curves"):
        found += [cell for point in curve(study, key, role) for cell in point.row.cells]
        found += [cell for row in position_rows(study, key, role) for cell in row.cells]
    return found
