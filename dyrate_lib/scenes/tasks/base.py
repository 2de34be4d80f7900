"""What a short-answer task asks of a scene: one `Example` is one prompt about one picture, with the answers its protocol takes.

The seven tasks play the roles of the paper's Table I: each has its benchmark's form of question, its prompt and its metric
(`dyrate_lib.task_metrics`), on pictures whose truth is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..world import Scene

TASKS = ("gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench", "mme")
# Prompts that are asked about one picture of a task: an evaluation takes all of them, or the metric is not the benchmark's.
PROMPTS_A_PICTURE = {"gqa": 1, "vizwiz": 1, "scienceqa": 1, "textvqa": 1, "pope": 4, "mmbench": 4, "mme": 2}
SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Sign:
    """A word drawn into a picture. x, y: top left corner of its board, px; scale: px of a font pixel; colours in 0..1."""

    text: str
    x: int
    y: int
    scale: int
    ink: tuple[float, float, float]
    board: tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """How a picture departs from its plain rendering. All at their defaults: it does not.

    signs: words drawn over it. crop: (x, y, side) in px of the 336 px picture, enlarged to fill it. blur: standard deviation of
    a Gaussian, px. noise: standard deviation of added pixel noise, in units of the range 0..1; seed: of that noise.
    Applied in this order: signs, crop, blur, noise.
    """

    signs: tuple[Sign, ...] = ()
    crop: tuple[float, float, float] | None = None
    blur: float = 0.0
    noise: float = 0.0
    seed: int = 0

    @property
    def plain(self) -> bool:
        """Whether the picture is the scene's own."""
        return not self.signs and self.crop is None and self.blur == 0 and self.noise == 0


PLAIN = Look()


@dataclass(frozen=True)
class Example:
    """One prompt about one picture.

    task: one of `TASKS`. prompt: the user's text in full, without the chat template. answer: what a model is trained to say.
    answers: what the metric compares with (ten for VizWiz and TextVQA, else one). category: what scores are also given by.
    part: which of a picture's prompts it is (POPE: yes, random, popular, adversarial; MMBench: the rotation; MME: yes, no).
    meta: whatever else is known of it.
    """

    task: str
    scene: Scene
    prompt: str
    answer: str
    answers: tuple[str, ...]
    category: str
    part: str = ""
    look: Look = PLAIN
    meta: Mapping[str, Any] = field(default_factory=dict)
