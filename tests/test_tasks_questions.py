"""Five tasks on scenes: every answer agrees with a reader of its own of the English text, words alone tell nothing."""

import importlib
import re
from collections import Counter, defaultdict

import pytest

from dyrate_lib import InputError, chat_prompt
from dyrate_lib.scenes.questions import MIN_OFFSET
from dyrate_lib.scenes.tasks import (
    NAMES,
    OPTION_LETTER,
    PLAIN,
    PROMPTS_A_PICTURE,
    SHORT_ANSWER,
    examples,
    mmbench,
    scienceqa,
)
from dyrate_lib.scenes.tokenizer import corpus
from dyrate_lib.scenes.world import COLOR_NAMES, HELD_OUT, SHAPES, SPLITS, make_scene

OURS = ("gqa", "scienceqa", "pope", "mmbench", "mme")
N = 1500
RELATION = r"(?:to the left of|to the right of|above|below)"


@pytest.fixture(scope="module")
def made():
    """Task -> all examples of N scenes of train."""
    scenes = [make_scene(seed, "train") for seed in range(N)]
    return {task: [e for scene in scenes for e in examples(task, scene)] for task in OURS}


# ------------------------------------------------------------------------------- a reader of the questions, by itself


def fitting(scene, words):
    """Objects that a noun phrase fits: 'large red star', 'red shapes', 'objects'."""
    out = list(scene.objects)
    for word in words.split():
        if word in ("large", "small"):
            out = [o for o in out if o.size == word]
        elif word in COLOR_NAMES:
            out = [o for o in out if o.color == word]
        elif word not in ("object", "shape", "shapes"):
            shape = next(s for s in SHAPES if word in (s, s + "s", s + "es"))
            out = [o for o in out if o.shape == shape]
    return out


def way(p, q, relation):
    """px that p is to the named side of q."""
    side = next(s for s in ("left", "right", "above", "below") if s in relation)
    return {"left": q.x - p.x, "right": p.x - q.x, "above": q.y - p.y, "below": p.y - q.y}[side]


def the(scene, words):
    """The one object that a phrase means, through a relation too; all that it might mean are plainly on one side."""
    related = re.fullmatch(rf"(\w+) ({RELATION}) the (.+)", words)
    if related:
        other = the(scene, related[3])
        found = [(p, way(p, other, related[2])) for p in fitting(scene, related[1]) if p is not other]
        assert all(abs(d) >= MIN_OFFSET for _, d in found), words
        found = [p for p, d in found if d > 0]
    else:
        found = fitting(scene, words)
    assert len(found) == 1, (words, len(found))
    return found[0]


def there(scene, words):
    return "yes" if fitting(scene, re.sub(r"^an? ", "", words)) else "no"


def plain_side(p, q, relation):
    distance = way(p, q, relation)
    assert abs(distance) >= MIN_OFFSET
    return distance > 0


def read(scene, text):
    """The answer to a question, found by reading it: (answer, object whose looks are asked for or None, values offered)."""

    def case(pattern):
        nonlocal m
        m = re.fullmatch(pattern, text)
        return m

    m = None
    if case(r"Which pattern does the background have\?"):
        return scene.ground.kind, None, ()
    if case(r"What color is the background\?"):
        return scene.ground.tone, None, ()
    if case(r"Does the image have an? (\w+) background\?"):
        return "yes" if m[1] == scene.ground.kind else "no", None, ()
    if case(r"What (color|shape) is the (.+)\?"):
        o = the(scene, m[2])
        return getattr(o, m[1]), o, ()
    if case(r"Where in the image is the (.+)\?"):
        o = the(scene, m[1])
        row, column = int(o.y // 112), int(o.x // 112)
        names = [
            ["top left", "top", "top right"],
            ["left", "center", "right"],
            ["bottom left", "bottom", "bottom right"],
        ]
        return names[row][column], None, ()
    if case(r"Seen from the (.+), in which direction is the (.+)\?"):
        p, q = the(scene, m[2]), the(scene, m[1])
        ways = {side: way(p, q, side) for side in ("left", "right", "above", "below")}
        first, second, *_ = sorted(ways.values(), reverse=True)
        assert first >= MIN_OFFSET and first >= 2 * second
        return max(ways, key=ways.get), None, ()
    if case(r"How many (.+) are there in the image\?"):
        return str(len(fitting(scene, m[1]))), None, ()
    if case(r"Is there only one (.+) in the image\?"):
        return "yes" if len(fitting(scene, m[1])) == 1 else "no", None, ()
    if case(r"Are there (\d) (.+) in the image\?"):
        return "yes" if len(fitting(scene, m[2])) == int(m[1]) else "no", None, ()
    if case(r"Are there both (.+) and (.+) in the image\?"):
        return "yes" if there(scene, m[1]) == there(scene, m[2]) == "yes" else "no", None, ()
    if case(r"Is there either (.+) or (.+) in the image\?"):
        assert (there(scene, m[1]), there(scene, m[2])) != ("yes", "yes")  # 'either' is not asked where it is both
        return "yes" if "yes" in (there(scene, m[1]), there(scene, m[2])) else "no", None, ()
    if case(r"Is there (an? .+) in the image\?"):
        return there(scene, m[1]), None, ()
    if case(r"Is the (.+) to the (left|right) or to the (?:left|right) of the (.+)\?"):
        return ("left" if plain_side(the(scene, m[1]), the(scene, m[3]), "left") else "right"), None, ()
    if case(r"Is the (.+) (above|below) or (?:above|below) the (.+)\?"):
        return ("above" if plain_side(the(scene, m[1]), the(scene, m[3]), "above") else "below"), None, ()
    if case(rf"Is the (.+) ({RELATION}) the (.+)\?"):
        return "yes" if plain_side(the(scene, m[1]), the(scene, m[3]), m[2]) else "no", None, ()
    if case(r"Is the (.+?) (?:an? )?(\w+) or (?:an? )?(\w+)\?"):
        o = the(scene, m[1])
        (answer,) = {m[2], m[3]} & {o.size, o.color, o.shape}
        return answer, o, (m[2], m[3])
    if case(r"Is the (.+) (\w+)\?"):
        o = the(scene, m[1])
        return "yes" if m[2] == o.color else "no", o, (m[2],)
    if case(r"Which is (larger|smaller), the (\w+) or the (\w+)\?"):
        p, q = the(scene, m[2]), the(scene, m[3])
        assert {p.size, q.size} == {"large", "small"}
        return (max if m[1] == "larger" else min)(p, q, key=lambda o: o.radius).shape, None, ()
    if case(r"Which is further (\w+), the (\w+) or the (\w+)\?"):
        p, q = the(scene, m[2]), the(scene, m[3])
        side = {"left": "left", "right": "right", "up": "above", "down": "below"}[m[1]]
        return (p if plain_side(p, q, side) else q).shape, None, ()
    if case(r"Are the (.+) and the (.+) the same (color|shape)\?"):
        p, q = the(scene, m[1]), the(scene, m[2])
        assert p is not q and not set(text.replace("?", "").split()) & set(COLOR_NAMES if m[3] == "color" else SHAPES)
        return "yes" if getattr(p, m[3]) == getattr(q, m[3]) else "no", None, ()
    raise AssertionError(f"not understood: {text}")


def read_lesson(scene, context, question, options):
    """The option that a lesson's rule and the picture give, as `read` does."""
    rule = re.fullmatch(r"In this lesson, (?:a shape is (\w+) if it is (.+)|every (.+) is (\w+))\.", context)
    if rule:
        sort = rule[1] or rule[4]
        kinds = re.split(r", | or ", rule[2] or rule[3])
        members = [o for o in scene.objects if (o.color if rule[1] else o.shape) in kinds]
        if question == f"How many of the shapes are {sort}?":
            return str(len(members)), None, ()
        if question == f"What color is the {sort} shape?":
            (o,) = members
            return o.color, o, options
        assert question == f"Which of these is {sort}?"
        (o,) = [o for o in (the(scene, words) for words in options) if o in members]
        return o.shape, None, ()
    north = re.fullmatch(r"The image is a map\. North is at the (\w+)\.", context)
    if north:
        pull = {"top": (0, -1), "bottom": (0, 1), "left": (-1, 0), "right": (1, 0)}[north[1]]
        sign = {"Which of these is farthest north?": 1, "Which of these is farthest south?": -1}[question]
        found = sorted((sign * (o.x * pull[0] + o.y * pull[1]), o.shape) for o in (the(scene, w) for w in options))
        assert found[-1][0] - found[-2][0] >= MIN_OFFSET
        return found[-1][1], None, ()
    price = re.fullmatch(r"In a shop, a large shape costs (\d) coins and a small shape costs (\d) coins\.", context)
    if price:
        cost = {"large": int(price[1]), "small": int(price[2])}
        asked = re.fullmatch(r"How many coins do(?:es the (.+)| all the (.+)) cost(?: together)?\?", question)
        objects = [the(scene, asked[1])] if asked[1] else fitting(scene, asked[2])
        assert cost["large"] > cost["small"] and (asked[1] or len(objects) > 1)
        return str(sum(cost[o.size] for o in objects)), None, ()
    words = re.fullmatch(r"In a new language, (.+)\.", context)
    if words:
        meanings = dict(part.split(" is called ") for part in re.split(r", | and ", words[1]))
        o = the(scene, re.fullmatch(r"What is the color of the (.+) called\?", question)[1])
        assert set(meanings.values()) == set(options)
        return meanings[o.color], o, tuple(meanings)
    assert context == "A dictionary lists words in the order of the alphabet."
    order = sorted((the(scene, w).color, w) for w in options)
    assert len({color for color, _ in order}) == len(options)
    return order[{"first": 0, "last": -1}[question.rsplit(" ", 1)[1].rstrip("?")]][1], None, ()


def split(example):
    """(context, question, options) of a prompt; what is asked of the form is checked on the way."""
    text, context, options = example.prompt, "", ()
    if example.task in ("scienceqa", "mmbench"):
        head, *lines, last = text.split("\n")
        assert last == OPTION_LETTER
        if example.task == "scienceqa":
            assert head.startswith("Context: ")
            context, head, lines = head.removeprefix("Context: "), lines[0], lines[1:]
        assert [line[:3] for line in lines] == ["A. ", "B. ", "C. ", "D. "][: len(lines)]
        options = tuple(line[3:] for line in lines)
        assert options == example.meta["options"] and len(set(options)) == len(options)
        return context, head, options
    ending = " Please answer yes or no." if example.task == "mme" else f"\n{SHORT_ANSWER}"
    assert text.endswith(ending)
    return context, text.removesuffix(ending), options


def answer_of(example):
    """(answer, the object whose colour or shape is asked for or None, the values offered for it)."""
    context, question, options = split(example)
    truth, o, offered = (
        read_lesson(example.scene, context, question, options) if context else read(example.scene, question)
    )
    return ("ABCD"[options.index(truth)] if options else truth), o, offered or (options if o else ())


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("task", OURS)
def test_answers_are_true(made, task):
    for example in made[task] + [e for seed in range(200) for e in examples(task, make_scene(seed, "novel"), 3)]:
        assert answer_of(example)[0] == example.answer, example.prompt
        assert example.answers == (example.answer,) and example.task == task and example.look is PLAIN
        assert re.fullmatch(r"[A-D]|\d|[a-z]+", example.answer)


@pytest.mark.parametrize("task", OURS)
def test_held_out_pairs_are_denied_in_novel_alone(task):
    def denied(example):
        """Pairs that a question names or offers, the picture's own left out."""
        words = re.findall(r"\w+", split(example)[1])
        pairs = {(s, c) for c, s in zip(words, words[1:]) if s in SHAPES and c in COLOR_NAMES}
        _, o, offered = answer_of(example)
        for value in offered:
            pairs |= {(o.shape, value)} if value in COLOR_NAMES else {(value, o.color)} if value in SHAPES else set()
        return pairs - {p.pair for p in example.scene.objects}

    seen = [e for s in ("train", "val", "test") for seed in range(300) for e in examples(task, make_scene(seed, s))]
    found = set().union(*map(denied, seen))
    assert len(found) > 30 and not found & HELD_OUT
    novel = [e for seed in range(600) for e in examples(task, make_scene(seed, "novel"))]
    assert set().union(*map(denied, novel)) & HELD_OUT


@pytest.mark.parametrize("task", OURS)
def test_deterministic_and_complete(made, task):
    scene = make_scene(7, "val")
    assert examples(task, scene) == examples(task, make_scene(7, "val"))
    drawn = {tuple(e.prompt for e in examples(task, scene, variant)) for variant in range(6)}
    assert len(drawn) >= 4
    groups = defaultdict(list)
    for e in made[task]:
        groups[e.scene.id].append(e)
    assert len(groups) > 0.9 * N
    for group in groups.values():
        assert len(group) == PROMPTS_A_PICTURE[task] == len({e.prompt for e in group}) == len({e.part for e in group})
    differ = [examples(task, make_scene(3, s))[0].prompt for s in SPLITS]
    assert len(set(differ)) > 1


def test_every_kind_is_asked(made):
    wanted = {"gqa": {"query", "choose", "verify", "compare", "logical"}, "scienceqa": {"nature", "society", "language"},
              "pope": {"yes", "random", "popular", "adversarial"}, "mmbench": set(mmbench.ABILITIES),
              "mme": {"existence", "count", "position", "color", "ground"}}  # fmt: skip
    for task, categories in wanted.items():
        counts = Counter(e.category for e in made[task])
        assert set(counts) == categories and min(counts.values()) > 0.1 * len(made[task])
    lessons = Counter(e.meta["kind"] for e in made["scienceqa"])
    assert len(lessons) == 7 and min(lessons.values()) > 40
    assert min(Counter((e.category, e.meta["kind"]) for e in made["gqa"]).values()) > 15
    assert max(len(e.prompt.split()) for e in made["scienceqa"]) <= 60


@pytest.mark.parametrize("task, base", [("gqa", 0.5), ("pope", 0.25), ("mme", 0.5)])
def test_no_word_gives_away_yes_or_no(made, task, base):
    asked = [e for e in made[task] if e.answer in ("yes", "no")]
    tallies = {"all": [e.answer == "yes" for e in asked]}
    for e in asked:
        for word in set(re.findall(r"\w+", e.prompt)) | {e.category + " " + str(e.meta.get("kind", ""))}:
            if task != "pope" or word.strip() not in ("yes", "random", "popular", "adversarial"):
                tallies.setdefault(word, []).append(e.answer == "yes")
    tallies = {word: hits for word, hits in tallies.items() if len(hits) >= 60}
    assert len(tallies) > 25
    for word, hits in tallies.items():
        error = (base * (1 - base) / len(hits)) ** 0.5
        assert abs(sum(hits) / len(hits) - base) < 4 * error, (word, sum(hits), len(hits))


def test_yes_and_no_within_a_picture(made):
    for a, b in zip(made["mme"][::2], made["mme"][1::2], strict=True):
        assert (a.part, a.answer, b.part, b.answer) == ("yes", "yes", "no", "no") and a.category == b.category
    parts = [e.part for e in made["pope"]]
    assert parts == ["yes", "random", "popular", "adversarial"] * N
    assert all((e.answer == "yes") == (e.part == "yes") for e in made["pope"])


def test_letters_and_places_are_even(made):
    by_length = defaultdict(Counter)
    for e in made["scienceqa"]:
        by_length[len(e.meta["options"])][e.answer] += 1
    assert set(by_length) == {2, 3, 4}
    for length, counts in by_length.items():
        n = sum(counts.values())
        assert all(abs(counts[x] - n / length) < 4 * (n / length) ** 0.5 for x in "ABCD"[:length])
    for i in range(0, len(made["mmbench"]), 4):
        four = made["mmbench"][i : i + 4]
        assert sorted(e.answer for e in four) == list("ABCD") and [e.part for e in four] == list("0123")
        assert four[1].meta["options"] == four[0].meta["options"][-1:] + four[0].meta["options"][:-1]
    counting = [e for e in made["mmbench"] if e.category == "counting" and e.part == "0"]
    ranks = Counter(
        sorted(map(int, e.meta["options"])).index(int(e.meta["options"]["ABCD".index(e.answer)])) for e in counting
    )
    n = len(counting)
    assert all(abs(ranks[k] - n / 4) < 4 * (n / 4) ** 0.5 for k in range(4))


@pytest.mark.parametrize("kind", ["count", "price"])
def test_the_smallest_number_is_no_better_a_guess(made, kind):
    """With r the truth's rank among k options, (r + 1/2) / k has mean 1/2 if every rank is as likely."""
    ranks = []
    for e in made["scienceqa"]:
        if e.meta["kind"] == kind and "does the" not in e.prompt:
            numbers = list(map(int, e.meta["options"]))
            ranks.append((sorted(numbers).index(numbers["ABCD".index(e.answer)]) + 0.5) / len(numbers))
    assert len(ranks) > 40 and abs(sum(ranks) / len(ranks) - 0.5) < 4 * 0.29 / len(ranks) ** 0.5


def test_pope_settings_ask_for_what_they_say(made):
    company = {"random": 0.0, "adversarial": 0.0}
    for e in made["pope"]:
        words = e.meta["object"].split()
        if e.part == "popular":
            assert len(words) == 1 and words[0] in SHAPES
        if e.part == "adversarial":
            color, shape = words
            shares = lambda s, c, e=e: sum((o.shape == s) + (o.color == c) for o in e.scene.objects)  # noqa: E731
            present = {o.pair for o in e.scene.objects}
            rivals = [shares(s, c) for s in SHAPES for c in COLOR_NAMES if (s, c) not in present | HELD_OUT]
            assert shares(shape, color) == max(rivals) > 0
        if e.part in company and len(words) == 2:
            company[e.part] += words[0] in {o.color for o in e.scene.objects} and words[1] in {
                o.shape for o in e.scene.objects
            }
    assert company["adversarial"] > 2 * company["random"]
    singles = Counter((e.answer, len(e.meta["object"].split())) for e in made["pope"])
    assert abs(singles["yes", 1] / N - 0.5) < 0.06 and abs(singles["no", 1] / (3 * N) - 0.5) < 0.06


def test_lessons_need_context_and_picture(made):
    """The same question and options have other answers under other rules, and the same rule in other pictures."""
    for kind in ("new words", "map"):
        found = defaultdict(set)
        for e in made["scienceqa"]:
            if e.meta["kind"] == kind:
                found[split(e)[1]].add(e.meta["options"]["ABCD".index(e.answer)])
        assert max(len(answers) for answers in found.values()) >= 5
    said = {word for e in made["scienceqa"] for word in re.findall(r"\w+", e.prompt)}
    assert said >= {*scienceqa.SORTS, *scienceqa.NEW_WORDS}


@pytest.mark.parametrize("task", OURS)
def test_the_lines_hold_every_word(made, task):
    """By the tokenizer's own cut of a text into words, so that each can become one token."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def pieces(texts):
        return {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}

    lines = importlib.import_module(f"dyrate_lib.scenes.tasks.{task}").LINES
    known = pieces(lines) | pieces(corpus())
    said = pieces(chat_prompt(e.prompt) for e in made[task]) | pieces(f" {e.answer}" for e in made[task])
    assert said - known == set()
    if task != "pope":
        assert said - pieces(corpus())  # or the lines would not be needed


def test_unknown_tasks_are_named():
    with pytest.raises(InputError, match=r"unknown task 'vqa': choose one of gqa.*textvqa-ocr"):
        examples("vqa", make_scene(0, "val"))
    assert set(OURS) < set(NAMES)
