"""How many steps a training run takes: a number, or what fits before a deadline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Say = Callable[[str], Any]
UNKNOWN_STEPS = 4000  # the schedule's length until the first steps have been timed
# Steps timed to plan the rest, early and again when whatever else starts on the same device has started. Both lie in the
# warm-up of a long run, where the learning rate does not depend on the plan yet.
TIMED = ((10, 40), (130, 190))


class Plan:
    """How many steps there will be: fixed, or as many as fit before a deadline."""

    def __init__(self, steps: int | None, deadline: float | None, start: int, say: Say) -> None:
        self.steps, self.deadline, self.say = steps, deadline, say
        self.fixed = steps is not None
        self.timing = not self.fixed
        self.windows = [(start + a, start + b) for a, b in TIMED]
        self.timed_steps = 0

    def resume(self, planned: int | None) -> None:
        """Keep the plan that an interrupted run was made by; `watch` alone may change it."""
        if planned and not self.fixed:
            self.steps, self.timing = planned, False

    @property
    def length(self) -> int:
        """For the learning rate's schedule."""
        return self.steps or UNKNOWN_STEPS

    def done(self, step: int) -> bool:
        return self.steps is not None and step >= self.steps

    def starts(self, step: int) -> bool:
        """Whether a window to be timed begins behind this step."""
        return self.timing and any(step == a for a, _ in self.windows)

    def ends(self, step: int) -> bool:
        """Whether one ends here; `timed_steps` is then its length."""
        found = [b - a for a, b in self.windows if step == b]
        self.timed_steps = found[0] if found else 0
        return bool(found) and self.timing

    def fit(self, step: int, now: float, ms: float) -> int:
        """Steps in all, if the rest of the time is used, less 3.5% for checkpoints and validation."""
        assert self.deadline is not None
        left = max(0.0, self.deadline - now) * 0.965 / (ms / 1000)
        total = step + int(left)
        return max(step + 1, total // 100 * 100 if left >= 200 else total)

    def measured(self, step: int, now: float, ms: float) -> None:
        """Plan by what a window took: the later one replaces the earlier one's plan, be it longer or shorter."""
        before, self.steps = self.steps, self.fit(step, now, ms)
        self.say(f"{ms:.1f} ms a step: planned {self.steps} steps{f' instead of {before}' if before else ''}")

    def watch(self, step: int, now: float, ms: float) -> None:
        """Plan fewer steps if things have become slower, so that the schedule still ends before the deadline."""
        settled = step > self.windows[-1][1] + 50
        if self.fixed or self.steps is None or self.deadline is None or not settled or step >= self.steps:
            return
        if now + (self.steps - step) * ms / 1000 > self.deadline + 10:
            self.steps = min(self.steps, self.fit(step, now, ms))
            self.say(f"slower than planned ({ms:.1f} ms a step): now {self.steps} steps")
