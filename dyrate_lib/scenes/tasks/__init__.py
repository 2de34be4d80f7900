"""Seven short-answer tasks on scenes, in the roles of the paper's Table I. One file a task; `examples` asks for them by name."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import InputError
from ..world import Scene
from .base import OPTION_LETTER, PLAIN, PROMPTS_A_PICTURE, SHORT_ANSWER, TASKS, Example, Look, Sign

# What can be asked for: TextVQA also with the picture's words given in the prompt.
NAMES = (*TASKS, "textvqa-ocr")


def base_task(name: str) -> str:
    """The task behind a name: textvqa for textvqa-ocr, else the name itself. InputError, with the names, for an unknown one."""
    if name not in NAMES:
        raise InputError(f"unknown task {name!r}: choose one of {', '.join(NAMES)}")
    return name.removesuffix("-ocr")


def _module(task: str) -> Any:
    return importlib.import_module(f".{task}", __name__)


def examples(task: str, scene: Scene, variant: int = 0) -> list[Example]:
    """All prompts of a task about one scene, deterministic in the scene and `variant` (another variant draws others).

    Returns:
        `PROMPTS_A_PICTURE` of them, or none where the scene gives no such question.

    Raises:
        InputError: an unknown task (`NAMES` lists them).
    """
    made = _module(base_task(task))
    return made.examples(scene, variant, with_text=True) if task == "textvqa-ocr" else made.examples(scene, variant)


def lines() -> list[str]:
    """Texts that hold every word which the tasks can say and `scenes.questions` cannot: for a tokenizer's corpus."""
    return [line for task in TASKS for line in _module(task).LINES]


__all__ = [
    "NAMES", "OPTION_LETTER", "PLAIN", "PROMPTS_A_PICTURE", "SHORT_ANSWER", "TASKS", "Example", "Look", "Sign", "base_task",
    "examples", "lines",
]  # fmt: skip
