"""How many steps a training run takes: a number, or what fits before a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Say = Callable[[str], Any]
UNKNOWN_STEPS = 4000  # the schedule's length until the first steps have been timed
TIMED = (10, 40)  # steps timed to plan the rest


class Plan:
    """How many steps there will be: fixed, or as many as fit before a deadline."""

    def __init__(self, steps: int | None, deadline: float | None, start: int, say: Say) -> None:
        self.steps, self.deadline, self.say = steps, deadline, say
        self.fixed = steps is not None
        self.time_from, self.time_to = (start + n for n in TIMED)

    @property
    def length(self) -> int:
        """For the learning rate's schedule."""
        return self.steps or UNKNOWN_STEPS

    def done(self, step: int) -> bool:
        return self.steps is not None and step >= self.steps

    def fit(self, step: int, now: float, ms: float) -> int:
        """Steps in all, if the rest of the time is used, less 3.5% for checkpoints and validation."""
        assert self.deadline is not None
        left = max(0.0, self.deadline - now) * 0.965 / (ms / 1000)
        total = step + int(left)
        return max(step + 1, total // 100 * 100 if left >= 200 else total)

    def measured(self, step: int, now: float, ms: float) -> None:
        self.steps = self.fit(step, now, ms)
        self.say(f"{ms:.1f} ms a step: planned {self.steps} steps")

    def watch(self, step: int, now: float, ms: float) -> None:
        """Plan fewer steps if things have become slower, so that the schedule still ends before the deadline."""
        if self.fixed or self.steps is None or self.deadline is None or not self.time_to + 50 < step < self.steps:
            return
        if now + (self.steps - step) * ms / 1000 > self.deadline + 10:
            self.steps = min(self.steps, self.fit(step, now, ms))
            self.say(f"slower than planned ({ms:.1f} ms a step): now {self.steps} steps")
