"""Token ids of prompts and responses, and the slots of a packed training row that they are put into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import InputError
from ..prompts import IMAGE_TOKEN, chat_prompt
from .captions import FAMILIES, NEEDS, PROMPTS, annotated_reference
from .tasks import NAMES
from .tasks.base import Example
from .tokenizer import IMAGE_SIZE, MAX_RESPONSE, PATCH_SIZE, build_tokenizer
from .world import Scene

N_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2
RESPONSE_ROOM = {"short": 24, "narrative": MAX_RESPONSE, "late": MAX_RESPONSE}
QUESTION_SLOT = 28
# Kinds of prompts that training alone asks, see `scaffolds`.
SCAFFOLDS = ("relation", "free", "told")
KINDS = (*FAMILIES, "question", *NAMES, *SCAFFOLDS)
# A slot of a caption family or "question" holds that and nothing else; a slot "task:N" has N tokens for any question or task.
TASK_SLOT = "task:"
DEFAULT_SLOTS = ("short", "narrative", "late", "task:28", "task:28", "task:34", "task:34", "task:50", "task:72")


@dataclass(frozen=True)
class Layout:
    """Where things lie in a packed row: ``kinds`` and ``lengths`` of the slots, one after another."""

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def tasks(self) -> bool:
        """Whether there is a slot for the short-answer tasks."""
        return any(k.startswith(TASK_SLOT) for k in self.kinds)


@dataclass(frozen=True)
class Part:
    """One prompt with its response, as tokens. ``needs``: of each token of ``body``, as an index into :data:`NEEDS`."""

    kind: str
    head: tuple[int, ...]
    body: tuple[int, ...]
    needs: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.head) + len(self.body)


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, int]:
    """Token id of every word as it stands in a sentence (with its leading space; punctuation without)."""
    return dict(build_tokenizer().get_vocab())


@lru_cache(maxsize=65536)
def word_id(word: str) -> int:
    """The one token of a word of the scenes world.

    Raises:
        KeyError: if the word is not a single token (then the tokenizer was trained without it).
    """
    return _vocabulary()[_as_token(word)]


@lru_cache(maxsize=1)
def prefix_ids() -> tuple[int, ...]:
    """Tokens of a chat prompt up to and with the 576 image placeholders, BOS first."""
    head = chat_prompt("").split(IMAGE_TOKEN)[0]
    tokenizer = build_tokenizer()
    return (*tokenizer(head).input_ids, *[tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * N_IMAGE)


@lru_cache(maxsize=1)
def _encoder():
    """The tokenizer without transformers' wrapping, which takes most of the time of a short text; and EOS."""
    tokenizer = build_tokenizer()
    return tokenizer.backend_tokenizer, int(tokenizer.eos_token_id)


def _ids(text: str) -> tuple[int, ...]:
    return tuple(_encoder()[0].encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=8192)
def instruction_ids(user_text: str) -> tuple[int, ...]:
    """Tokens of a chat prompt behind the image."""
    return _ids(chat_prompt(user_text).split(IMAGE_TOKEN)[1])


@lru_cache(maxsize=4096)
def answer_ids(answer: str) -> tuple[int, ...]:
    """Tokens of an answer as it follows a prompt, EOS last."""
    return (*_ids(f" {answer}"), _encoder()[1])


@lru_cache(maxsize=8)
def layout(kinds: tuple[str, ...] = DEFAULT_SLOTS) -> Layout:
    """Slots for these kinds, the last one widened so that a whole row is a multiple of 8 tokens.

    Raises:
        InputError: for a kind that is no caption family, "question" or "task:N" with N tokens.
    """
    lengths = [_length(k) for k in kinds]
    lengths[-1] += -(len(prefix_ids()) + sum(lengths)) % 8
    return Layout(tuple(kinds), tuple(lengths))


def _length(kind: str) -> int:
    if kind in PROMPTS:
        return len(instruction_ids(PROMPTS[kind])) + RESPONSE_ROOM[kind]
    if kind == "question":
        return QUESTION_SLOT
    if kind.startswith(TASK_SLOT) and kind.removeprefix(TASK_SLOT).isdecimal():
        return int(kind.removeprefix(TASK_SLOT))
    raise InputError(f"unknown slot {kind!r}: choose of {', '.join(FAMILIES)}, question and {TASK_SLOT}N for N tokens")


def response_tokens(scene: Scene, family: str, i: int, tokenizer: Any = None) -> tuple[list[int], list[int]]:
    """Token ids of one reference with EOS, and each token's need as an index into :data:`NEEDS` (EOS: none).

    ``tokenizer``: a checkpoint's own, None: the one that training builds.

    Raises:
        KeyError: for a word that is not a single token of the tokenizer.
    """
    words = annotated_reference(scene, family, i)
    needs = [NEEDS.index(n) for _, n in words] + [NEEDS.index("none")]
    if tokenizer is None:
        return [word_id(w) for w, _ in words] + [_encoder()[1]], needs
    known = tokenizer.get_vocab()
    return [known[_as_token(w)] for w, _ in words] + [int(tokenizer.eos_token_id)], needs


def _as_token(word: str) -> str:
    return word if word in ",.:" else "Ġ" + word


def caption_part(scene: Scene, family: str, i: int) -> Part:
    """A caption prompt with reference ``i``."""
    body, needs = response_tokens(scene, family, i)
    return Part(family, instruction_ids(PROMPTS[family]), tuple(body), tuple(needs))


def answer_part(kind: str, prompt: str, answer: str) -> Part:
    """A prompt with a short answer, all of which needs the image."""
    body = answer_ids(answer)
    return Part(kind, instruction_ids(prompt), body, (NEEDS.index("image"),) * (len(body) - 1) + (NEEDS.index("none"),))


def example_part(name: str, example: Example) -> Part:
    """An example of the task called ``name``."""
    return answer_part(name, example.prompt, example.answer)


def place(parts: Iterable[Part], lengths: Sequence[int], free: Sequence[int]) -> list[tuple[int, Part]]:
    """Put parts into slots, each in turn into the shortest free one it fits; what fits none is left out.

    Args:
        parts: those wanted most first; no more of them are drawn than there is room for.
        lengths: of all slots.
        free: indices of the slots that may be used.

    Returns:
        (slot, part) of those that found room.
    """
    left = sorted(free, key=lambda s: lengths[s])
    found = []
    for part in parts:
        slot = next((s for s in left if len(part) <= lengths[s]), None)
        if slot is not None:
            left.remove(slot)
            found.append((slot, part))
        if not left:
            break
    return found
