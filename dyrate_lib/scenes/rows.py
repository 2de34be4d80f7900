"""What a training row asks about its picture, in the shares of a `Mix`.

A row's picture has one look, and every prompt of the row is true of that look:

- a plain picture carries a caption of each family (as often as the mix says), then questions, plain-picture tasks and scaffolds;
- a picture with signs (TextVQA) carries first of all prompts about its signs, with the words given and without; and, where they
  cover no object, the same as a plain one but for the `late` caption, of which one wording denies that there is text;
- a bad photograph (VizWiz) carries VizWiz prompts alone, for what it no longer shows must not be said of it; where it came out
  well, the same as a plain one and VizWiz prompts first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from . import scaffolds
from .captions import FAMILIES, N_REFERENCES
from .mixes import BROAD, Mix
from .packing import Layout, Part, answer_part, caption_part, example_part, place
from .questions import questions
from .tasks import PLAIN, Look, examples, textvqa, vizwiz
from .world import Scene


def _variant(rng: random.Random) -> int:
    return 1 + int(rng.random() * 2**30)


def _shuffled(rng: random.Random, items: list) -> list:
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))]


def _asked(name: str, scene: Scene, rng: random.Random, mix: Mix) -> list[Part]:
    """Prompts of a task, of a scaffold or of the captions' own questions, about the plain scene."""
    if name == "relation":
        asked = scaffolds.relation(scene, rng)
        return [answer_part(name, *asked)] if asked else []
    task = "mmbench" if name == "told" else name
    found: list = questions(scene, _variant(rng)) if name == "question" else examples(task, scene, _variant(rng))
    if not found:
        return []
    if name == "pope" and rng.random() < 0.5:  # of POPE's four prompts one is to be answered yes, the other three no
        found = found[:1]
    at = int(rng.random() * len(found))
    one = found[at]
    if name == "told":
        return [answer_part(name, *scaffolds.told(one))]
    if name == "question":
        return [answer_part(name, one.prompt, one.answer)]
    parts = [example_part(name, one)]
    if name == "mmbench":
        parts += [example_part(name, found[(at + r) % len(found)]) for r in range(1, mix.rotations)]
    asked = scaffolds.free(one) if mix.free and "options" in one.meta else None
    return [*parts, answer_part("free", *asked)] if asked else parts


def _plain_tasks(scene: Scene, rng: random.Random, mix: Mix) -> Iterator[Part]:
    for name in (*mix.long, *_shuffled(rng, list(mix.brief))):
        yield from _asked(name, scene, rng, mix)


def _signs(scene: Scene, rng: random.Random, n: int) -> tuple[Look, list[Part]]:
    """A picture with signs and prompts about it, those with the words given first."""
    variant = _variant(rng)
    given, alone = (textvqa.several(scene, variant, n, with_text) for with_text in (True, False))
    told = given[int(rng.random() * len(given))]
    return told.look, [example_part("textvqa-ocr", told), *(example_part("textvqa", e) for e in alone)]


def _bad(scene: Scene, rng: random.Random, n: int) -> tuple[Look, list[Part]]:
    shown = vizwiz.several(scene, _variant(rng), n)
    return (shown[0].look, [example_part("vizwiz", e) for e in shown]) if shown else (PLAIN, [])


@dataclass(frozen=True)
class Row:
    """A picture's look and what is asked of it. seen: whether the picture still shows all of the scene.

    placed: (slot, part) for each slot that is filled.
    """

    look: Look
    seen: bool
    placed: list[tuple[int, Part]]


def compose(scene: Scene, layout: Layout, mix: Mix = BROAD) -> Row:
    """A scene's training row, deterministic in (split, seed, layout, mix)."""
    rng = random.Random(f"dyrate-rows-2/{scene.split}/{scene.seed}")
    look, seen, draw = PLAIN, True, rng.random()
    about_look: list[Part] = []
    if layout.tasks and draw < mix.bad + mix.signed:
        bad = draw < mix.bad
        look, about_look = _bad(scene, rng, mix.n_bad) if bad else _signs(scene, rng, mix.n_signed)
        seen = look.plain or not bad and not textvqa.cover(scene, look)
    if not seen:
        return Row(look, seen, place(about_look, layout.lengths, range(len(layout.kinds))))
    placed, free = [], []
    asked = _shuffled(rng, questions(scene, _variant(rng))) if "question" in layout.kinds else []
    for slot, kind in enumerate(layout.kinds):
        told = kind in FAMILIES and not (kind == "late" and look.signs)
        if told and (mix.captions >= 1 or rng.random() < mix.captions):
            placed.append((slot, caption_part(scene, kind, int(rng.random() * N_REFERENCES))))
        elif kind == "question":
            if asked:
                q = asked.pop()
                placed.append((slot, answer_part("question", q.prompt, q.answer)))
        else:
            free.append(slot)
    if free:
        placed += place(chain(about_look, _plain_tasks(scene, rng, mix)), layout.lengths, free)
    return Row(look, seen, placed)
