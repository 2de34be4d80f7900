"""Our loop under `MergeRate`: what the layers >= P receive is averaged by groups, and each group weighs what it stands for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import text_scores
from .decoder import PrunedDecoder
from .layout import gather_columns
from .merging import Groups
from .methods.merge import MergeRate


class MergedDecoder(PrunedDecoder):
    """One batch from prompt to reply under `MergeRate`; a `Runner` of `decoder.py`.

    Slots are `PrunedDecoder`'s: kept image tokens, the least important first. All that is added is what lies in them and the
    logarithms of the groups' sizes, which the masks carry: 0 for text, for the reply, and for a group of one.
    """

    method: MergeRate
    groups: Any = None  # `Groups`, from the prompt's layer P on

    def _look(self, q: Tensor, keys: Tensor) -> None:
        super()._look(q, keys)
        if self.steps == 0:
            prompt, by_text = self.prompt, self.method.rated_by == "text"
            self._rated = text_scores(q, keys, prompt.types, prompt.image_index) if by_text else self._scores()

    def _choose(self, x: Tensor) -> None:
        tokens = gather_columns(x, self.prompt.image_index.clamp(min=0))
        self.state.start(self.shares, self._rated, x[:, -1] if self.method.wants_hidden else None, tokens)
        self.groups = Groups(self.method, self.state, tokens, self.prompt.picture_index)

    def _enter_tail(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        x, rotary, allowed = super()._enter_tail(x)
        return torch.cat((self.groups.tokens.flip(1), x[:, self.groups.n :]), dim=1), rotary, allowed

    def _tail_allowed(self, index: int) -> Tensor:
        allowed = super()._tail_allowed(index)
        if not self.groups.n or not self.method.weigh:
            return allowed
        bias = F.pad(self.groups.log_sizes(self.prompt.embeds.dtype), (0, allowed.shape[-1] - self.groups.n))
        return bias[:, None, None].expand(allowed.shape).masked_fill(~allowed, -torch.inf)

    def _step_mask(self, index: int, q: Tensor) -> Tensor | None:
        if index < self.layer or not self.groups.n or not self.method.weigh:
            return super()._step_mask(index, q)
        key = (self.groups.n, -1)
        if key not in self._masks:
            bias = F.pad(self.groups.log_sizes(q.dtype), (0, self._filled[index] - self.groups.n))
            allowed = self._tail_readable(index)
            if allowed is not None:
                bias = bias.masked_fill(~allowed, -torch.inf)
            self._masks[key] = bias[:, None, None, self.state.start_slot(index) :]
        return self._masks[key]
