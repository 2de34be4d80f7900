"""Notebook 03's cells on captions and on version 1's questions, shared out among processes that start together.

The records are those of `benchmarks` and `equal_budget`, cell by cell as jobs; only the old curves are left to `fronts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from . import benchmarks, equal_budget
from .benchmarks import EXTRAS, caption_methods, matched_random, refreshed_fastv, refreshed_models
from .cells import Record
from .context import Study
from .equal_budget import RIVALS, equal_n, equal_rows, fit, position_rows, reaches, released_rows
from .sharing import Job, work_off
from .training_runs import BUDGET, fixed_cell

QUESTIONS = ("original", "fastv-3", "fastv-2", "vtw", "random", "dyrate")


def jobs(study: Study, keys: Sequence[str]) -> list[list[Job]]:
    """Groups by model and set: Table II's rows, then the rivals at equal budget and what else is asked of that set."""
    groups = [[_job(study, key, "vtw search", partial(_search, study, key))] for key in keys]
    for role in study.roles:
        groups += [_captions(study, key, role) for key in keys]
    if study.on_scenes:
        groups += [_questions(study, key) for key in keys]
    return groups


def _job(study: Study, key: str, name: str, run: Callable[[], list[Record]]) -> Job:
    scale = study.scale
    return Job(f"{study.model_name(key)}/{scale.name}/{scale.n_captions}/{scale.n_questions}/{name}", run)


def _captions(study: Study, key: str, role: str) -> list[Job]:
    first = role == study.roles[0]
    names = ["original", "fastv-3", "fastv-2", "vtw", "random", "dyrate", "vtw-search"]
    names += [f"dyrate-{target:g}" for target in study.scale.targets if target != BUDGET]
    proof = study.scale.name != "full" and role != "coco"
    found = [
        _job(study, key, f"{role}/{name}", partial(_row, study, key, role, name))
        for name in names
        if not (proof and name in EXTRAS)
    ]
    if role == "coco":
        found.append(_job(study, key, "coco/matched", lambda: [matched_random(study, key), fixed_cell(study, key)]))
        if key in refreshed_models(study):
            found.append(_job(study, key, "coco/refreshed", lambda: [refreshed_fastv(study, key)]))
    if key in equal_budget.models(study) and role in equal_budget.roles(study):
        found += _equal(study, key, role)
        if first:
            found.append(_job(study, key, f"{role}/released", lambda: _cells(released_rows(study, key, role))))
    return found


def _equal(study: Study, key: str, role: str) -> list[Job]:
    level, n = study.scale.equal_level, equal_n(study, role)

    def rival(name: str) -> list[Record]:
        found = fit(study, key, role, equal_budget.BY_KEY[name], level)
        return [study.captions(key, role, found.method, n=n)] if reaches(found) else []

    whole = [_job(study, key, f"{role}/equal/{r.key}", partial(rival, r.key)) for r in RIVALS]
    rest = _job(study, key, f"{role}/equal", lambda: _cells(equal_rows(study, key, role)))
    kept = _job(study, key, f"{role}/positions", lambda: _cells(position_rows(study, key, role)))
    return [*whole, rest, *([kept] if role in equal_budget.curve_roles(study) else [])]


def _questions(study: Study, key: str) -> list[Job]:
    found = [_job(study, key, f"questions/{name}", partial(_row, study, key, "questions", name)) for name in QUESTIONS]
    if key in equal_budget.models(study):
        found.append(_job(study, key, "questions/equal", lambda: _cells(equal_rows(study, key, "questions"))))
        found.append(_job(study, key, "questions/positions", lambda: _cells(position_rows(study, key, "questions"))))
    return found


def _search(study: Study, key: str) -> list[Record]:
    return [benchmarks.vtw_search(study, key)]


def _row(study: Study, key: str, role: str, name: str) -> list[Record]:
    """The cells of one of Table II's rows; [] for VTW's searched layer where its search finds none."""
    made = {kind: methods for kind, _, _, methods in caption_methods(study, key)}
    return [study.captions(key, role, method) for method in made[name]()] if name in made else []


def _cells(rows: Sequence[benchmarks.Row]) -> list[Record]:
    return [cell for row in rows for cell in row.cells]


def compute(study: Study, models: Sequence[str] | None = None) -> list[Record]:
    """Every reply of notebook 03 but the tasks' and the fronts', of some models only if given.

    What pruning itself costs is not among them: it is timed, and wants the device for itself.
    """
    return work_off(study, jobs(study, tuple(models or study.keys)))
