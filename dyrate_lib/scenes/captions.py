"""Three families of captions, five wordings each, with what every word needs in order to be said.

Each word is annotated with its *need*:

- ``image``: it names what only the picture decides and has not been said yet (attributes, positions, the ground);
- ``response``: it follows from the words before it (counts of what was listed, colours repeated, first and last);
- ``none``: glue of the wording itself (articles, separators, fixed phrases).

The five wordings of a family differ in their fixed phrases, never in what they say, and differ from the first words
on, so that a model which has begun one can follow it to the end. Objects are listed in the canonical order of
:meth:`Scene.salient`: large before small, each from left to right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import InputError
from .world import Scene, SceneObject

FAMILIES = ("short", "narrative", "late")
NEEDS = ("image", "response", "none")
N_REFERENCES = 5
LISTED = {"short": 2, "narrative": 4, "late": 4}
PROMPTS = {
    "short": "Provide a one-sentence caption for the provided image.",
    "narrative": "List the main objects in the image and then sum up what you listed.",
    "late": "Write a short comment on the image and end it with the details.",
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Word = tuple[str, str]

_SHORT = (
    "A picture of {list} on {ground} .",
    "There {is} {list} on {ground} .",
    "This image shows {list} on {ground} .",
    "On {ground} we see {list} .",
    "{List} can be seen on {ground} .",
)
_NARRATIVE = (
    "I can see {list}{ground} . So that makes {count} , {sizes} , {colors}{ends} .",
    "The picture contains {list}{ground} . All in all this is {count} , {sizes} , {colors}{ends} .",
    "You will find {list}{ground} . Taken together I named {count} , {sizes} , {colors}{ends} .",
    "Listed in order : {list}{ground} . In sum there were {count} , {sizes} , {colors}{ends} .",
    "Here we have {list}{ground} . Adding up , we get {count} , {sizes} , {colors}{ends} .",
)
_LATE = (
    "At first glance this looks like a simple drawing made for practice , and yet there is something to find in it . "
    "In detail : {list}{ground} .",
    "It is always a pleasure to look closely at a clear and tidy picture like the one given here . "
    "To be exact , it has {list}{ground} .",
    "Pictures of this sort are often used to test how well somebody can tell plain things apart . "
    "This one holds {list}{ground} .",
    "Some images tell a long story , others just put a few things side by side for us to see . "
    "Here , namely , {list}{ground} .",
    "What a neat little scene , calm and easy to read , without any people , animals or text . "
    "The things shown are {list}{ground} .",
)
TEMPLATES = {"short": _SHORT, "narrative": _NARRATIVE, "late": _LATE}


def _glue(text: str) -> list[Word]:
    return [(w, "none") for w in text.split()]


def _words(text: str, need: str) -> list[Word]:
    return [(w, need) for w in text.split()]


def _joined(items: Sequence[list[Word]]) -> list[Word]:
    out: list[Word] = []
    for i, item in enumerate(items):
        if i:
            out += _glue("and" if i == len(items) - 1 else ",")
        out += item
    return out


def _item(o: SceneObject, positions: bool) -> list[Word]:
    out = _glue("a") + _words(f"{o.size} {o.color} {o.shape}", "image")
    return out + _glue("at the") + _words(o.position, "image") if positions else out


def _ground(scene: Scene) -> list[Word]:
    return _glue("a") + _words(f"{scene.ground.kind} {scene.ground.tone}", "image") + _glue("background")


def _sum_up(listed: Sequence[SceneObject]) -> dict[str, list[Word]]:
    large = sum(o.size == "large" for o in listed)
    colors = list(dict.fromkeys(o.color for o in listed))
    ends: list[Word] = []
    if 2 <= len(listed) <= 3:
        first, last = listed[0].shape, listed[-1].shape
        ends = _glue(", the first a") + _words(first, "response") + _glue("and the last a") + _words(last, "response")
    return {
        "count": _words(NUMBERS[len(listed)], "response") + _glue("shape" if len(listed) == 1 else "shapes"),
        "sizes": _words(f"{NUMBERS[large]} large", "response")
        + _glue("and")
        + _words(f"{NUMBERS[len(listed) - large]} small", "response"),
        "colors": _glue("in") + _joined([_words(c, "response") for c in colors]),
        "ends": ends,
    }


def _fields(scene: Scene, family: str) -> dict[str, list[Word]]:
    listed = scene.salient(LISTED[family])
    items = _joined([_item(o, positions=family != "short") for o in listed])
    ground = _ground(scene)
    if family == "short":
        return {
            "list": items,
            "List": [("A", "none"), *items[1:]],
            "ground": ground,
            "is": _glue("is" if len(listed) == 1 else "are"),
        }
    # The longer lists leave no room for the ground within 64 tokens.
    room = len(listed) <= (2 if family == "narrative" else 3)
    fields = {"list": items, "ground": _glue("on") + ground if room else []}
    return fields | _sum_up(listed) if family == "narrative" else fields


def annotated_reference(scene: Scene, family: str, i: int) -> list[Word]:
    """Wording ``i`` of a scene's caption as ``(word, need)`` pairs; punctuation marks are words of their own.

    Args:
        scene: the picture's truth.
        family: one of :data:`FAMILIES`.
        i: which of the five wordings.

    Raises:
        InputError: for an unknown family or a wording out of 0..4.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown caption family {family!r}: choose one of {', '.join(FAMILIES)}")
    if not 0 <= i < N_REFERENCES:
        raise InputError(f"a caption has wordings 0..{N_REFERENCES - 1}, got {i}")
    fields = _fields(scene, family)
    out: list[Word] = []
    for piece in TEMPLATES[family][i].split():
        while piece.startswith("{"):
            name, _, piece = piece[1:].partition("}")
            out += fields[name]
        if piece:
            out.append((piece, "none"))
    return out


def spell(words: Sequence[Word]) -> str:
    """Annotated words as running text, without a space before punctuation."""
    text = " ".join(w for w, _ in words)
    for mark in ",.:":
        text = text.replace(f" {mark}", mark)
    return text


def split_words(text: str) -> list[str]:
    """Running text as words; every other mark is a word of its own. Undoes :func:`spell`: a caption's words are its tokens."""
    return re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]", text)


def references(scene: Scene, family: str) -> list[str]:
    """The five differently worded captions of a scene in one family."""
    return [spell(annotated_reference(scene, family, i)) for i in range(N_REFERENCES)]
