"""How a training run shares its rows among captions and tasks, and its loss among their kinds: mixes with names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .packing import DEFAULT_SLOTS

# Captions and their questions, then gqa, vizwiz, scienceqa, textvqa, pope, mmbench, mme, textvqa-ocr, then relation, free, told.
# Reading signs and bad photographs is new to a checkpoint of captions; the other tasks ask in new words for what it knows.
KIND_WEIGHTS = (0.2, 0.25, 0.2, 0.1, 0.12, 0.12, 0.08, 0.16, 0.06, 0.1, 0.06, 0.05, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Mix:
    """What rows are made of.

    bad, signed: shares of bad photographs and of pictures with signs. n_bad, n_signed: prompts drawn about either. captions: how
    often a caption's slot holds its caption, else it is free for tasks. long, brief: what is asked of a picture besides, in
    this order and in an order drawn anew; a name as often as it may come. rotations: of MMBench's question in one row. free:
    whether a multiple choice question is then asked without its options, too.
    """

    bad: float = 0.16
    signed: float = 0.3
    n_bad: int = 6
    n_signed: int = 4
    captions: float = 1.0
    long: Sequence[str] = ("scienceqa", "mmbench")  # first, or the short ones would take their room
    brief: Sequence[str] = ("gqa", "gqa", "pope", "mme", "question")
    rotations: int = 1
    free: bool = False


BROAD = Mix()


@dataclass(frozen=True)
class Preset:
    """A mix with the slots and the weights of kinds that go with it, and the weight of what the patches say."""

    mix: Mix = BROAD
    slots: tuple[str, ...] = DEFAULT_SLOTS
    kind_weights: tuple[float, ...] = KIND_WEIGHTS
    text_weight: float = 0.0


# broad: everything alike, as the first leg on the tasks was trained. lagging: for a checkpoint that has been through it. What
# it knows (captions, existence, colours, photographs) is asked less often and at the same weight; what it lacks gets the room:
# letters of options (two rotations of one question, the question without its options, the option told), relations, signs.
PRESETS: dict[str, Preset] = {
    "broad": Preset(),
    "lagging": Preset(
        mix=Mix(
            bad=0.08,
            signed=0.38,
            captions=0.6,
            long=("relation", "mmbench", "scienceqa", "told"),
            brief=("relation", "gqa", "gqa", "pope", "mme", "question"),
            rotations=2,
            free=True,
        ),
        slots=("short", "narrative", "late", *["task:26"] * 4, "task:34", "task:50", "task:50", "task:64"),
        kind_weights=(0.25, 0.3, 0.25, 0.12, 0.12, 0.08, 0.15, 0.25, 0.04, 0.2, 0.1, 0.08, 0.25, 0.15, 0.08),
        text_weight=0.25,
    ),
}
