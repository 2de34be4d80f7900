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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .errors import InputError, ResourceError
from .images import load_image

if TYPE_CHECKING:
    from PIL import Image

COCO_PROMPT = "Provide a one-sentence caption for the provided image."
SCENES_PER_SEED = 1_000_000  # scenes do not end; data sets of different seeds start this far apart


@dataclass(frozen=True)
class Item:
    """One picture with what is asked of it.

    id: unique in its data set. prompt: the user's text (no system prompt, no image placeholder). references: at least
    one caption or answer. meta: what else is known, e.g. "kind" of a question, "seed" and "split" of a scene.
    """

    id: str
    prompt: str
    references: list[str]
    meta: dict[str, Any] = field(default_factory=dict)
    _picture: Callable[[], Image.Image] = field(repr=False, compare=False, default=None)  # type: ignore[assignment]

    @property
    def image(self) -> Image.Image:
        """The picture as RGB, made anew at each access. Raises InputError for a file that is not a sound image."""
        return self._picture()


class CaptionDataset(Sequence[Item]):
    """A fixed list of items, made when asked for.

    spec: as it was asked for. name: the same without the place on this machine, for tables and keys.
    """

    def __init__(
        self, spec: str, name: str, length: int, seed: int, make: Callable[[int], Item], fingerprint: str = ""
    ) -> None:
        self.spec, self.name, self.seed = spec, name, seed
        self._length, self._make, self._fingerprint = length, make, fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """What this data set is, for the configuration of a record: name, n, seed, and a fingerprint of its texts.

        Of scenes the first item's prompt and references are taken, so that a changed caption grammar is another data
        set; of COCO the whole annotation file. The folder's place and name play no part.
        """
        texts = self._fingerprint
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
    """Opens a data set by its specification.

    Args:
        spec: "scenes:FAMILY:SPLIT" with FAMILY short, narrative, late or questions and SPLIT train, val, test or novel;
            or "coco:FOLDER", which holds captions.json and images/, or annotations/captions_NAME.json and NAME/.
        n: how many items; None is all of a COCO folder, and has to be given for scenes (they do not end).
        seed: which ones. Scenes: consecutive scenes of the split from `seed * SCENES_PER_SEED` on. COCO: seed 0 is the
            first n by id, any other a shuffle by that seed.

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
    if kind == "coco":
        return _open_coco(spec, rest, n, seed)
    raise InputError(f"unknown kind of data set {kind!r} in {spec!r}: use scenes:FAMILY:SPLIT or coco:FOLDER")


# ---------------------------------------------------------------------------------------------------------- scenes


def _open_scenes(spec: str, rest: str, n: int | None, seed: int) -> CaptionDataset:
    from . import scenes

    family, _, split = rest.partition(":")
    families = (*scenes.FAMILIES, "questions")
    if family not in families or split not in scenes.SPLITS:
        raise InputError(
            f"{spec!r}: scenes have the families {', '.join(families)} and the splits {', '.join(scenes.SPLITS)}"
        )
    if n is None:
        raise InputError(f"{spec!r}: scenes do not end, say how many with n")
    if n > SCENES_PER_SEED:
        raise InputError(f"n = {n}: a seed has {SCENES_PER_SEED} scenes")
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


# ------------------------------------------------------------------------------------------------------------ COCO


def _open_coco(spec: str, folder: str, n: int | None, seed: int) -> CaptionDataset:
    root = Path(folder).expanduser()
    if not folder or not root.is_dir():
        raise ResourceError(f"{spec!r}: there is no folder {folder or '(none named)'}; see the README for its layout")
    annotation, pictures = _find_coco_files(root, spec)
    captions, files = _read_coco(annotation)
    missing = [name for name in files.values() if not (pictures / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3])
        raise ResourceError(f"{spec!r}: {len(missing)} of {len(files)} pictures are not in {pictures}, e.g. {shown}")
    keys = sorted(files)
    if n is not None and n > len(keys):
        raise InputError(f"{spec!r} has {len(keys)} pictures with captions, {n} were asked for")
    if seed:
        keys = [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
    keys = keys[:n]

    def make(index: int) -> Item:
        key = keys[index]
        path = pictures / files[key]
        return Item(
            id=str(key),
            prompt=COCO_PROMPT,
            references=list(captions[key]),
            meta={"file_name": files[key]},
            _picture=lambda: load_image(path),
        )

    texts = hashlib.sha256(annotation.read_bytes()).hexdigest()[:16]
    return CaptionDataset(spec, "coco", len(keys), seed, make, texts)


def _find_coco_files(root: Path, spec: str) -> tuple[Path, Path]:
    """(annotation JSON, picture folder) in one of the two layouts."""
    if (root / "captions.json").is_file():
        annotation, pictures = root / "captions.json", root / "images"
    else:
        found = sorted((root / "annotations").glob("captions_*.json"))
        if not found:
            raise ResourceError(
                f"{spec!r}: neither captions.json nor annotations/captions_*.json in {root}; a COCO folder holds "
                "captions.json and images/, or annotations/captions_val2017.json and val2017/"
            )
        ready = [path for path in found if (root / path.stem.removeprefix("captions_")).is_dir()]
        # validation before training when both lie there: nobody evaluates on the training set by accident
        annotation = next((path for path in ready if "val" in path.stem), (ready or found)[0])
        pictures = root / annotation.stem.removeprefix("captions_")
    if not pictures.is_dir():
        raise ResourceError(f"{spec!r}: {annotation.name} is there, its picture folder {pictures.name}/ is not")
    return annotation, pictures


def _read_coco(path: Path) -> tuple[dict[Any, list[str]], dict[Any, str]]:
    """Captions and file names by image id, for images that have a caption; InputError names what is malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path.name} is not readable JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise InputError(f"{path.name} is not in COCO's caption format: it needs the lists 'images' and 'annotations'")
    files: dict[Any, str] = {}
    for position, image in enumerate(content["images"]):
        key, name = _field(path, "images", position, image, "id"), _field(path, "images", position, image, "file_name")
        if key in files:
            raise InputError(f"{path.name}: image id {key} occurs more than once")
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{path.name}: images[{position}] has the file name {name!r}")
        files[key] = name
    _refuse_doubles(path, "file name", files.values())
    captions: dict[Any, list[str]] = {}
    seen = []
    for position, annotation in enumerate(content["annotations"]):
        key = _field(path, "annotations", position, annotation, "image_id")
        caption = _field(path, "annotations", position, annotation, "caption")
        if key not in files:
            raise InputError(f"{path.name}: annotations[{position}] is of image {key}, which is not among the images")
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"{path.name}: annotations[{position}] of image {key} has an empty caption")
        if "id" in annotation:
            seen.append(annotation["id"])
        captions.setdefault(key, []).append(" ".join(caption.split()))
    _refuse_doubles(path, "annotation id", seen)
    if not captions:
        raise InputError(f"{path.name} has no captions")
    if len({isinstance(key, str) for key in captions}) > 1:
        raise InputError(f"{path.name}: image ids must be all numbers or all strings")
    return captions, {key: files[key] for key in captions}


def _field(path: Path, table: str, position: int, entry: Any, name: str) -> Any:
    if not isinstance(entry, dict) or entry.get(name) is None:
        raise InputError(f"{path.name}: {table}[{position}] has no {name!r}")
    value = entry[name]
    if name in ("id", "image_id") and (isinstance(value, bool) or not isinstance(value, (int, str))):
        raise InputError(f"{path.name}: {table}[{position}] has the {name} {value!r}, not a number or string")
    return value


def _refuse_doubles(path: Path, what: str, values: Any) -> None:
    double = [str(value) for value, count in Counter(map(str, values)).items() if count > 1]
    if double:
        raise InputError(f"{path.name}: {what} {double[0]} occurs more than once ({len(double)} such)")
