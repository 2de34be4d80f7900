"""Multiple choice with a context paragraph, in the role of ScienceQA (Lu et al. 2022), in the form of LLaVA's evaluation.

The context states a rule that is made up anew for each picture (which shapes are magnetic, where north is, what a word of a
new language means), so that neither the picture nor the paragraph is enough. `category` is the subject, in the roles
of ScienceQA's three, under names of our own: `nature` (natural science: sorts of things), `society` (social science:
maps, prices) and `language` (language science: new words, alphabetical order). `meta` holds the `kind` of lesson and `options`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ..questions import MIN_OFFSET
from ..world import COLOR_NAMES, SHAPES, Scene, SceneObject
from .base import OPTION_LETTER, Example
from .wording import (
    ahead,
    coin,
    likely,
    listed,
    named,
    option_block,
    other_colors,
    pick,
    plural,
    shuffled,
    stream,
    unique_shapes,
)

SORTS = ("magnetic", "fragile", "poisonous", "soft", "warm")
NEW_WORDS = ("mip", "sol", "tal", "ruk", "ven", "dar", "lom", "kef", "zun", "bip")
SIDES = {"top": "above", "bottom": "below", "left": "to the left of", "right": "to the right of"}
PRICES = range(1, 10)

# context, question, the right option, the wrong ones
Lesson = tuple[str, str, str, Sequence[str]] | None

LINES: tuple[str, ...] = (
    "Context: In this lesson, a shape is magnetic if it is red, orange or blue.\nWhich of these is magnetic?\nA. star\nB. ring",
    "Context: In this lesson, every circle, heart or moon is fragile.\nWhat color is the fragile shape?\nC. red\nD. blue",
    "How many shapes are magnetic? How many of the shapes are fragile? Only an orange shape is soft. Only a red shape is warm.",
    "Context: The image is a map. North is at the top.\nNorth is at the bottom, at the left, at the right. "
    "Which of these is farthest north?\nWhich of these is farthest south?",
    "Context: In a shop, a large shape costs 5 coins and a small shape costs 2 coins.\nHow many coins does the star cost?",
    "How many coins do all the red shapes cost together? How many coins do all the hexagons cost together?",
    "Context: In a new language, red is called mip, blue is called sol and green is called tal.\nWhich word tells "
    "the color of the star?\nWhat is the color of the large object called? A small object, an object.",
    "Context: A dictionary lists words in the order of the alphabet.\nWhich of these has the color that is listed first?",
    "Which of these has the color that is listed last?",
    f"\n{OPTION_LETTER}",
    *(f"{word} {word}, {word}. {word}?" for word in (*SORTS, *NEW_WORDS, *SHAPES, *map(plural, SHAPES), *COLOR_NAMES)),
    *(f" {word} {word}.\n" for word in ("A", "B", "C", "D", *map(str, range(1, 4 * PRICES.stop - 3)))),
)


def _wanted(rng: random.Random) -> int:
    """How many wrong options a question has at most: one to three."""
    return 1 + int(rng.random() * 3)


def _sorted_by_color(scene: Scene, rng: random.Random) -> Lesson:
    things, word = unique_shapes(scene), pick(rng, SORTS)
    if len({o.color for o in things}) < 2:
        return None
    o = pick(rng, things)
    others = shuffled(rng, [p for p in things if p.color != o.color])[: _wanted(rng)]
    free = [c for c in COLOR_NAMES if c != o.color and c not in {p.color for p in others}]
    colors = shuffled(rng, [o.color, *shuffled(rng, free)[: int(rng.random() * 3)]])
    rule = f"In this lesson, a shape is {word} if it is {listed(colors)}."
    return rule, f"Which of these is {word}?", o.shape, [p.shape for p in others]


def _sorted_by_shape(scene: Scene, rng: random.Random) -> Lesson:
    things, word = unique_shapes(scene), pick(rng, SORTS)
    if not things:
        return None
    o = pick(rng, things)
    free = [s for s in SHAPES if s not in {p.shape for p in scene.objects}]
    shapes = shuffled(rng, [o.shape, *shuffled(rng, free)[: int(rng.random() * 3)]])
    wrong = likely(rng, other_colors(scene, o), (p.color for p in scene.objects), _wanted(rng))
    rule = f"In this lesson, every {listed(shapes)} is {word}."
    return rule, f"What color is the {word} shape?", o.color, wrong


def _sorted_count(scene: Scene, rng: random.Random) -> Lesson:
    word, by_color, size = pick(rng, SORTS), coin(rng), 1 + int(rng.random() * 3)
    values = COLOR_NAMES if by_color else SHAPES
    have = [o.color if by_color else o.shape for o in scene.objects]
    # rules of one length, at least one of whose kinds is there; the options are the counts that they give, each as likely true
    rules: dict[int, list[list[str]]] = {}
    for _ in range(12):
        first = pick(rng, have)
        chosen = shuffled(rng, [first, *shuffled(rng, [v for v in values if v != first])[: size - 1]])
        rules.setdefault(sum(v in chosen for v in have), []).append(chosen)
    if len(rules) < 2:
        return None
    count, *wrong = shuffled(rng, sorted(rules))[: 1 + _wanted(rng)]
    kinds = listed(pick(rng, rules[count]))
    rule = f"a shape is {word} if it is {kinds}" if by_color else f"every {kinds} is {word}"
    return f"In this lesson, {rule}.", f"How many of the shapes are {word}?", str(count), [str(n) for n in wrong]


def _map(scene: Scene, rng: random.Random) -> Lesson:
    things, side, north = unique_shapes(scene), pick(rng, tuple(SIDES)), coin(rng)
    opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    toward = SIDES[side if north else opposite[side]]
    leading = [(o, [p for p in things if ahead(o, p, toward) >= MIN_OFFSET]) for o in things]
    leading = [(o, behind) for o, behind in leading if behind]
    if not leading:
        return None
    o, behind = pick(rng, leading)
    wrong = [p.shape for p in shuffled(rng, behind)[: _wanted(rng)]]
    rule = f"The image is a map. North is at the {side}."
    return rule, f"Which of these is farthest {'north' if north else 'south'}?", o.shape, wrong


def _price(scene: Scene, rng: random.Random) -> Lesson:
    small, large = sorted(shuffled(rng, PRICES)[:2])
    rule = f"In a shop, a large shape costs {large} coins and a small shape costs {small} coins."
    groups = [(f"all the {c} shapes", [o.size for o in scene.objects if o.color == c]) for c in COLOR_NAMES]
    groups += [(f"all the {plural(s)}", [o.size for o in scene.objects if o.shape == s]) for s in SHAPES]
    many = 2 + int(rng.random() * 3)
    # groups of as many, by their large ones: the options are what these groups cost, each as likely true
    costs: dict[int, list[str]] = {}
    for words, sizes in groups:
        if len(sizes) == many:
            costs.setdefault(sum(large if s == "large" else small for s in sizes), []).append(words)
    if len(costs) > 1:
        cost, *wrong = shuffled(rng, sorted(costs))[: 1 + _wanted(rng)]
        return rule, f"How many coins do {pick(rng, costs[cost])} cost together?", str(cost), [str(n) for n in wrong]
    by_size = {size: [w for o, w in named(scene, "size") if o.size == size] for size in ("large", "small")}
    if not all(by_size.values()):
        return None
    size = pick(rng, ("large", "small"))
    cost, other = (large, small) if size == "large" else (small, large)
    rest = shuffled(rng, [n for n in PRICES if n not in (small, large)])[: _wanted(rng) - 1]
    question = f"How many coins does the {pick(rng, pick(rng, by_size[size]))} cost?"
    return rule, question, str(cost), [str(n) for n in (other, *rest)]


def _new_words(scene: Scene, rng: random.Random) -> Lesson:
    things = named(scene, without="color")
    if not things:
        return None
    o, names = pick(rng, things)
    wrong = likely(rng, other_colors(scene, o), (p.color for p in scene.objects), _wanted(rng))
    words = shuffled(rng, NEW_WORDS)[: len(wrong) + 1]
    meanings = dict(zip(shuffled(rng, [o.color, *wrong]), words))
    rule = f"In a new language, {listed([f'{color} is called {word}' for color, word in meanings.items()], 'and')}."
    question = f"What is the color of the {pick(rng, names)} called?"
    return rule, question, meanings[o.color], [meanings[color] for color in wrong]


def _alphabet(scene: Scene, rng: random.Random) -> Lesson:
    by_color: dict[str, SceneObject] = {o.color: o for o in shuffled(rng, unique_shapes(scene))}
    if len(by_color) < 2:
        return None
    chosen = sorted(shuffled(rng, sorted(by_color))[: 1 + _wanted(rng)])
    first = coin(rng)
    o = by_color[chosen[0 if first else -1]]
    rule = "A dictionary lists words in the order of the alphabet."
    question = f"Which of these has the color that is listed {'first' if first else 'last'}?"
    return rule, question, o.shape, [by_color[c].shape for c in chosen if by_color[c] is not o]


SUBJECTS: dict[str, dict[str, Callable[[Scene, random.Random], Lesson]]] = {
    "nature": {"by color": _sorted_by_color, "by shape": _sorted_by_shape, "count": _sorted_count},
    "society": {"map": _map, "price": _price},
    "language": {"new words": _new_words, "alphabet": _alphabet},
}


def examples(scene: Scene, variant: int = 0) -> list[Example]:
    """One lesson about the scene: the subjects with equal chances, another one where the scene does not give it.

    Returns:
        One `Example` with two to four options in an order drawn anew; `answer` is the right one's letter.
    """
    rng = stream("scienceqa", scene, variant)
    for category in shuffled(rng, SUBJECTS):
        for kind in shuffled(rng, SUBJECTS[category]):
            made = SUBJECTS[category][kind](scene, rng)
            if made:
                rule, question, right, wrong = made
                options = tuple(shuffled(rng, [right, *wrong]))
                answer = "ABCD"[options.index(right)]
                prompt = f"Context: {rule}\n{question}\n{option_block(options)}\n{OPTION_LETTER}"
                meta = {"kind": kind, "options": options}
                return [Example("scienceqa", scene, prompt, answer, (answer,), category, meta=meta)]
    return []
