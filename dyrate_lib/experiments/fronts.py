"""Notebook 03: quality against FLOPs from 10 to 80 %, every method. The half that computes records.

The curves of `equal_budget` on more budgets and pictures; cells that other tables have are cut to the first pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..budgets import Fit
from . import equal_budget, front_predictors
from .benchmarks import Row, remembered
from .context import Record, Study
from .equal_budget import OURS, RIVALS, Point, Rival, equal_n, fit, missed, models, part, reaches, rivals_and_ours
from .front_predictors import FAMILIES, ensure, targets
from .sharing import Job, work_off


def roles(study: Study) -> tuple[str, ...]:
    """Short, narrative and late captions; at smoke scale, and of published data, what there is of the first."""
    return FAMILIES if study.scale.name == "full" and study.on_scenes else study.roles[:1]


def levels(study: Study, role: str) -> tuple[float, ...]:
    """The budgets that every method is set to on a set."""
    return study.scale.front_levels if role == "coco" else study.scale.front_family_levels


def n_pictures(study: Study, role: str) -> int:
    """Pictures of each cell."""
    return min(study.scale.n_front, len(study.dataset(role)))


def settings(study: Study, key: str, role: str) -> list[tuple[Rival, float]]:
    """The rivals with the budgets that they reach."""
    pairs = [(rival, level) for rival in rivals_and_ours(study) for level in levels(study, role)]
    return [pair for pair in pairs if reaches(fit(study, key, role, *pair))]


def unreached(study: Study) -> list[tuple[str, str, str, Fit]]:
    """(rival, model, set, what its settings reach) of the budgets that a method has no setting for."""
    asked = [(key, role, levels(study, role)) for key in models(study) for role in roles(study)]
    return missed(study, asked, (*RIVALS, *OURS))


def rival_cell(study: Study, key: str, role: str, rival: Rival, level: float) -> Record:
    """Replies of a rival at a budget; at the common budget those of the tables at equal budget, where they have as many."""
    n, method = n_pictures(study, role), fit(study, key, role, rival, level).method
    shared = level == study.scale.equal_level and study.scale.name == "full" and equal_n(study, role) >= n
    return part(study.captions(key, role, method, n=equal_n(study, role) if shared else n), n)


def dyrate_cells(study: Study, key: str, role: str, target: float) -> tuple[Record, ...]:
    """Replies of DyRate at a target whose predictors are made sure of; those of Table II are cut."""
    for seed in equal_budget.dyrate_seeds(study, target):
        ensure(study, key, target, seed)
    whole = target in study.scale.targets
    return equal_budget.dyrate_cells(study, key, role, target, n_pictures(study, role), whole)


def original(study: Study, key: str, role: str) -> Row:
    """The unpruned model on the same pictures."""
    cell = part(study.captions(key, role, study.method("original", key)), n_pictures(study, role))
    return Row("original", "Original", "original", (cell,))


def points(study: Study, key: str, role: str) -> list[Point]:
    """Unpruned, every rival at every budget that it reaches, and DyRate at every target that it is trained for."""
    return remembered(study, ("front", key, role), lambda: _points(study, key, role))


def _points(study: Study, key: str, role: str) -> list[Point]:
    found = [Point("original", 1.0, original(study, key, role))]
    for rival, level in settings(study, key, role):
        cell = rival_cell(study, key, role, rival, level)
        found.append(Point(rival.key, level, Row(rival.key, rival.label, rival.style, (cell,))))
    for target in targets(study, key):
        found.append(Point("dyrate", target, Row("dyrate", "DyRate", "dyrate", dyrate_cells(study, key, role, target))))
    return found


# ----------------------------------------------------------------------------------------------------------- records


def jobs(study: Study, keys: Sequence[str]) -> list[list[Job]]:
    """Predictors by model with what they do on held-out pictures, then the cells by model and set."""
    full, scale = study.scale.name == "full", study.scale
    every = [
        (key, [(t, seed) for t in scale.front_targets for seed in front_predictors.seeds(study, t)]) for key in keys
    ]
    groups = [[_trained(study, key, *cell) for cell in cells] for key, cells in every if full]
    return groups + [_jobs(study, key, role) for key in keys for role in roles(study)]


def _trained(study: Study, key: str, target: float, seed: int) -> Job:
    def run() -> list[Record]:
        if target not in targets(study, key):
            return []
        return [*ensure(study, key, target, seed), front_predictors.schedule(study, key, target, seed)]

    return Job(f"{study.model_name(key)}/predictor/{target:g}/{seed}", run)


def _jobs(study: Study, key: str, role: str) -> list[Job]:
    """What is out of reach is found out when a job runs, as it takes the unpruned model's replies to know."""
    name = f"{study.model_name(key)}/{role}/{study.scale.n_front}"
    found = [Job(f"{name}/original", lambda: list(original(study, key, role).cells))]
    for rival in rivals_and_ours(study):
        for level in levels(study, role):

            def run(rival: Rival = rival, level: float = level) -> list[Record]:
                there = reaches(fit(study, key, role, rival, level))
                return [rival_cell(study, key, role, rival, level)] if there else []

            found.append(Job(f"{name}/{rival.key}/{level:g}", run))
    for target in study.scale.front_targets:

        def run_dyrate(target: float = target) -> list[Record]:
            return list(dyrate_cells(study, key, role, target)) if target in targets(study, key) else []

        found.append(Job(f"{name}/dyrate/{target:g}", run_dyrate))
    return found


def compute(study: Study, models_asked: Sequence[str] | None = None) -> list[Record]:
    """Every predictor and cell of the fronts, of some models only if given; processes that share the store share the work."""
    return work_off(study, jobs(study, [key for key in models(study) if models_asked is None or key in models_asked]))
