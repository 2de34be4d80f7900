"""ST3-style annealing: fewer image tokens with depth, and in every layer fewer as the reply grows. A reading of our own.

Source: Zhuang et al., "ST3: Accelerating Multimodal Large Language Model by Spatial-Temporal Visual Token Trimming" (arXiv
2412.20105). There is no released code and its formulas are not where we can read them, so what follows is a reading made
from what is known of it: no training, tokens dropped progressively with depth, image tokens of every layer shrinking as
tokens are generated, about twice the speed at 30 % of the KV cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InputError
from .base import check_rate
from .staged import RELEASED_DEPTH, Staged

DECAYS = ("linear", "cosine", "exponential")


@dataclass
class ST3(Staged):
    """Before layers `first`, `first` + `every`, ... keep int(rho n) of the n tokens there; at step t read ceil(n_l f(t)).

    Depth: head-mean attention of the last prompt token in the layer before the cut; positions stay. Time: at decode step t
    every layer (those before `first` too) reads ceil(n_l f(t)) of the n_l image entries it held after the prompt; the
    lowest by the newest query's head-mean attention in that layer leave its cache for good, before it reads.

    first, every: l0 and s; None takes 3 and 7 of 32 layers at the same relative depth. rho: share kept at each cut.
    decay: f(t) falls from 1 to `floor` in `horizon` steps and stays there: "linear", "cosine" (half a cosine wave) or
        "exponential" (floor^(t / horizon)). floor=1.0 never anneals. Without a cache (use_cache=False) there is nothing that
        could leave it: every pass then cuts with depth only.

    On 32 layers (3, 7, 0.5) and (3, 3, 0.7) both leave 30 % of the prompt's image KV, the figure published.
    """

    first: int | None = None
    every: int | None = None
    rho: float = 0.5
    decay: str = "linear"
    floor: float = 0.1
    horizon: int = 64
    anneals: ClassVar[bool] = True
    name: ClassVar[str] = "st3"

    def __post_init__(self) -> None:
        for key in ("rho", "floor"):
            try:
                check_rate(self, getattr(self, key))
            except InputError:
                raise InputError(f"ST3: {key}={getattr(self, key)!r} must be a share from 0 to 1.") from None
        for key, may in (("first", True), ("every", True), ("horizon", False)):
            value = getattr(self, key)
            if not (value is None and may) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"ST3: {key}={value!r} must be a whole number of at least 1.")
        if self.decay not in DECAYS:
            raise InputError(f"ST3: decay={self.decay!r} is not known; choose one of {', '.join(DECAYS)}.")
        if self.decay == "exponential" and self.floor == 0:
            raise InputError("ST3: an exponential never reaches floor=0; give a floor above 0.")

    def cuts(self, n_layers: int) -> tuple[int, ...]:
        first, every = (
            max(1, math.floor(released * n_layers / RELEASED_DEPTH + 0.5)) if given is None else given
            for given, released in ((self.first, 3), (self.every, 7))
        )
        return tuple(range(first, n_layers, every)) or (first,)

    def keeps(self, stage: int, current: int, n_image: int) -> int:
        return int(current * self.rho)

    def read_share(self, step: int) -> float:
        """f(t), from f(0) = 1 down to `floor` at `horizon`."""
        passed = min(step / self.horizon, 1.0)
        if self.decay == "exponential":
            return self.floor**passed
        fallen = passed if self.decay == "linear" else (1 - math.cos(math.pi * passed)) / 2
        return 1 - (1 - self.floor) * fallen
