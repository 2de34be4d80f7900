"""Short answers as the benchmarks' protocols read and compare them. Pure text; every function takes a reply as it was generated.

Written from the published descriptions: VQA's evaluation page (Antol et al. 2015; VizWiz, TextVQA and GQA follow it), lmms-eval's
`exact_match` for GQA, LLaVA's scripts for ScienceQA, POPE (Li et al. 2023), MMBench (Liu et al. 2023), MME (Fu et al. 2023).
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Sequence

from .errors import InputError

ANNOTATORS = 10  # of a question of VQA, VizWiz and TextVQA
NUMBER_WORDS = {
    word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
_ARTICLES = ("a", "an", "the")
# Contractions that people type without their apostrophe. Forms that are words of their own (its, well, were) are left alone.
_CONTRACTED = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shouldn't wasn't "
    "weren't won't wouldn't i'm i've he's she's that's there's what's where's who's how's let's you're you've you'll they're "
    "they've they'll we've could've might've should've would've o'clock y'all"
).split()
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED}
# The marks of the official script: not the apostrophe (possessives), the colon (times), signs such as % and $; comma and period
# have rules of their own.
_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`?!]")


@functools.lru_cache(maxsize=65536)  # a table of methods compares with the same answers again and again
def normalise_vqa(text: str) -> str:
    """An answer by the processing of VQA's evaluation: 'The  two cats.' -> '2 cats'.

    Lowercase; a period goes unless it is a decimal point; a comma goes, and joins what it parted only between digits;
    brackets, quotes, dashes, slashes and the like become spaces; number words to ten ('none' is 0) become digits; articles go;
    contractions without their apostrophe get it back; spaces are single.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().strip()).replace(",", " ")
    text = _MARKS.sub(" ", re.sub(r"\.(?!\d)", "", text))
    words = (NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def same_but_case(reply: str, answer: str) -> bool:
    """GQA's match as lmms-eval takes it: equal but for case, punctuation and space around."""
    return _plain(reply) == _plain(answer)


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()


def soft_accuracy(reply: str, answers: Sequence[str]) -> float:
    """VQA's accuracy of one reply, in 0..1: min(1, matches / 3), the mean over the ten subsets that leave one answer out.

    Compared after `normalise_vqa`. Of m equal answers: 0 for none, 0.3, 0.6, 0.9 for one to three, 1 from four up.

    Raises:
        InputError: not ten answers.
    """
    if isinstance(answers, str) or len(answers) != ANNOTATORS:
        given = 1 if isinstance(answers, str) else len(answers)
        raise InputError(f"soft accuracy compares with {ANNOTATORS} answers, not {given}: give one of each annotator")
    said = normalise_vqa(reply)
    matches = sum(normalise_vqa(answer) == said for answer in answers)
    # one of the m matching is left out in m of the ten subsets
    without = matches * min(1.0, (matches - 1) / 3) + (ANNOTATORS - matches) * min(1.0, matches / 3)
    return without / ANNOTATORS


def option_letter(reply: str, options: Sequence[str]) -> str | None:
    """Which option a reply chooses, as a capital letter, or None if it cannot be told.

    A letter of an option by itself or marked as one ('B', 'b.', '(B)', 'B) red', 'B. red', 'B: red', 'The answer is B.'); else
    the option whose text, after `normalise_vqa`, is the reply. Nothing else is guessed: MMBench's paper lets a language
    model read such replies, here they are wrong.
    """
    letters, text = string.ascii_uppercase[: len(options)], reply.strip()
    alone = re.fullmatch(r"\(?([A-Za-z])[).:]*", text)
    marked = re.match(r"(?:\(([A-Z])\)|([A-Z])[).:])(?=\s|$)", text)
    told = re.search(r"(?i:answer is) \(?([A-Z])\)?(?![\w'])", text)
    for found in (alone, marked, told):
        letter = next((group.upper() for group in found.groups() if group), "") if found else ""
        if letter and letter in letters:
            return letter
    said = normalise_vqa(text)
    same = [letter for letter, option in zip(letters, options) if said and normalise_vqa(option) == said]
    return same[0] if len(same) == 1 else None


def yes_or_no(reply: str) -> str | None:
    """'yes' or 'no' where that is the reply's first word, whatever its case and marks; else None."""
    first = re.match(r"\W*(yes|no)(?![\w'])", reply.lower())
    return first.group(1) if first else None
