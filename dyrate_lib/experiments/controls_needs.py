"""Does the rate follow the need, and does more to see mean less dropped? Records and the numbers that are made from them.

The need of each token of a reply is known by the grammar of its family (`scenes.reply_needs`). The rate that a predictor *names*
at a step is its argmax; what is *in force* is the share really removed, which cannot fall while dropping is final.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ..evaluate import batches, predictor_hash
from ..models import Adapter
from ..predictor import RatePredictor
from ..predictor_inputs import STEPS, unit_rms
from ..scenes import edge_density, image_need, reply_needs
from ..scenes.captions import split_words
from ..stats import mean_over_seeds
from ..stats_ranks import correlation_over_pictures, course_correlations, mean_correlation, partial_spearman, spearman
from ..teacher_forcing import TeacherForced, read_prompt_and_response
from . import controls
from .attention import FAMILIES
from .budgets import reply_shapes
from .context import Record, Study
from .controls_training import Recipe, predictor, recipes, train
from .equal_cost import course_cost
from .pieces import Piece
from .summaries import Quantity, step_rank_correlation

_BATCH = 50  # replies read at once: attention of the first layers is held in full
Courses = list[np.ndarray]
_LETTERS: dict[str | None, str] = {"image": "i", "response": "r", "none": "n", None: "-"}
_WORDS = {letter: need for need, letter in _LETTERS.items()}


# --------------------------------------------------------------------------------------------------------- records


def named(study: Study, key: str, role: str, recipe: Recipe) -> Record:
    """The rates that a predictor named along its own replies, as numbers k of r_k = k / n_rates. Payload: a list a picture.

    Layers below P see every token, so one pass over prompt and reply gives what the predictor saw when the reply was made.
    """
    replies = controls.learned(study, key, role, recipe)
    made = predictor(train(study, key, recipe))
    dataset = study.dataset(role, study.scale.n_controls)
    tokens = [entry["tokens"] for entry in replies["payload"]]
    config = {"data": dataset.identity, "predictor": predictor_hash(made), "reversible": recipe.reversible,
              "max_new_tokens": study.scale.max_new_tokens}  # fmt: skip

    def fn() -> list[list[int]]:
        model, processor = study.model(key)
        out: list[list[int]] = []
        for some, taken in batches(model, processor, dataset, range(len(tokens)), _BATCH):
            out += named_rates(model, taken, made, [tokens[i] for i in some])
        return out

    return study.record("controls/named", config, fn, models=(key,))


@torch.no_grad()
def named_rates(model: Any, inputs: dict[str, Any], made: RatePredictor, replies: Sequence[Sequence[int]]) -> list[list[int]]:
    """The argmax of a predictor at every step of replies to a batch: one list a picture, as long as its reply.

    made: a predictor fed with shares, foreign shares or the hidden state; made.layer is P.
    """
    adapter, device = Adapter(model), next(model.parameters()).device
    longest = max(map(len, replies))
    padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in replies], device=device)
    forced = read_prompt_and_response(adapter, adapter.embed(inputs), padded, int(made.layer or 1))
    rates = made(_features(made, forced).cpu()).argmax(-1).tolist()
    return [row[: len(reply)] for row, reply in zip(rates, replies, strict=True)]


def _features(made: RatePredictor, forced: TeacherForced) -> torch.Tensor:
    if made.inputs == "hidden":
        start = forced.prompt.types.shape[1] - 1
        return unit_rms(forced.x[:, start : start + forced.steps])
    if made.inputs == "foreign":
        keys = forced.prompt.content_key.cpu()
        return torch.stack([made.foreign_shares(keys, step) for step in range(forced.steps)], dim=1)
    return forced.shares


def scenes(study: Study, role: str) -> Record:
    """How much there is to see in each picture of a set: payload [{id, objects, clutter}]. Sets of the same pictures share it."""
    dataset = study.dataset(role, study.scale.n_controls)
    ids = hashlib.sha256(json.dumps(study.ids(dataset)).encode()).hexdigest()[:16]

    def fn() -> list[dict[str, Any]]:
        return [
            {"id": item.id, "objects": len(item.meta["scene"].objects), "clutter": edge_density(item.image)} for item in dataset
        ]

    return study.record("controls/scenes", {"pictures": ids, "n": len(dataset)}, fn)


def scene_pieces(study: Study) -> list[Piece]:
    """The records of `scenes` as pieces of work."""
    return [Piece(f"{role} scenes", partial(scenes, study, role)) for role in controls.roles(study)]


# --------------------------------------------------------------------------------------------------------- courses


def needs(study: Study, record: Record, role: str) -> list[list[str | None]]:
    """What each token of each reply needs, None where the reply leaves its family's grammar, or its words are not its tokens.

    Kept beside the scores: to align a reply takes milliseconds, and tables ask for the same replies again.
    """
    said = [[entry["text"], entry["steps"]] for entry in record["payload"]]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def fn() -> list[str]:
        return ["".join(_LETTERS[need] for need in _aligned(text, steps, FAMILIES[role])) for text, steps in said]

    config = {"replies": digest, "family": FAMILIES[role]}
    found = study.record("controls/needs", config, fn, store=study.scores_store)["payload"]
    return [[_WORDS[letter] for letter in row] for row in found]


def _aligned(text: str, steps: int, family: str) -> list[str | None]:
    words = split_words(text)
    ended = steps == len(words) + 1  # the last token is the end of sequence
    return list(reply_needs(words, family, ended)) if ended or steps == len(words) else [None] * steps


def in_force(record: Record) -> Courses:
    """Share of image tokens removed at each step, a course a picture."""
    return [1 - np.asarray(entry["kept"], dtype=np.float64) / entry["n_image"] for entry in record["payload"]]


def names(study: Study, key: str, role: str, fed: str, seed: int) -> Courses | None:
    """The rates that a control named at each step of its replies, as courses; None where no record holds them."""
    recipe = Recipe(inputs=fed, seed=seed)
    lengths = [entry["steps"] for entry in controls.control(study, key, role, fed, seed)["payload"]]
    if fed == "none":
        return [np.zeros(steps) for steps in lengths]
    if fed == "step":
        made = predictor(train(study, key, recipe))
        course = made(torch.arange(STEPS)).argmax(-1).numpy() / made.n_rates
        return [course[np.minimum(np.arange(steps), STEPS - 1)] for steps in lengths]
    if fed != "shares":
        return None
    return named_courses(study, key, role, recipe)


def named_courses(study: Study, key: str, role: str, recipe: Recipe) -> Courses:
    """The record of `named` as rates."""
    found = named(study, key, role, recipe)["payload"]
    return [np.asarray(row, dtype=np.float64) / recipe.n_rates for row in found]


# --------------------------------------------------------------------------------------------------------- numbers


def following(study: Study, key: str, role: str, fed: str) -> dict[str, Quantity]:
    """How a control's rate follows the need (`follow`), over its seeds; {} where the needs are not known."""
    if not study.on_scenes:
        return {}
    made = recipes(study, Recipe(inputs=fed))
    pairs = [
        (controls.control(study, key, role, fed, recipe.seed), names(study, key, role, fed, recipe.seed))
        for recipe in (made[:1] if fed == "none" else made)
    ]
    return follow(study, role, pairs)


def follow(study: Study, role: str, pairs: Sequence[tuple[Record, Courses | None]]) -> dict[str, Quantity]:
    """Mean rank correlations over pictures: rate_need, rate_need_given_step, rate_step and in_force_need.

    A picture's own correlation over steps, averaged over seeds, then over pictures. pairs: replies and the rates named along
    them, one a seed; where those are not on record the first three are left out, and so is whatever no picture has.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for record, courses in pairs:
        for name, values in _correlations(study, needs(study, record, role), in_force(record), courses).items():
            parts.setdefault(name, []).append(values)
    found = {name: over_seeds(values) for name, values in parts.items()}
    n, seed = study.scale.bootstrap, study.seed
    return {name: mean_correlation(values, n, seed) for name, values in found.items() if not np.isnan(values).all()}


def _correlations(
    study: Study, needed: list[list[str | None]], removed: Courses, courses: Courses | None
) -> dict[str, np.ndarray]:
    """[pictures] each of the correlations of one seed's replies, kept beside the scores as these are: NaN where not defined."""
    given = [[[_LETTERS[need] for need in row] for row in needed], _plain(removed), None if courses is None else _plain(courses)]

    def fn() -> dict[str, list[float | None]]:
        known = [image_need(reply) for reply in needed]
        found = {"in_force_need": course_correlations(removed, known)}
        if courses is not None:
            found["rate_need"] = course_correlations(courses, known)
            found["rate_need_given_step"] = course_correlations(courses, known, by_step=True)
            found["rate_step"] = np.array([step_rank_correlation(course) for course in courses])
        return {name: [None if np.isnan(x) else round(float(x), 6) for x in values] for name, values in found.items()}

    config = {"courses": hashlib.sha256(json.dumps(given).encode()).hexdigest()}
    payload = study.record("controls/following", config, fn, store=study.scores_store)["payload"]
    return {name: np.array(values, dtype=np.float64) for name, values in payload.items()}  # None becomes NaN


def _plain(courses: Courses) -> list[list[float]]:
    return [np.round(course, 6).tolist() for course in courses]


def over_seeds(per_seed: Sequence[np.ndarray]) -> np.ndarray:
    """[pictures] mean over the seeds in which a picture has a correlation; NaN where it has none in any."""
    table = np.asarray(per_seed, dtype=np.float64)
    known = ~np.isnan(table)
    total = np.where(known, table, 0.0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def middle_share(record: Record) -> np.ndarray:
    """[pictures] share removed at the middle step of each reply, step floor(T / 2) of T."""
    return np.array([course[course.size // 2] for course in in_force(record)])


def middle_shares(study: Study, key: str, role: str) -> np.ndarray:
    """[pictures] the same for the paper's predictor, the mean over seeds."""
    return mean_over_seeds([middle_share(record) for record in controls.controls(study, key, role, "shares")])


def more_to_see(study: Study, key: str, role: str) -> dict[str, Quantity]:
    """Rank correlations over pictures of the share removed at mid-reply: with objects, with clutter, and that given objects.

    0 with an interval of no width where one of both is the same in every picture, or given the objects nothing is left of
    it: then it follows nothing, as a constant course does in C12.
    """
    seen = scenes(study, role)["payload"]
    objects, clutter = (np.array([row[name] for row in seen], dtype=np.float64) for name in ("objects", "clutter"))
    removed = middle_shares(study, key, role)

    def follows(values: np.ndarray, given: np.ndarray | None = None) -> Quantity:
        found = spearman(removed, values) if given is None else partial_spearman(removed, values, given)
        if np.isnan(found):
            return {"mean": 0.0, "lo": 0.0, "hi": 0.0, "n": int(removed.size)}
        return correlation_over_pictures(removed, values, given, study.scale.bootstrap, study.seed)

    return {
        "removed_objects": follows(objects), "removed_clutter": follows(clutter),
        "removed_clutter_given_objects": follows(clutter, objects),
    }  # fmt: skip


def planned_cost(study: Study, key: str, role: str, fed: str) -> float | None:
    """What the course of a planned control would cost on a set as it was trained, mean over seeds; None for the others."""
    if fed not in controls.PLANNED:
        return None
    shapes = reply_shapes(controls.unpruned(study, key, role))
    found = [
        course_cost(study.info(key), shapes, controls.planned(study, key, role, recipe), recipe.layer)
        for recipe in recipes(study, Recipe(inputs=fed))
    ]
    return float(np.mean(found))
