"""Caption data sets in the formats they are published in: COCO's folder, Karpathy's Flickr30k file, nocaps with its domains.

    coco:FOLDER        captions.json and images/, or annotations/captions_NAME.json and NAME/     #NAME chooses, else validation
    flickr30k:FOLDER   dataset_flickr30k.json and images/ (or flickr30k-images/)                  #train, #val, default #test
    nocaps:FOLDER      nocaps_val_4500_captions.json and images/ (or val/)                        #in-domain, .. default all
    parquet:FOLDER     parquet files with pictures and captions (`published_parquet`)             #split

Annotations are checked as a whole before the first item: what is malformed is named by file and entry. Pictures are listed then,
and opened when asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError, ResourceError

Key = int | str
KARPATHY_SPLITS = ("train", "restval", "val", "test")
NOCAPS_DOMAINS = ("in-domain", "near-domain", "out-domain")
_FOLDERS = {
    "flickr30k": ("images", "flickr30k-images", "flickr30k_images"),
    "nocaps": ("images", "val", "validation"),
}  # where the pictures may lie beside the annotations


@dataclass(frozen=True)
class Captioned:
    """What an annotation file says: captions, file names and notes (e.g. domain) by picture, in one order of keys.

    pictures: the folder of the files. texts: fingerprint of the annotations. name: of the set, without its place.
    """

    name: str
    captions: dict[Key, list[str]]
    files: dict[Key, str]
    pictures: Path
    texts: str
    notes: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def keys(self) -> list[Key]:
        """Picture ids, sorted."""
        return sorted(self.captions)  # type: ignore[type-var]


def read_published(kind: str, place: str, spec: str) -> Captioned:
    """The annotations of "coco", "flickr30k" or "nocaps" in a folder; place: FOLDER or FOLDER#PART.

    Raises:
        ResourceError: the folder, its annotation file, or listed pictures are missing. InputError: an unknown part, or
            annotations that are not as published: schema, duplicate ids, empty captions, wrong encoding; the entry is named.
    """
    folder, part = split_part(place)
    root = Path(folder).expanduser()
    if not folder or not root.is_dir():
        raise ResourceError(f"{spec!r}: there is no folder {folder or '(none named)'}; see the README for its layout")
    found = KINDS[kind](root, part, spec)
    missing = _missing(found.pictures, found.files.values())
    if missing:
        shown = ", ".join(missing[:3])
        raise ResourceError(
            f"{spec!r}: {len(missing)} of {len(found.files)} pictures are not in {found.pictures}, e.g. {shown}"
        )
    return found


def split_part(place: str) -> tuple[str, str]:
    """A place as (folder, part): "/data/coco#train2017" is ("/data/coco", "train2017")."""
    if Path(place).expanduser().exists():  # a folder may have a # in its name
        return place, ""
    folder, _, part = place.rpartition("#") if "#" in place else (place, "", "")
    return folder, part


def _missing(folder: Path, names: Iterable[str]) -> list[str]:
    """The files that are not in the folder; it is listed once, for 118,000 questions to a disk take long."""
    with os.scandir(folder) as entries:
        here = {entry.name for entry in entries}
    # a name with a folder in it is asked for by itself; isfile is False, not an error, for names no disk can hold
    return [name for name in names if name not in here and not ("/" in name and os.path.isfile(folder / name))]


# -------------------------------------------------------------------------------------------------------------- COCO


def _coco(root: Path, part: str, spec: str) -> Captioned:
    annotation, pictures = _find_coco_files(root, part, spec)
    content, digest = read_json(annotation)
    captions, files, _ = coco_tables(annotation, content)
    return Captioned("coco", captions, files, pictures, digest)


def _find_coco_files(root: Path, part: str, spec: str) -> tuple[Path, Path]:
    """(annotation JSON, picture folder) in one of the two layouts."""
    if part:
        annotation, pictures = root / "annotations" / f"captions_{part}.json", root / part
        if "/" in part or not annotation.is_file():
            raise ResourceError(f"{spec!r}: there is no annotations/captions_{part}.json in {root}")
    elif (root / "captions.json").is_file():
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


def coco_parts(folder: str | Path) -> list[str]:
    """The parts of a COCO folder that have annotations and pictures, e.g. ["train2017", "val2017"]."""
    root = Path(folder).expanduser()
    names = [path.stem.removeprefix("captions_") for path in sorted((root / "annotations").glob("captions_*.json"))]
    return [name for name in names if (root / name).is_dir()]


def coco_tables(
    path: Path, content: Any, note: Callable[[int, Mapping[str, Any]], dict[str, Any]] | None = None
) -> tuple[dict[Key, list[str]], dict[Key, str], dict[Key, dict[str, Any]]]:
    """Captions, file names and notes by image id, for images that have a caption; InputError names what is malformed."""
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise InputError(f"{path.name} is not in COCO's caption format: it needs the lists 'images' and 'annotations'")
    files: dict[Key, str] = {}
    notes: dict[Key, dict[str, Any]] = {}
    for position, image in enumerate(content["images"]):
        key = get_field(path, f"images[{position}]", image, "id")
        name = get_field(path, f"images[{position}]", image, "file_name")
        if key in files:
            raise InputError(f"{path.name}: image id {key} occurs more than once")
        files[key] = safe_name(path, f"images[{position}]", name)
        if note is not None:
            notes[key] = note(position, image)
    refuse_doubles(path, "file name", files.values())
    captions: dict[Key, list[str]] = {}
    seen = []
    for position, annotation in enumerate(content["annotations"]):
        entry = f"annotations[{position}]"
        key = get_field(path, entry, annotation, "image_id")
        caption = get_field(path, entry, annotation, "caption")
        if key not in files:
            raise InputError(f"{path.name}: {entry} is of image {key}, which is not among the images")
        captions.setdefault(key, []).append(sound_text(path, f"{entry} of image {key}", caption))
        if "id" in annotation:
            seen.append(annotation["id"])
    refuse_doubles(path, "annotation id", seen)
    check_keys(path, captions)
    return captions, {key: files[key] for key in captions}, {key: notes[key] for key in captions if key in notes}


# --------------------------------------------------------------------------------------------------- Flickr30k, nocaps


def _karpathy(root: Path, part: str, spec: str) -> Captioned:
    """Karpathy's file: images with split, filename and sentences of tokens and raw text."""
    split = part or "test"
    if split not in KARPATHY_SPLITS:
        raise InputError(f"{spec!r}: Karpathy's splits are {', '.join(KARPATHY_SPLITS)}, not {split!r}")
    path = _annotations(root, "dataset*.json", "dataset_flickr30k.json", spec)
    content, digest = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise InputError(f"{path.name} is not in Karpathy's format: it needs the list 'images'")
    captions: dict[Key, list[str]] = {}
    files: dict[Key, str] = {}
    ids: list[Any] = []
    seen: set[str] = set()
    for position, image in enumerate(content["images"]):
        entry = f"images[{position}]"
        name = safe_name(path, entry, get_field(path, entry, image, "filename"))
        belongs, sentences = get_field(path, entry, image, "split"), get_field(path, entry, image, "sentences")
        if belongs not in KARPATHY_SPLITS:
            raise InputError(
                f"{path.name}: {entry} ({name}) has the split {belongs!r}, not one of {', '.join(KARPATHY_SPLITS)}"
            )
        if not isinstance(sentences, list) or not sentences:
            raise InputError(f"{path.name}: {entry} ({name}) has no sentences")
        raw = [get_field(path, f"{entry}.sentences[{i}]", sentence, "raw") for i, sentence in enumerate(sentences)]
        ids += [sentence["sentid"] for sentence in sentences if "sentid" in sentence]
        if Path(name).stem in seen:
            raise InputError(f"{path.name}: the picture {name} occurs more than once")
        seen.add(Path(name).stem)
        if belongs == split:
            told = [sound_text(path, f"{entry}.sentences[{i}] ({name})", text) for i, text in enumerate(raw)]
            captions[Path(name).stem], files[Path(name).stem] = told, name
    refuse_doubles(path, "sentid", ids)
    check_keys(path, captions, f"of split {split}")
    return Captioned(f"flickr30k:{split}", captions, files, _picture_folder(root, "flickr30k", spec), digest)


def _nocaps(root: Path, part: str, spec: str) -> Captioned:
    """nocaps: COCO's tables, each image with its domain."""
    if part and part not in NOCAPS_DOMAINS:
        raise InputError(f"{spec!r}: the domains of nocaps are {', '.join(NOCAPS_DOMAINS)}, not {part!r}")
    path = _annotations(root, "nocaps*captions*.json", "nocaps_val_4500_captions.json", spec)
    content, digest = read_json(path)

    def note(position: int, image: Mapping[str, Any]) -> dict[str, Any]:
        domain = get_field(path, f"images[{position}]", image, "domain")
        if domain not in NOCAPS_DOMAINS:
            raise InputError(
                f"{path.name}: images[{position}] has the domain {domain!r}, not one of {', '.join(NOCAPS_DOMAINS)}"
            )
        return {"domain": domain}

    captions, files, notes = coco_tables(path, content, note)
    wanted = [key for key in captions if not part or notes[key]["domain"] == part]
    if not wanted:
        raise InputError(f"{path.name} has no captions of {part}")
    chosen = ({key: table[key] for key in wanted} for table in (captions, files, notes))
    captions, files, notes = chosen  # type: ignore[assignment]
    name = f"nocaps:{part}" if part else "nocaps"
    return Captioned(name, captions, files, _picture_folder(root, "nocaps", spec), digest, notes)


def _annotations(root: Path, pattern: str, usual: str, spec: str) -> Path:
    found = [root / usual] if (root / usual).is_file() else sorted(root.glob(pattern))
    if len(found) != 1:
        raise ResourceError(
            f"{spec!r}: {len(found)} annotation files in {root}: it should hold {usual} and the pictures' folder"
        )
    return found[0]


def _picture_folder(root: Path, kind: str, spec: str) -> Path:
    found = next((root / name for name in _FOLDERS[kind] if (root / name).is_dir()), None)
    if found is None:
        raise ResourceError(f"{spec!r}: there is no folder of pictures in {root}: {' or '.join(_FOLDERS[kind])}")
    return found


KINDS: dict[str, Callable[[Path, str, str], Captioned]] = {"coco": _coco, "flickr30k": _karpathy, "nocaps": _nocaps}


# ------------------------------------------------------------------------------------------------------------ checks


def read_json(path: Path) -> tuple[Any, str]:
    """A JSON file in UTF-8 (a byte order mark is allowed) and 16 digits of its hash; InputError names the line."""
    try:
        raw = path.read_bytes()
        return json.loads(raw.decode("utf-8-sig")), hashlib.sha256(raw).hexdigest()[:16]
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path.name} is not readable JSON: line {line} is not UTF-8 (byte {error.start})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not readable JSON: {error}") from error


def get_field(path: Path, where: str, entry: Any, name: str) -> Any:
    """A field that must be there; ids must be whole numbers or strings."""
    if not isinstance(entry, dict) or entry.get(name) is None:
        raise InputError(f"{path.name}: {where} has no {name!r}")
    value = entry[name]
    if name in ("id", "image_id") and (isinstance(value, bool) or not isinstance(value, (int, str))):
        raise InputError(f"{path.name}: {where} has the {name} {value!r}, not a number or string")
    return value


def safe_name(path: Path, where: str, name: Any) -> str:
    """A file name below the picture folder: nothing absolute, nothing above it, no control characters."""
    bad = not isinstance(name, str) or not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts
    if bad or not name.isprintable() or "\\" in name:
        raise InputError(f"{path.name}: {where} has the file name {name!r}")
    return name


def sound_text(path: Path, where: str, text: Any) -> str:
    """A caption with its space made single; InputError for one that is empty or cannot be written as UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{path.name}: {where} has an empty caption")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half a surrogate pair, from an escape
        raise InputError(f"{path.name}: {where} has a caption that is no valid text: {error}") from error
    return " ".join(text.split())


def refuse_doubles(path: Path, what: str, values: Iterable[Any]) -> None:
    """InputError where a value occurs twice."""
    double = [str(value) for value, count in Counter(map(str, values)).items() if count > 1]
    if double:
        raise InputError(f"{path.name}: {what} {double[0]} occurs more than once ({len(double)} such)")


def check_keys(path: Path, captions: Mapping[Key, Any], which: str = "") -> None:
    """InputError for no captions at all, or ids that cannot be sorted together."""
    if not captions:
        raise InputError(f"{path.name} has no captions {which}".rstrip())
    if len({isinstance(key, str) for key in captions}) > 1:
        raise InputError(f"{path.name}: image ids must be all numbers or all strings")
