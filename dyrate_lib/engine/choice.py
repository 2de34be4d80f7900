"""Choosing the next token inside the loop: greedy, along given tokens, or sampling, all without the host.

Sampling divides the probabilities by exponential noise and takes the largest, which is what `torch.multinomial` does for one
draw: with the same generator and the same logits it is the same token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..request import Sampling
from .cache import rounded
from .state import MOST_ENDS, State, send

SAID = 64  # ids that a penalty looks at are kept in rows of a whole number of these, so that near lengths share a graph


class Choice:
    """How tokens are chosen. `choice(state)` gives the next tokens [B] from state.logits, None for those of the highest logit.

    ids: [B, T] the prompt's, for the repetition penalty; ends: end tokens, at most `state.MOST_ENDS`; forced: [B, passes] int64
    tokens to follow, or None. key: what a captured graph depends on.
    """

    def __init__(
        self, device: torch.device, ids: Tensor, ends: list[int], pad: int, sampling: Sampling, forced: Tensor | None = None
    ) -> None:  # fmt: skip
        self.ids, self.ends, self.pad, self.forced = ids, ends, pad, forced
        self.penalised = sampling.penalised and forced is None
        self.generator: torch.Generator | None = None
        self.key: tuple = ("greedy", float(sampling.repetition_penalty))
        if forced is not None:
            self.key = ("forced",)
        elif sampling.do_sample:
            self.key = (
                "sample", float(sampling.temperature), int(sampling.top_k), float(sampling.top_p),
                float(sampling.repetition_penalty),
            )  # fmt: skip
            self.generator = sampling.generator(device)
        self.width = rounded(ids.shape[1], SAID) if self.penalised else 0
        self.key = (*self.key, self.width)
        self._processors: Any = [] if forced is not None else sampling.processors()

    def load(self, state: State) -> None:
        """Put what the choice reads on the device."""
        if state.ends_of != (self.ends, self.pad):  # else they are there from the batch before
            send(state.ends, torch.tensor(self.ends + [-1] * (MOST_ENDS - len(self.ends))))
            send(state.pad, torch.tensor([self.pad]))
            state.ends_of = (list(self.ends), self.pad)
        if self.forced is not None:
            state.forced[:, : self.forced.shape[1]].copy_(self.forced)
        if self.penalised:
            # one buffer for all prompts of a plan, whose address a graph holds; places before the prompt, and those of the
            # reply until they are written, hold the row's first id: penalised anyway
            if state.said is None:
                state.said = self.ids.new_empty(self.ids.shape[0], self.width + state.plan.passes)
            state.said.copy_(self.ids[:, :1].expand_as(state.said))
            state.said[:, self.width - self.ids.shape[1] : self.width].copy_(self.ids)

    def __call__(self, state: State) -> Tensor | None:
        if state.forced is not None:
            return state.forced.index_select(1, state.step)[:, 0]
        if self.generator is None and not self._processors:
            return None
        if self.penalised:  # the newest token, which this pass has read, is among those said
            place = self.width - 1 + state.step  # at pass 0 the prompt's last, which stands there already
            newest = torch.where(state.step > 0, state.token[:, None], state.said.index_select(1, place))
            state.said.index_copy_(1, place, newest)
        scores = state.logits.float()
        if self._processors:
            scores = self._processors(state.said, scores)
        if self.generator is None:
            return scores.argmax(-1)
        noise = torch.empty_like(scores).exponential_(1.0, generator=self.generator)
        return (torch.softmax(scores, dim=-1) / noise).argmax(-1)
