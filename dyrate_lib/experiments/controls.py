"""What a rate predictor should be fed with, whether dropping may be final, and how the budget is held: the records.

Predictors that differ in one thing are trained as notebook 02 trains the paper's (`controls_training`) and compared at equal
average FLOPs, in the paper's convention, on each set of captions. Where a rate does not hang on what the model sees (the step
number, nothing, the oracle's needs), its course is known beforehand: every kept share is multiplied by one factor, so that the
course costs on that set what the attention shares do there. The others cost what they cost; a few points of FLOPs more or less
are taken out of their scores by the slope of constant rates (`equal_cost`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..evaluate import predictor_hash
from ..methods import DyRate, Method, RatePath
from ..predictor_inputs import STEPS, oracle_rates
from . import equal_cost
from .benchmarks import remembered
from .budgets import fixed_for, reply_shapes
from .context import Record, Study
from .controls_training import Recipe, predictor, recipes, train
from .pieces import Piece, share
from .training_runs import LAYER

INPUTS = ("shares", "step", "none", "hidden", "foreign", "oracle")
PLANNED = ("step", "none", "oracle")  # their course is known before the reply
VARIANTS = ("final", "reversible", "reranked")


def models(study: Study) -> tuple[str, ...]:
    """The models of these experiments."""
    return tuple(key for key in study.keys if key in study.scale.control_models)


def roles(study: Study) -> tuple[str, ...]:
    """The caption sets, one a family; of published sets those that are there."""
    return tuple(role for role in study.scale.control_roles if role in study.roles) or study.roles[:1]


def inputs(study: Study) -> tuple[str, ...]:
    """The controls; without scenes no oracle, as nobody knows what the words need."""
    return INPUTS if study.on_scenes else INPUTS[:-1]


# ----------------------------------------------------------------------------------------------------------- cells


def unpruned(study: Study, key: str, role: str) -> Record:
    """Replies of the unpruned model."""
    return study.captions(key, role, n=study.scale.n_controls)


def cell(study: Study, key: str, role: str, method: Method | None) -> Record:
    """Replies under a method, of as many pictures as all cells of these experiments have."""
    return study.captions(key, role, method, n=study.scale.n_controls)


def ratio(record: Record, convention: str = "paper") -> float:
    """Mean FLOPs ratio of a record's replies."""
    return float(np.mean([entry["flops"][convention] for entry in record["payload"]]))


def learned(study: Study, key: str, role: str, recipe: Recipe, **options: Any) -> Record:
    """Replies under DyRate with the predictor of a recipe, as it was trained; options: further fields of `DyRate`."""
    made = predictor(train(study, key, recipe))
    return cell(study, key, role, DyRate(made, **options))


def reference(study: Study, key: str, role: str) -> float:
    """What the attention shares cost on a set, the mean over seeds: the cost at which all controls are compared."""

    def mean() -> float:
        return float(np.mean([ratio(learned(study, key, role, recipe)) for recipe in recipes(study)]))

    return remembered(study, ("shares' cost", key, role), mean)


def constant(study: Study, key: str, role: str, level: float, layer: int = LAYER) -> Record:
    """Replies under one constant rate from `layer` on whose cost comes nearest to `level`: FastV (P = 2) at that budget."""
    shapes = reply_shapes(unpruned(study, key, role))
    return cell(study, key, role, fixed_for(study.info(key), shapes, level, layer))


def control(study: Study, key: str, role: str, fed: str, seed: int) -> Record:
    """Replies under the predictor fed with one of `INPUTS`, at the shares' cost where that can be set beforehand."""
    recipe = Recipe(inputs=fed, seed=seed)
    if fed not in PLANNED:
        return learned(study, key, role, recipe)
    wanted = reference(study, key, role)
    if fed == "none":  # whatever rate was learnt, at this cost it is this one
        return constant(study, key, role, wanted)
    shapes = reply_shapes(unpruned(study, key, role))
    courses = planned(study, key, role, recipe)
    courses = remembered(
        study, ("matched", key, role, recipe, wanted),
        lambda: equal_cost.matched(study.info(key), shapes, courses, LAYER, wanted),
    )  # fmt: skip
    if len(courses) == 1:
        return cell(study, key, role, RatePath(LAYER, courses[0]))
    told = hashlib.sha256(json.dumps(courses).encode()).hexdigest()[:16]
    oracle = predictor_hash(predictor(train(study, key, recipe)))
    config = {"method": "oracle", "layer": LAYER, "predictor": oracle, "courses": told}
    return study.per_picture(
        key, role, lambda some: RatePath(LAYER, [courses[i] for i in some]), config, n=study.scale.n_controls
    )


def planned(study: Study, key: str, role: str, recipe: Recipe) -> list[list[float]]:
    """The rates over steps that a predictor of `PLANNED` names: one course for all pictures, of the oracle one a picture.

    The oracle is told what the tokens of the unpruned model's reply need; a token outside its family's grammar as one that needs
    nothing.
    """
    made = predictor(train(study, key, recipe))
    if recipe.inputs == "oracle":
        from .controls_needs import needs

        told = needs(study, unpruned(study, key, role), role)
        return [oracle_rates(made, [need or "none" for need in reply]) for reply in told]
    seen = torch.arange(STEPS) if recipe.inputs == "step" else torch.zeros(STEPS, 0)
    return [(made(seen).argmax(-1) / made.n_rates).tolist()]


def controls(study: Study, key: str, role: str, fed: str) -> list[Record]:
    """A control's cells, one a training seed (of "none" one in all: all seeds come to the same rate)."""
    made = recipes(study, Recipe(inputs=fed))
    return [control(study, key, role, fed, recipe.seed) for recipe in (made[:1] if fed == "none" else made)]


def variant(study: Study, key: str, role: str, name: str, seed: int) -> Record:
    """Replies under one of `VARIANTS`. The last two share a predictor: training ranks once, whatever the method does later."""
    if name == "final":
        return learned(study, key, role, Recipe(seed=seed))
    rank = "step" if name == "reranked" else "prefill"
    return learned(study, key, role, Recipe(seed=seed, reversible=True), rank=rank, reversible=True)


def variants(study: Study, key: str, role: str, name: str) -> list[Record]:
    """A variant's cells; on the short captions, which no claim reads, of the first seed beside the final one's."""
    made = recipes(study)[: 1 if role == "coco" and name != "final" else None]
    return [variant(study, key, role, name, recipe.seed) for recipe in made]


def constrained(study: Study, key: str, role: str, constraint: str) -> list[Record]:
    """Replies under predictors whose budget is held by a penalty (the paper's) or a Lagrangian."""
    return [learned(study, key, role, recipe) for recipe in recipes(study, Recipe(constraint=constraint))]


def curve(study: Study, key: str, role: str) -> list[Record]:
    """Constant rates: at the scale's levels and at the shares' cost."""
    levels = [*study.scale.control_levels, reference(study, key, role)]
    return [constant(study, key, role, level) for level in levels]


# -------------------------------------------------------------------------------------------------------- the work


def pieces(study: Study, keys: Sequence[str]) -> list[Piece]:
    """The records of the controls, the variants and the constraint, the dearest model's first, claims before the rest."""
    from .controls_needs import named

    out: list[Piece] = []
    ordered = sorted(keys, key=lambda key: key != "base")
    for key in ordered:
        out += [training(study, key, recipe) for fed in inputs(study) for recipe in recipes(study, Recipe(inputs=fed))]
        out += [training(study, key, recipe) for recipe in recipes(study, Recipe(reversible=True))]
    for key, role in ((key, role) for key in ordered for role in roles(study)):
        head = f"{key} {role}"
        out.append(Piece(f"{head} unpruned", partial(unpruned, study, key, role)))
        shares = []
        for recipe in recipes(study):
            name = f"{head} shares {recipe.seed}"
            shares.append(name)
            out.append(Piece(name, partial(learned, study, key, role, recipe), (f"{key} train {recipe}",)))
            if study.on_scenes:
                out.append(Piece(f"{name} named", partial(named, study, key, role, recipe), (name,)))
        after = (f"{head} unpruned", *shares)
        for level in study.scale.control_levels:
            out.append(Piece(f"{head} constant {level}", partial(constant, study, key, role, level), after[:1]))
        for fed in inputs(study)[1:]:
            made = recipes(study, Recipe(inputs=fed))
            for recipe in made[:1] if fed == "none" else made:
                need = (f"{key} train {recipe}", *(after if fed in PLANNED else ()))
                out.append(Piece(f"{head} {fed} {recipe.seed}", partial(control, study, key, role, fed, recipe.seed), need))
        for name in VARIANTS[1:]:
            for recipe in recipes(study)[: 1 if role == "coco" else None]:
                need = (f"{key} train {replace(recipe, reversible=True)}",)
                out.append(Piece(f"{head} {name} {recipe.seed}", partial(variant, study, key, role, name, recipe.seed), need))
    return out


def training(study: Study, key: str, recipe: Recipe) -> Piece:
    """A predictor's training as a piece of work."""
    return Piece(f"{key} train {recipe}", partial(train, study, key, recipe))


def compute(study: Study, keys: Sequence[str] | None = None) -> list[Record]:
    """Every record of these experiments, shared out among the processes that are at them in one store (`pieces.share`)."""
    from . import better, constraints, generality
    from .controls_needs import scene_pieces

    chosen = [key for key in models(study) if keys is None or key in keys]
    work = [
        *pieces(study, chosen), *better.pieces(study, chosen), *constraints.pieces(study, chosen),
        *generality.pieces(study, chosen), *(scene_pieces(study) if study.on_scenes else []),
    ]  # fmt: skip
    return list(share(study, work, "controls").values())


def quantities(study: Study) -> dict[str, Any]:
    """What claims C11 to C15 are judged by."""
    from .controls_numbers import quantities

    return quantities(study)

