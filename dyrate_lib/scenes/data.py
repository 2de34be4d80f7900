"""Training batches: scenes, their packed token slots, and what the CLS token should know.

A batch is a function of (split, batch number, size) alone, so training can be resumed at any step, and worker processes
can prepare batches in any order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from .lettering import WORDS
from .mixes import BROAD, Mix
from .packing import (
    DEFAULT_SLOTS,
    KINDS,
    QUESTION_SLOT,
    instruction_ids,
    layout,
    prefix_ids,
    response_tokens,
    word_id,
)
from .patch_texts import patch_texts, words_shown
from .render import pack_scenes
from .rows import compose
from .tokenizer import CLIP_MEAN, CLIP_STD, build_tokenizer
from .world import COLOR_NAMES, GROUNDS, HELD_OUT, MAX_OBJECTS, SHAPES, TONE_NAMES, Scene, make_scene

__all__ = [
    "CLS_GROUPS", "DEFAULT_SLOTS", "KINDS", "N_CLS", "PackedBatches", "QUESTION_SLOT", "SEEN_PAIR_MASK", "cls_targets",
    "instruction_ids", "layout", "normalise", "prefix_ids", "response_tokens", "word_id",
]  # fmt: skip

PAIRS = tuple((s, c) for s in SHAPES for c in COLOR_NAMES)
# What the CLS token is asked for: multi-label presence of shapes, colours, pairs; then count, ground and its tone;
# and the words on signs, multi-label.
CLS_GROUPS = (
    ("shapes", len(SHAPES)),
    ("colors", len(COLOR_NAMES)),
    ("pairs", len(PAIRS)),
    ("count", MAX_OBJECTS),
    ("ground", len(GROUNDS)),
    ("tone", len(TONE_NAMES)),
    ("words", len(WORDS)),
)
N_CLS = sum(n for _, n in CLS_GROUPS)
SCENES_PER_SEED = 100_000_000
SEEN_PAIR_MASK = np.array([p not in HELD_OUT for p in PAIRS])


LABELLED = 1024  # so many positions at a time are gathered, or the allocator would meet another size at each step


def labelled(labels: np.ndarray, kind: np.ndarray) -> dict[str, np.ndarray]:
    """The positions that have a label, about a fifth: the only ones worth a row of logits.

    Args:
        labels, kind: [B, S].

    Returns:
        at int32 [M]: indices into B * S, M the next multiple of :data:`LABELLED`, filled up with 0; at_labels and at_kind [M]:
        what is there, -100 and -1 where filled up.
    """
    at = np.flatnonzero(labels >= 0).astype(np.int32)
    extra = (0, -len(at) % LABELLED)
    said, sorts = labels.ravel()[at], kind.ravel()[at]
    return {
        "at": np.pad(at, extra),
        "at_labels": np.pad(said, extra, constant_values=-100),
        "at_kind": np.pad(sorts, extra, constant_values=-1),
    }


def cls_targets(scene: Scene) -> np.ndarray:
    """What the CLS token should know of a scene without signs: float32 [N_CLS], in the groups :data:`CLS_GROUPS`."""
    pairs = {o.pair for o in scene.objects}
    shapes, colors = {s for s, _ in pairs}, {c for _, c in pairs}
    out = [s in shapes for s in SHAPES] + [c in colors for c in COLOR_NAMES] + [p in pairs for p in PAIRS]
    out += [n + 1 == len(scene.objects) for n in range(MAX_OBJECTS)]
    out += [k == scene.ground.kind for k in GROUNDS] + [t == scene.ground.tone for t in TONE_NAMES]
    return np.array([*out, *[0] * len(WORDS)], dtype=np.float32)


class PackedBatches(torch.utils.data.Dataset):
    """Batch number i -> dict of numpy arrays (see :meth:`__getitem__`); ready for a ``DataLoader`` without batching.

    ``first``: how many of the split's scenes are passed over, those that an earlier run has seen.
    """

    def __init__(
        self,
        split: str,
        batch: int,
        kinds: tuple[str, ...] = DEFAULT_SLOTS,
        length: int = 1,
        seed: int = 0,
        first: int = 0,
        mix: Mix = BROAD,
    ):
        self.split, self.batch, self.layout, self.length, self.mix = split, batch, layout(kinds), length, mix
        self.first = seed * SCENES_PER_SEED + first

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One batch.

        Returns:
            objects [B, 9, 8], grounds [B, 11] and looks, a list of B: for the renderer; ids, labels int16 [B, S]: the
            suffix and, at each position, the token to predict there (-100: none); need, kind int8 [B, S]: of the token
            to predict; cls float32 [B, N_CLS] and seen bool [B]: whether the picture shows what cls says (a bad
            photograph need not, nor one whose signs cover something); the words of signs it shows always. texts int8
            [B, 2, 576]: see :func:`~dyrate_lib.scenes.patch_texts.patch_texts`. And what :func:`labelled` returns.
        """
        first = self.first + index * self.batch
        scenes = [make_scene(first + b, self.split) for b in range(self.batch)]
        shape = (self.batch, self.layout.total)
        ids = np.full(shape, build_tokenizer().pad_token_id, dtype=np.int16)
        labels = np.full(shape, -100, dtype=np.int16)
        need, kind = np.full(shape, -1, dtype=np.int8), np.full(shape, -1, dtype=np.int8)
        starts = np.cumsum((0, *self.layout.lengths))
        rows = [compose(scene, self.layout, self.mix) for scene in scenes]
        for b, row in enumerate(rows):
            for slot, part in row.placed:
                start = starts[slot]
                end = start + len(part)
                ids[b, start:end] = (*part.head, *part.body)
                at = slice(start + len(part.head) - 1, end - 1)
                labels[b, at], need[b, at], kind[b, at] = part.body, part.needs, KINDS.index(part.kind)
        objects, grounds = pack_scenes(scenes)
        seen, looks = np.array([row.seen for row in rows]), [row.look for row in rows]
        cls = np.stack([cls_targets(s) for s in scenes])
        cls[:, -len(WORDS) :] = words_shown(looks)
        texts = np.stack([patch_texts(look) for look in looks])
        return dict(
            objects=objects, grounds=grounds, looks=looks, ids=ids, labels=labels, need=need, kind=kind, cls=cls, seen=seen,
            texts=texts, **labelled(labels, kind),
        )  # fmt: skip


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: str) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """What CLIP's image processor makes of pictures [B, 3, 336, 336] in 0..1: rounded to 8 bits, normalised."""
    mean, std = (_constant(v, str(pictures.device)) for v in (CLIP_MEAN, CLIP_STD))
    return ((pictures * 255).round() / 255 - mean) / std
