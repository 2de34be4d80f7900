"""What a training row asks about its picture.

A row's picture has one look, and every prompt of the row is true of that look:

- a plain picture carries a caption of each family, then questions and plain-picture tasks;
- a picture with signs (TextVQA) carries the same but for the `late` caption, one wording of which denies that there is text, and
  first of all prompts about its signs, with the words given and without;
- a bad photograph (VizWiz) carries VizWiz prompts alone: what it no longer shows must not be said of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain

from .captions import FAMILIES, N_REFERENCES
from .packing import Layout, Part, answer_part, caption_part, example_part, place
from .questions import questions
from .tasks import PLAIN, Look, examples
from .tasks import textvqa, vizwiz
from .world import Scene

# Shares of bad photographs and of pictures with signs; reading and blur are the most that a model has to learn anew.
BAD, SIGNED = 0.18, 0.24
N_BAD, N_SIGNED = 5, 3  # prompts drawn about a bad photograph, and about signs

# Tasks asked about the plain picture: how many prompts of each to draw for a row's free slots. The long ones come first, or the
# short ones would take their room.
_LONG = ("scienceqa", "mmbench")
_BRIEF = ("gqa", "gqa", "pope", "mme", "question")


def _variant(rng: random.Random) -> int:
    return 1 + int(rng.random() * 2**30)


def _shuffled(rng: random.Random, items: list) -> list:
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))]


def _asked(name: str, scene: Scene, rng: random.Random) -> Part | None:
    """One of the prompts of a task, or of the captions' own questions, about the plain scene."""
    found: list = questions(scene, _variant(rng)) if name == "question" else examples(name, scene, _variant(rng))
    if not found:
        return None
    one = found[int(rng.random() * len(found))]
    return answer_part(name, one.prompt, one.answer) if name == "question" else example_part(name, one)


def _plain_tasks(scene: Scene, rng: random.Random) -> Iterator[Part]:
    for name in (*_LONG, *_shuffled(rng, list(_BRIEF))):
        part = _asked(name, scene, rng)
        if part is not None:
            yield part


def _signs(scene: Scene, rng: random.Random) -> tuple[Look, list[Part]]:
    """A picture with signs and prompts about it, those with the words given first."""
    shown = textvqa.several(scene, _variant(rng), N_SIGNED)
    if not shown:
        return PLAIN, []
    return shown[0].look, [example_part(name, e) for name, e in textvqa_prompts(shown)]


def _bad(scene: Scene, rng: random.Random) -> tuple[Look, list[Part]]:
    shown = vizwiz.several(scene, _variant(rng), N_BAD)
    return (shown[0].look, [example_part("vizwiz", e) for e in shown]) if shown else (PLAIN, [])


def compose(scene: Scene, layout: Layout) -> tuple[Look, list[tuple[int, Part]]]:
    """A scene's look and its prompts in their slots, deterministic in (split, seed, layout).

    Returns:
        The look, and (slot, part) for each slot that is filled.
    """
    rng = random.Random(f"dyrate-rows-2/{scene.split}/{scene.seed}")
    look, about_look, draw = PLAIN, [], rng.random()
    if layout.tasks and draw < BAD:
        look, about_look = _bad(scene, rng)
        if about_look:
            return look, place(about_look, layout.lengths, range(len(layout.kinds)))
    elif layout.tasks and draw < BAD + SIGNED:
        look, about_look = _signs(scene, rng)
    placed, free = [], []
    asked = _shuffled(rng, questions(scene, _variant(rng))) if "question" in layout.kinds else []
    for slot, kind in enumerate(layout.kinds):
        if kind in FAMILIES and not (kind == "late" and look.signs):
            placed.append((slot, caption_part(scene, kind, int(rng.random() * N_REFERENCES))))
        elif kind == "question":
            if asked:
                q = asked.pop()
                placed.append((slot, answer_part("question", q.prompt, q.answer)))
        else:
            free.append(slot)
    if free:
        placed += place(chain(about_look, _plain_tasks(scene, rng)), layout.lengths, free)
    return look, placed
