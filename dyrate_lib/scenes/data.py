"""Training batches: scenes, their packed token slots, and what the CLS token should know.

A batch is a function of (split, batch number, size) alone, so training can be resumed at any step, and worker processes
can prepare batches in any order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..errors import InputError
from ..prompts import IMAGE_TOKEN, chat_prompt
from .captions import FAMILIES, N_REFERENCES, NEEDS, PROMPTS, annotated_reference
from .questions import questions
from .render import pack_scenes
from .tokenizer import CLIP_MEAN, CLIP_STD, IMAGE_SIZE, MAX_RESPONSE, PATCH_SIZE, build_tokenizer
from .world import COLOR_NAMES, GROUNDS, HELD_OUT, MAX_OBJECTS, SHAPES, TONE_NAMES, Scene, make_scene

N_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2
RESPONSE_ROOM = {"short": 24, "narrative": MAX_RESPONSE, "late": MAX_RESPONSE}
QUESTION_SLOT = 28
DEFAULT_SLOTS = ("short", "narrative", "late", "question", "question", "question", "question")
KINDS = (*FAMILIES, "question")
PAIRS = tuple((s, c) for s in SHAPES for c in COLOR_NAMES)
# What the CLS token is asked for: multi-label presence of shapes, colours, pairs; then count, ground and its tone.
CLS_GROUPS = (
    ("shapes", len(SHAPES)),
    ("colors", len(COLOR_NAMES)),
    ("pairs", len(PAIRS)),
    ("count", MAX_OBJECTS),
    ("ground", len(GROUNDS)),
    ("tone", len(TONE_NAMES)),
)
N_CLS = sum(n for _, n in CLS_GROUPS)
SEEN_PAIR_MASK = np.array([p not in HELD_OUT for p in PAIRS])


@dataclass(frozen=True)
class Layout:
    """Where things lie in a packed row: ``kinds`` and ``lengths`` of the slots, one after another."""

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.lengths)


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
    return _vocabulary()[word if word in ",.:" else "Ġ" + word]


@lru_cache(maxsize=1)
def prefix_ids() -> tuple[int, ...]:
    """Tokens of a chat prompt up to and with the 576 image placeholders, BOS first."""
    head = chat_prompt("").split(IMAGE_TOKEN)[0]
    tokenizer = build_tokenizer()
    return (*tokenizer(head).input_ids, *[tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * N_IMAGE)


@lru_cache(maxsize=8192)
def instruction_ids(user_text: str) -> tuple[int, ...]:
    """Tokens of a chat prompt behind the image."""
    tail = chat_prompt(user_text).split(IMAGE_TOKEN)[1]
    return tuple(build_tokenizer()(tail, add_special_tokens=False).input_ids)


@lru_cache(maxsize=8)
def layout(kinds: tuple[str, ...] = DEFAULT_SLOTS) -> Layout:
    """Slots for these kinds, the last one widened so that a whole row is a multiple of 8 tokens."""
    lengths = [
        QUESTION_SLOT if k == "question" else len(instruction_ids(PROMPTS[k])) + RESPONSE_ROOM[k] for k in kinds
    ]
    lengths[-1] += -(len(prefix_ids()) + sum(lengths)) % 8
    return Layout(tuple(kinds), tuple(lengths))


def response_tokens(scene: Scene, family: str, i: int) -> tuple[list[int], list[int]]:
    """Token ids of one reference with EOS, and each token's need as an index into :data:`NEEDS` (EOS: none)."""
    words = annotated_reference(scene, family, i)
    end = build_tokenizer().eos_token_id
    return [word_id(w) for w, _ in words] + [end], [NEEDS.index(n) for _, n in words] + [NEEDS.index("none")]


def cls_targets(scene: Scene) -> np.ndarray:
    """What the CLS token should know of a scene: float32 [N_CLS], in the groups :data:`CLS_GROUPS`."""
    pairs = {o.pair for o in scene.objects}
    shapes, colors = {s for s, _ in pairs}, {c for _, c in pairs}
    out = [s in shapes for s in SHAPES] + [c in colors for c in COLOR_NAMES] + [p in pairs for p in PAIRS]
    out += [n + 1 == len(scene.objects) for n in range(MAX_OBJECTS)]
    out += [k == scene.ground.kind for k in GROUNDS] + [t == scene.ground.tone for t in TONE_NAMES]
    return np.array(out, dtype=np.float32)


class PackedBatches(torch.utils.data.Dataset):
    """Batch number i -> dict of numpy arrays (see :meth:`__getitem__`); ready for a ``DataLoader`` without batching."""

    def __init__(self, split: str, batch: int, kinds: tuple[str, ...] = DEFAULT_SLOTS, length: int = 1, seed: int = 0):
        self.split, self.batch, self.layout, self.length, self.seed = split, batch, layout(kinds), length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One batch.

        Returns:
            objects [B, 9, 8], grounds [B, 11]: for the renderer; ids, labels int16 [B, S]: the suffix and, at each
            position, the token to predict there (-100: none); need, kind int8 [B, S]: of the token to predict; cls
            float32 [B, N_CLS].
        """
        first = self.seed * 100_000_000 + index * self.batch
        scenes = [make_scene(first + b, self.split) for b in range(self.batch)]
        size, total = self.batch, self.layout.total
        pad = build_tokenizer().pad_token_id
        ids = np.full((size, total), pad, dtype=np.int16)
        labels = np.full((size, total), -100, dtype=np.int16)
        need = np.full((size, total), -1, dtype=np.int8)
        kind = np.full((size, total), -1, dtype=np.int8)
        for b, scene in enumerate(scenes):
            rng = random.Random(f"dyrate-rows-1/{self.split}/{scene.seed}")
            asked = questions(scene, variant=1 + int(rng.random() * 2**30))
            rng.shuffle(asked)
            start = 0
            for name, length in zip(self.layout.kinds, self.layout.lengths, strict=True):
                if name == "question":
                    if not asked:
                        start += length
                        continue
                    q = asked.pop()
                    head, body = instruction_ids(q.prompt), [word_id(q.answer), int(build_tokenizer().eos_token_id)]
                    needs = [NEEDS.index("image"), NEEDS.index("none")]
                else:
                    head = instruction_ids(PROMPTS[name])
                    body, needs = response_tokens(scene, name, int(rng.random() * N_REFERENCES))
                end = start + len(head) + len(body)
                if end > start + length:
                    raise InputError(f"a {name} row of {end - start} tokens does not fit its slot of {length}")
                ids[b, start:end] = (*head, *body)
                at = slice(start + len(head) - 1, end - 1)
                labels[b, at], need[b, at], kind[b, at] = body, needs, KINDS.index(name)
                start += length
        objects, grounds = pack_scenes(scenes)
        cls = np.stack([cls_targets(s) for s in scenes])
        return dict(objects=objects, grounds=grounds, ids=ids, labels=labels, need=need, kind=kind, cls=cls)


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: str) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """What CLIP's image processor makes of pictures [B, 3, 336, 336] in 0..1: rounded to 8 bits, normalised."""
    mean, std = (_constant(v, str(pictures.device)) for v in (CLIP_MEAN, CLIP_STD))
    return ((pictures * 255).round() / 255 - mean) / std
