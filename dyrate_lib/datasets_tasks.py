"""The short-answer tasks on scenes as data sets: the items of `open_dataset("scenes:TASK:SPLIT", n)`.

n counts pictures: a data set has n * PROMPTS_A_PICTURE items, all prompts of a picture side by side, since the protocols of
POPE, MMBench and MME score whole pictures.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from .datasets import SCENES_PER_SEED, CaptionDataset, Item
from .errors import InputError
from .scenes.tasks import PROMPTS_A_PICTURE, Example, base_task, examples
from .scenes.world import make_scene

if TYPE_CHECKING:
    from PIL import Image

    from .scenes.tasks import Look
    from .scenes.world import Scene

IDENTIFYING = 64  # pictures whose prompts and answers tell a data set's identity


def picture_id(scene: Scene, look: Look) -> str:
    """What names a picture: the scene's id, with a hash of the look where it is not plain."""
    return scene.id if look.plain else f"{scene.id}-{hashlib.sha256(repr(look).encode()).hexdigest()[:12]}"


def draw(scene: Scene, look: Look) -> Image.Image:
    """The scene with its look as an RGB picture of 336 x 336 px."""
    from . import scenes

    if look.plain:
        return scenes.render(scene)
    from .scenes.looks import render_look

    return render_look(scene, look)


class _Pictures:
    """The prompts of the scenes from `first` on that give the task a question, made when first asked for."""

    def __init__(self, task: str, split: str, first: int) -> None:
        self.task, self.split, self.first, self.next = task, split, first, first
        self.found: list[list[Example]] = []

    def __getitem__(self, index: int) -> list[Example]:
        while len(self.found) <= index:
            if self.next >= self.first + SCENES_PER_SEED:
                raise InputError(
                    f"scenes:{self.task}:{self.split}: of a seed's {SCENES_PER_SEED} scenes {len(self.found)} give a question; "
                    "ask for that many pictures"
                )
            made = examples(self.task, make_scene(self.next, self.split))
            self.next += 1
            if made:
                self.found.append(made)
        return self.found[index]


def open_task(spec: str, task: str, split: str, n: int, seed: int) -> CaptionDataset:
    """n pictures of a task (see `open_dataset`, which has checked the arguments): n * PROMPTS_A_PICTURE items.

    The pictures are the first n scenes from `seed * SCENES_PER_SEED` on that give the task a question. An item's meta: seed and
    split of the scene, family (the task), scene, look, category, part, picture (id of the picture, shared by its prompts), answer
    (what a model is trained to say) and what else the task knows (see its file; `options` of multiple choice). Ids hold the
    task and the part, so that they are unique over tasks as well.
    """
    prompts = PROMPTS_A_PICTURE[base_task(task)]
    pictures = _Pictures(task, split, seed * SCENES_PER_SEED)

    def make(index: int) -> Item:
        return _item(task, pictures[index // prompts][index % prompts])

    def fingerprint() -> str:
        told = [(e.prompt, e.answers, repr(e.look)) for k in range(min(n, IDENTIFYING)) for e in pictures[k]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    return CaptionDataset(spec, spec, n * prompts, seed, make, fingerprint)


def _item(task: str, example: Example) -> Item:
    scene, look = example.scene, example.look
    meta = {
        **example.meta,
        "seed": scene.seed, "split": scene.split, "family": task, "scene": scene, "look": look, "category": example.category,
        "part": example.part, "picture": picture_id(scene, look), "answer": example.answer,
    }  # fmt: skip
    return Item(
        id="-".join(word for word in (scene.id, task, example.part) if word),
        prompt=example.prompt,
        references=list(example.answers),
        meta=meta,
        _picture=lambda: draw(scene, look),
    )
