"""Prompts that training asks and no evaluation does, to help with what is slow to learn.

- relation: the relations of all tasks in one kind, so that they get room and weight of their own. Each is in a task's own words.
- free: a multiple choice question without its options, to be answered by the option's text. What is to be seen is then learned
  from a word, not through one of four letters.
- told: a multiple choice question with the right option's text as its context. What is left to learn is to find the
  letter before a text.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .questions import questions
from .tasks import gqa, mmbench, mme
from .tasks.base import SHORT_ANSWER, Example
from .tasks.wording import coin, pick, shuffled
from .world import Scene

Asked = tuple[str, str]  # prompt, answer
_OF_OPTIONS = "of these"  # a question that says this cannot be asked without them


def _of_captions(scene: Scene, rng: random.Random) -> Asked | None:
    found = [q for q in questions(scene, int(rng.random() * 2**30)) if q.kind == "relation"]
    return (found[0].prompt, found[0].answer) if found else None


def _of_gqa(scene: Scene, rng: random.Random) -> Asked | None:
    asked = (("choose", "relation"), ("verify", "relation"), ("compare", "place"), ("query", "color by relation"))
    category, kind = pick(rng, asked)
    made = gqa.TYPES[category][kind](scene, rng)
    return made and (f"{made[0]}\n{SHORT_ANSWER}", made[1])


def _of_mme(scene: Scene, rng: random.Random) -> Asked | None:
    made = mme.CATEGORIES["position"](scene, rng)
    yes = coin(rng)
    return made and (f"{made[not yes]} {mme.YES_NO}", "yes" if yes else "no")


def _of_mmbench(scene: Scene, rng: random.Random) -> Asked | None:
    (ask,) = mmbench.ABILITIES["spatial relationship"]
    made = ask(scene, rng)
    return made and (f"{made[0]}\n{SHORT_ANSWER}", made[1])


_RELATIONS: tuple[Callable[[Scene, random.Random], Asked | None], ...] = (_of_captions, _of_gqa, _of_mme, _of_mmbench)


def relation(scene: Scene, rng: random.Random) -> Asked | None:
    """A question about where one thing lies from another: the tasks with equal chances, another where the scene gives none."""
    for ask in shuffled(rng, _RELATIONS):
        asked = ask(scene, rng)
        if asked:
            return asked
    return None


def free(example: Example) -> Asked | None:
    """A multiple choice example without its options, answered by the text of the right one; None where it speaks of them."""
    question = example.prompt.split("\nA. ")[0]
    if _OF_OPTIONS in question:
        return None
    return f"{question}\n{SHORT_ANSWER}", _right(example)


def told(example: Example) -> Asked:
    """An MMBench example with the right option's text as its context; the answer stays the letter."""
    return f"Context: {_right(example)}.\n{example.prompt}", example.answer


def _right(example: Example) -> str:
    return example.meta["options"]["ABCD".index(example.answer)]
