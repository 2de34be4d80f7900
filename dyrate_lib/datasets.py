"""Pictures with captions or questions behind one interface: rendered scenes, or a folder in COCO's format.

    ds = open_dataset("scenes:short:val", n=200)
    ds = open_dataset("coco:/data/coco", n=500, seed=1)
    item = ds[0]; item.image, item.prompt, item.references

Nothing is rendered or read from disk before an item's `image` is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .errors import InputError
from .images import load_image
from .published import KINDS, read_published

if TYPE_CHECKING:
    from PIL import Image

COCO_PROMPT = "Provide a one-sentence caption for the provided image."
SCENES_PER_SEED = 1_000_000  # scenes do not end; data sets of different seeds start this far apart


@dataclass(frozen=True)
class Item:
    """One picture with what is asked of it.

    id: unique in its data set. prompt: the user's text (no system prompt, no image placeholder). references: at least
    one caption or answer. meta: what else is known, e.g. "kind" of a question, "seed" and "split" of a scene.
    file: the picture's file, None where it is not one.
    """

    id: str
    prompt: str
    references: list[str]
    meta: dict[str, Any] = field(default_factory=dict)
    _picture: Callable[[], Image.Image] = field(repr=False, compare=False, default=None)  # type: ignore[assignment]
    file: Path | None = field(repr=False, compare=False, default=None)

    @property
    def image(self) -> Image.Image:
        """The picture as RGB, made anew at each access. Raises InputError for a file that is not a sound image."""
        return self._picture()


class CaptionDataset(Sequence[Item]):
    """A fixed list of items, made when asked for.

    spec: as it was asked for. name: the same without the place on this machine, for tables and keys.
    """

    def __init__(
        self,
        spec: str,
        name: str,
        length: int,
        seed: int,
        make: Callable[[int], Item],
        fingerprint: str | Callable[[], str] = "",
    ) -> None:
        self.spec, self.name, self.seed = spec, name, seed
        self._length, self._make, self._fingerprint = length, make, fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """What this data set is, for the configuration of a record: name, n, seed, and a fingerprint of its texts.

        Of scenes the first item's prompt and references are taken, of tasks those of the first pictures, so that a changed
        grammar is another data set; of COCO the whole annotation file. The folder's place and name play no part.
        """
        texts = self._fingerprint if isinstance(self._fingerprint, str) else self._fingerprint()
        if not texts:
            first = self[0]
            texts = hashlib.sha256(json.dumps([first.prompt, first.references]).encode()).hexdigest()[:16]
        return {"name": self.name, "n": len(self), "seed": self.seed, "texts": texts}

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._length))]
        position = index + self._length if index < 0 else index
        if not 0 <= position < self._length:
            raise IndexError(f"item {index} of a data set of {self._length}")
        return self._make(position)

    def __iter__(self) -> Iterator[Item]:
        return (self._make(i) for i in range(self._length))

    def references(self) -> dict[str, list[str]]:
        """id -> references, as `metrics.caption_scores` takes them; no picture is opened."""
        return {item.id: item.references for item in self}

    def __repr__(self) -> str:
        return f"CaptionDataset({self.spec!r}, {self._length} items)"


def open_dataset(spec: str, n: int | None = None, seed: int = 0) -> CaptionDataset:
    """Opens a data set by its specification; besides the two below flickr30k:, nocaps: and parquet: (see `published`).

    Args:
        spec: "scenes:FAMILY:SPLIT" with FAMILY short, narrative, late, questions or a short-answer task (gqa, vizwiz,
            scienceqa, textvqa, textvqa-ocr, pope, mmbench, mme) and SPLIT train, val, test or novel;
            or "coco:FOLDER", which holds captions.json and images/, or annotations/captions_NAME.json and NAME/.
        n: how many items; None is all of a COCO folder, and has to be given for scenes (they do not end). Of a task it is
            how many pictures: each has all its prompts (`scenes.tasks.PROMPTS_A_PICTURE`: POPE and MMBench 4, MME 2), so
            the data set has n times as many items, those of one picture side by side.
        seed: which ones. Scenes: consecutive scenes of the split from `seed * SCENES_PER_SEED` on; a task passes over
            those that give it no question. COCO: seed 0 is the first n by id, any other a shuffle by that seed.

    Raises:
        InputError: a specification that is not understood, n below 1 or above what there is, broken annotations.
        ResourceError: the COCO folder, its annotation file or listed pictures are missing.
    """
    if not isinstance(spec, str) or ":" not in spec:
        raise InputError(f"{spec!r} is not a data set: use scenes:FAMILY:SPLIT or coco:FOLDER")
    if n is not None and n < 1:
        raise InputError(f"n must be at least 1, not {n}")
    if seed < 0:
        raise InputError(f"seed must not be negative, not {seed}")
    kind, _, rest = spec.partition(":")
    if kind == "scenes":
        return _open_scenes(spec, rest, n, seed)
    if kind in KINDS:
        return _open_published(kind, spec, rest, n, seed)
    if kind == "parquet":
        from .published_parquet import open_parquet

        return open_parquet(spec, rest, n, seed)
    known = ", ".join(f"{name}:FOLDER" for name in (*KINDS, "parquet"))
    raise InputError(f"unknown kind of data set {kind!r} in {spec!r}: use scenes:FAMILY:SPLIT, {known}")


# ---------------------------------------------------------------------------------------------------------- scenes


def _open_scenes(spec: str, rest: str, n: int | None, seed: int) -> CaptionDataset:
    from . import scenes

    family, _, split = rest.partition(":")
    families = (*scenes.FAMILIES, "questions", *scenes.tasks.NAMES)
    if family not in families or split not in scenes.SPLITS:
        raise InputError(
            f"{spec!r}: scenes have the families {', '.join(families)} and the splits {', '.join(scenes.SPLITS)}"
        )
    if n is None:
        raise InputError(f"{spec!r}: scenes do not end, say how many with n")
    if n > SCENES_PER_SEED:
        raise InputError(f"n = {n}: a seed has {SCENES_PER_SEED} scenes")
    if family in scenes.tasks.NAMES:
        from .datasets_tasks import open_task

        return open_task(spec, family, split, n, seed)
    first = seed * SCENES_PER_SEED
    if family == "questions":
        return CaptionDataset(spec, spec, n, seed, _question_maker(scenes, split, first))
    return CaptionDataset(spec, spec, n, seed, _caption_maker(scenes, family, split, first))


def _caption_maker(scenes: Any, family: str, split: str, first: int) -> Callable[[int], Item]:
    def make(index: int) -> Item:
        seed = first + index
        scene = scenes.make_scene(seed, split)
        return Item(
            id=f"{split}-{seed:08d}",
            prompt=scenes.PROMPTS[family],
            references=list(scenes.references(scene, family)),
            meta={"seed": seed, "split": split, "family": family, "scene": scene},
            _picture=lambda: scenes.render(scene),
        )

    return _remembering(make)


def _remembering(make: Callable[[int], Item]) -> Callable[[int], Item]:
    """Items are asked for again with every method; making a scene and its texts takes milliseconds."""
    return functools.lru_cache(maxsize=4096)(make)


def _question_maker(scenes: Any, split: str, first: int) -> Callable[[int], Item]:
    """One question a scene, the kinds in turn, so that n items hold every kind about equally often."""

    def make(index: int) -> Item:
        seed = first + index
        scene = scenes.make_scene(seed, split)
        asked = list(scenes.questions(scene))
        wanted = scenes.QUESTION_KINDS[index % len(scenes.QUESTION_KINDS)]
        fitting = [question for question in asked if question.kind == wanted] or asked
        question = fitting[np.random.default_rng(seed).integers(len(fitting))]
        return Item(
            id=f"{split}-{seed:08d}",
            prompt=question.prompt,
            references=[question.answer],
            meta={"seed": seed, "split": split, "family": "questions", "kind": question.kind, "scene": scene},
            _picture=lambda: scenes.render(scene),
        )

    return _remembering(make)


# ------------------------------------------------------------------------------------------------------- published


def _open_published(kind: str, spec: str, place: str, n: int | None, seed: int) -> CaptionDataset:
    """Items of a data set in a format that it is published in (see `published`), the first n by id, or shuffled by a seed."""
    found = read_published(kind, place, spec)
    keys = found.keys()
    if n is not None and n > len(keys):
        raise InputError(f"{spec!r} has {len(keys)} pictures with captions, {n} were asked for")
    if seed:
        keys = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    keys = keys[:n]

    def make(index: int) -> Item:
        key = keys[index]
        path = found.pictures / found.files[key]
        return Item(
            id=str(key),
            prompt=COCO_PROMPT,
            references=list(found.captions[key]),
            meta={"file_name": found.files[key], **found.notes.get(key, {})},
            _picture=lambda: load_image(path),
            file=path,
        )

    return CaptionDataset(spec, found.name, len(keys), seed, make, found.texts)
