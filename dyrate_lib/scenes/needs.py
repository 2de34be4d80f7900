"""What each token of a generated reply needs in order to be said, whether or not it says the right thing.

References carry the need of each word (:mod:`.captions`). A reply may name wrong colours, leave an object out or list one too
many, so it cannot be laid beside its reference word by word. It is aligned with the *grammar* of its family's wordings instead:
places that take any colour, any shape, and so on, with a list as long as the reply makes it. The alignment is the cheapest one
(Viterbi over the places of a wording, as in edit distance), in the cheapest of the five wordings: a word that fits costs
nothing, a name of another kind (a shape for a colour) a little more than leaving a word or a place out, and a reply may
break off anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np

from ..errors import InputError
from .captions import FAMILIES, N_REFERENCES, NUMBERS, TEMPLATES, split_words
from .reading import SIZES
from .world import COLOR_NAMES, GROUNDS, SHAPES, TONE_NAMES

_LEFT_OUT = 1.0  # a word without a place, or a place without a word
_OTHER_KIND = 1.2  # a name where one of another kind belongs: dearer than one of these, cheaper than both
_BROKEN_OFF = 0.5  # ending before the wording ends
_NAMES = frozenset(
    {*SIZES, *COLOR_NAMES, *SHAPES, *GROUNDS, *TONE_NAMES, *NUMBERS, "top", "bottom", "left", "right", "center"}
)


@dataclass
class _Places:
    """A wording as a graph: each place takes one word between two nodes; free arcs take none."""

    takes: list[frozenset[str]] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)
    free: list[tuple[int, int]] = field(default_factory=list)
    nodes: int = 1

    def node(self) -> int:
        self.nodes += 1
        return self.nodes - 1

    def take(self, at: int, words: Iterable[str], need: str = "none", to: int | None = None) -> int:
        """A place for one of `words` from node `at`; the node behind it (`to`, or a new one)."""
        to = self.node() if to is None else to
        self.takes.append(frozenset(words))
        self.needs.append(need)
        self.ends.append((at, to))
        return to

    def say(self, at: int, text: str) -> int:
        """Fixed words."""
        for word in text.split():
            at = self.take(at, [word.lower()])
        return at

    def series(self, at: int, item) -> int:
        """`item` (node -> node behind it) once or more, with commas and 'and' between."""
        behind = item(at)
        for mark in (",", "and"):
            self.take(behind, [mark], to=at)
        return behind

    def optional(self, at: int, part) -> int:
        behind = part(at)
        self.free.append((at, behind))
        return behind

    def object(self, at: int, position: bool) -> int:
        at = self.say(at, "a")
        for names in (SIZES, COLOR_NAMES, SHAPES):
            at = self.take(at, names, "image")
        if not position:
            return at
        at = self.say(at, "at the")
        row = self.take(at, ("top", "bottom"), "image")
        behind = self.take(row, ("left", "right"), "image")
        self.free.append((row, behind))
        return self.take(at, ("left", "right", "center"), "image", to=behind)

    def ground(self, at: int) -> int:
        at = self.take(self.take(self.say(at, "a"), GROUNDS, "image"), TONE_NAMES, "image")
        return self.say(at, "background")

    def fill(self, at: int, name: str, family: str) -> int:
        """What stands for a template's {name}."""
        if name in ("list", "List"):
            return self.series(at, lambda n: self.object(n, position=family != "short"))
        if name == "is":
            return self.take(at, ("is", "are"))
        if name == "ground" and family == "short":
            return self.ground(at)
        if name == "ground":
            return self.optional(at, lambda n: self.ground(self.say(n, "on")))
        if name == "count":
            return self.take(self.take(at, NUMBERS, "response"), ("shape", "shapes"))
        if name == "sizes":
            at = self.take(self.take(at, NUMBERS, "response"), ("large",), "response")
            return self.take(self.take(self.say(at, "and"), NUMBERS, "response"), ("small",), "response")
        if name == "colors":
            return self.series(self.say(at, "in"), lambda n: self.take(n, COLOR_NAMES, "response"))
        assert name == "ends", name
        return self.optional(at, self.first_and_last)

    def first_and_last(self, at: int) -> int:
        at = self.take(self.say(at, ", the first a"), SHAPES, "response")
        return self.take(self.say(at, "and the last a"), SHAPES, "response")


class _Wording:
    """One wording of a family, ready to align words with: costs between its S places.

    follow: [S + 1, S] cost of going from behind a place (row S: from the start) to before another, one for each place left out.
    finish: [S + 1] cost of ending there.
    """

    def __init__(self, family: str, i: int) -> None:
        places, at = _Places(), 0
        for piece in TEMPLATES[family][i].split():
            while piece.startswith("{"):
                name, _, piece = piece[1:].partition("}")
                at = places.fill(at, name, family)
            at = places.say(at, piece)
        self.takes, self.needs = places.takes, places.needs
        between = np.full((places.nodes, places.nodes), np.inf)
        np.fill_diagonal(between, 0.0)
        for u, v in places.ends:
            between[u, v] = min(between[u, v], _LEFT_OUT)
        for u, v in places.free:
            between[u, v] = 0.0
        for k in range(places.nodes):  # Floyd and Warshall
            between = np.minimum(between, between[:, k : k + 1] + between[k])
        behind = [v for _, v in places.ends] + [0]
        self.follow = between[np.ix_(behind, [u for u, _ in places.ends])]
        self.finish = np.minimum(between[behind, at], _BROKEN_OFF)
        self._fits: dict[str, np.ndarray] = {}

    def fits(self, word: str) -> np.ndarray:
        """[S] what the word costs at each place."""
        if word not in self._fits:
            name = word in _NAMES
            self._fits[word] = np.array(
                [0.0 if word in w else _OTHER_KIND if name and w <= _NAMES else np.inf for w in self.takes]
            )
        return self._fits[word]

    def align(self, words: Sequence[str]) -> tuple[float, list[int | None]]:
        """The cheapest alignment: its cost, and each word's place or None."""
        n = len(self.takes)
        costs, came = np.full(n + 1, np.inf), []
        costs[n] = 0.0
        for word in words:
            onward = costs[:, None] + self.follow
            before = onward.argmin(0)
            placed = np.append(onward[before, np.arange(n)] + self.fits(word), np.inf)
            out = costs + _LEFT_OUT
            came.append(np.where(placed <= out, np.append(before, -1), -1))  # the place before; -1: this word has none
            costs = np.minimum(placed, out)
        last = int((costs + self.finish).argmin())
        cost, found = float(costs[last] + self.finish[last]), []
        for before in reversed(came):
            found.append(None if before[last] < 0 else last)
            last = last if before[last] < 0 else int(before[last])
        return cost, found[::-1]


@cache
def _wording(family: str, i: int) -> _Wording:
    return _Wording(family, i)


def reply_needs(reply: str | Sequence[str], family: str, ended: bool = True) -> list[str | None]:
    """The need of each token of a reply: 'image', 'response', 'none', or None where the reply leaves its family's grammar.

    A place's need counts, not what stands there: a wrong colour is at a place that needs the image as much as a right one. So the
    scene is not asked. For references it is their annotation exactly.

    Args:
        reply: the text, or its tokens' texts one by one (blanks around them do not matter). In this world's tokenizer a word or
            mark is a token, so both come to the same unless a text holds words it never saw; then give the tokens.
        family: one of ``FAMILIES``, the one the prompt asked for.
        ended: whether the reply's last token is the end of sequence, which is not part of its text and needs 'none'.

    Returns:
        One a word, and one more for the end where `ended`.

    Raises:
        InputError: for an unknown family.
    """
    if family not in FAMILIES:
        raise InputError(f"unknown caption family {family!r}: choose one of {', '.join(FAMILIES)}")
    words = split_words(reply) if isinstance(reply, str) else reply
    needs = _needs(tuple(w.strip().lower() for w in words), family)
    return [*needs, "none"] if ended else list(needs)


@lru_cache(maxsize=4096)
def _needs(words: tuple[str, ...], family: str) -> tuple[str | None, ...]:
    best, needs = np.inf, tuple[str | None, ...]()
    for i in range(N_REFERENCES):
        cost, places = _wording(family, i).align(words)
        if cost < best:
            best = cost
            needs = tuple(None if k is None else _wording(family, i).needs[k] for k in places)
        if best == 0:
            break
    return needs


def image_need(needs: Sequence[str | None]) -> np.ndarray:
    """[tokens] float64: 1 where a token needs the image, 0 where it does not, NaN where that is not known."""
    return np.array([np.nan if n is None else float(n == "image") for n in needs])
