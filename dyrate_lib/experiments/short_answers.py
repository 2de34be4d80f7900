"""Notebook 03: Table I on scenes. The seven short-answer tasks under every method; the half that computes records.

Three kinds of rows: the methods that Table I prints, at the settings it gives; DyRate, with one constant rate at DyRate's own
cost as its control; and every rival at the budget that DyRate is trained for, by the search of `equal_budget`, for each
task's own prompts and reply lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..methods import Method, RatePath
from ..scenes.tasks import PROMPTS_A_PICTURE, base_task
from .benchmarks import Row, remembered
from .cells import Record
from .context import Study
from .equal_budget import BY_KEY, Rival, fit, models, reaches, rivals_and_ours
from .roles import TABLE1
from .sharing import Job, work_off
from .training_runs import LAYER, kept_for_ratio

WITH_TEXT = "textvqa-ocr"  # TextVQA's other protocol
PRINTED = (
    ("original", "Original", "original"),
    ("fastv-3", "FastV (P=3, R=0.5)", "fastv-3"),
    ("fastv-2", "FastV (P=2, R=0.5)", "fastv-2"),
    ("vtw", "VTW (half depth)", "vtw"),
)
DYRATE = ("dyrate", "DyRate (target 0.333)", "dyrate")
CONSTANT = ("constant", "Fixed rate at DyRate's cost", "fixed")
BOTH_PROTOCOLS = ("original", "fastv-2", "dyrate")
AT_BUDGET = "equal:"  # what the keys of rivals at equal budget begin with


def tasks(study: Study) -> tuple[str, ...]:
    """The seven tasks in Table I's order; none on published pictures, whose benchmarks lmms-eval runs."""
    return tuple(TABLE1) if study.on_scenes else ()


def roles(study: Study) -> tuple[str, ...]:
    """The tasks, and TextVQA once more with the text in the prompt."""
    return (*tasks(study), WITH_TEXT) if study.on_scenes else ()


def methods(study: Study, key: str, role: str) -> dict[str, tuple[str, str, Callable[[], list[Method]]]]:
    """The rows of a task: key -> (label, style, methods); several methods are seeds of one row.

    A rival whose reach does not hold the budget has none. To build the methods may need records: the unpruned model's replies
    for the searches, DyRate's for the constant rate of its cost.
    """
    seeds, level = study.scale.predictor_seeds, study.scale.equal_level
    made: dict[str, tuple[str, str, Callable[[], list[Method]]]] = {
        name: (label, style, lambda name=name: [study.method(name, key)])  # type: ignore[misc]
        for name, label, style in PRINTED
    }
    made[DYRATE[0]] = (*DYRATE[1:], lambda: [study.method("dyrate", key, seed=seed) for seed in seeds])
    if role == WITH_TEXT:
        return {name: made[name] for name in BOTH_PROTOCOLS}
    made[CONSTANT[0]] = (*CONSTANT[1:], lambda: [constant(study, key, role)])
    proof = study.scale.name != "full" and role != next(iter(TABLE1))  # at smoke scale one task shows that it runs
    for rival in () if proof else rivals_and_ours(study):
        label = f"{rival.label.removesuffix(' (our reading)')} at {100 * level:.0f} %"

        def at_budget(rival: Rival = rival) -> list[Method]:
            found = fit(study, key, role, rival, level)
            return [found.method] if reaches(found) else []

        made[AT_BUDGET + rival.key] = (label, rival.style, at_budget)
    return made


def constant(study: Study, key: str, role: str) -> Method:
    """One rate for every step, FastV's ranking, that costs what DyRate's replies to this task cost on average."""
    cells = [study.captions(key, role, study.method("dyrate", key, seed=seed)) for seed in study.scale.predictor_seeds]
    n_image = study.info(key).n_image_tokens
    return RatePath(LAYER, ((n_image - kept_for_ratio(study, key, cells)) / n_image,))


def rows(study: Study, key: str, role: str) -> list[Row]:
    """The rows of one task for one model, unpruned first."""
    return remembered(study, ("short answers", key, role), lambda: _rows(study, key, role))


def _rows(study: Study, key: str, role: str) -> list[Row]:
    found = [
        Row(name, label, style, tuple(study.captions(key, role, method) for method in made()))
        for name, (label, style, made) in methods(study, key, role).items()
    ]
    return [row for row in found if row.cells]


def unreached(study: Study) -> list[dict[str, Any]]:
    """The rivals that have no setting for the budget on a task: model, task, method, and from where to where they reach."""
    out = []
    for key in models(study):
        for task in tasks(study):
            there = {row.key for row in rows(study, key, task)}
            for name, (label, _, _) in methods(study, key, task).items():
                if name not in there:
                    found = fit(study, key, task, BY_KEY[name.removeprefix(AT_BUDGET)], study.scale.equal_level)
                    out.append(
                        {"model": study.label(key), "task": TABLE1[task][1], "method": label, "from %": 100 * found.lowest,
                         "to %": 100 * found.highest}
                    )  # fmt: skip
    return out


# ----------------------------------------------------------------------------------------------------------- records


def jobs(study: Study, keys: Sequence[str]) -> list[list[Job]]:
    """The cells by model and task, tasks with the most prompts first; TextVQA's two protocols share their pictures."""
    groups = []
    for task in sorted(tasks(study), key=lambda task: -PROMPTS_A_PICTURE[base_task(task)]):
        for key in keys:
            both = (task, WITH_TEXT) if base_task(WITH_TEXT) == task else (task,)
            groups.append([job for role in both for job in _jobs(study, key, role)])
    return groups


def _jobs(study: Study, key: str, role: str) -> list[Job]:
    def job(name: str, made: Callable[[], list[Method]]) -> Job:
        what = f"{study.model_name(key)}/{role}/{study.scale.n_tasks}/{name}"
        return Job(what, lambda: [study.captions(key, role, method) for method in made()])

    return [job(name, made) for name, (_, _, made) in methods(study, key, role).items()]


def compute(study: Study, models_asked: Sequence[str] | None = None) -> list[Record]:
    """Every record of Table I, of some models only if given; processes that share the store take different cells."""
    return work_off(study, jobs(study, [key for key in models(study) if models_asked is None or key in models_asked]))


def prompts(study: Study) -> int:
    """How many prompts all cells of these tables are together: what the run's time goes with."""
    n = study.scale.n_tasks
    return sum(
        n * PROMPTS_A_PICTURE[base_task(role)] * (len(made) - 1 + len(study.scale.predictor_seeds))
        for key in models(study)
        for role in roles(study)
        for made in [methods(study, key, role)]
    )


def quantities(study: Study) -> dict[str, Any]:
    """What C10 of claims_beyond.yaml is judged by, task by task."""
    from .short_answer_scores import quantities

    return quantities(study)
