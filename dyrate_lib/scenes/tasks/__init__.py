"""Seven short-answer tasks on scenes, in the roles of the paper's Table I. One file a task; `examples` asks for them by name."""

from .base import OPTION_LETTER, PLAIN, PROMPTS_A_PICTURE, SHORT_ANSWER, TASKS, Example, Look, Sign

__all__ = ["OPTION_LETTER", "PLAIN", "PROMPTS_A_PICTURE", "SHORT_ANSWER", "TASKS", "Example", "Look", "Sign"]
