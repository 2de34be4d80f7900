"""Our loop under `MergeRate`: what the layers >= P receive is averaged by groups, and each group weighs what it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from . import masks, merging
from .decoder import PrunedDecoder
from .layout import gather_columns
from .methods.merge import MergeRate
from .models import Adapter, Prompt


class MergedDecoder(PrunedDecoder):
    """One batch from prompt to reply under `MergeRate`; a `Runner` of `decoder.py`.

    Slots are `PrunedDecoder`'s: kept image tokens, the least important first. All that is added is what lies in them and the
    logarithms of the groups' sizes, which the masks carry: 0 for text, for the reply, and for a group of one.
    """

    method: MergeRate

    def __init__(self, adapter: Adapter, prompt: Prompt, method: MergeRate, capacity: int) -> None:
        super().__init__(adapter, prompt, method, capacity)
        self._tokens = self._owner = self._alike = self._sizes = torch.empty(0)  # from `_choose` on
        self._weights: tuple[Tensor, Tensor] | None = None

    def _choose(self, x: Tensor) -> None:
        state, pictures = self.state, self.prompt.picture_index
        tokens = gather_columns(x, self.prompt.image_index.clamp(min=0))
        state.start(self.shares, self._scores(), x[:, -1] if self.method.wants_hidden else None, tokens)
        n = state.slots[self.layer]
        ranking = state.ranking[:, :n]
        if not n:
            return
        self._owner = merging.owners(tokens, ranking, state.kept, pictures)
        self._sizes = merging.sizes(self._owner, state.present, n)
        self._tokens = gather_columns(tokens, ranking)
        if self.method.average:
            self._tokens = merging.averages(tokens, self._owner, state.present, n)
        self._pictures = None if pictures is None else torch.gather(pictures, 1, ranking)

    def sizes(self) -> Tensor:
        """Image tokens that each slot's token stands for now, [B, slots] float32; 0 where the slot is not read."""
        kept = self.state.kept
        if self._weights is None or self._weights[0] is not kept:
            n = self.state.slots[self.layer]
            found = self._sizes
            if n and self.steps:  # of the groups that there were at layer P, those that left join again
                ranks = torch.arange(n, device=kept.device).expand(kept.shape[0], -1)
                found = merging.sizes(merging.owners(self._tokens, ranks, kept, self._pictures), found, n)
            stays = masks.prefix_masks(kept, n)
            self._weights = (kept, (found.reshape(kept.shape[0], n) * stays).flip(-1))
        return self._weights[1]

    def _log_sizes(self, n: int, like: Tensor) -> Tensor:
        """[B, n] of the last n slots; 0 where nothing is weighed."""
        if not self.method.weigh:
            return like.new_zeros(self.state.kept.shape[0], n)
        return self.sizes()[:, self.sizes().shape[1] - n :].clamp(min=1).log().to(like.dtype)

    def _enter_tail(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        x, rotary, allowed = super()._enter_tail(x)
        n = self.state.slots[self.layer]
        return (torch.cat((self._tokens.flip(1), x[:, n:]), dim=1) if n else x), rotary, allowed

    def _tail_allowed(self, index: int) -> Tensor:
        allowed = super()._tail_allowed(index)
        n = self.state.slots[index]
        if not n or not self.method.weigh:
            return allowed
        bias = torch.nn.functional.pad(self._log_sizes(n, self.prompt.embeds), (0, allowed.shape[-1] - n))
        return bias[:, None, None].expand(allowed.shape).masked_fill(~allowed, -torch.inf)

    def _step_mask(self, index: int, q: Tensor) -> Tensor | None:
        n = self.state.slots[index] if index >= self.layer else 0
        if not n or not self.method.weigh:
            return super()._step_mask(index, q)
        key = (n, self.state.extent_key(index))
        if key not in self._masks:
            bias = torch.nn.functional.pad(self._log_sizes(n, q), (0, self._filled[index] - n))
            allowed = self._tail_readable(index)
            if allowed is not None:
                bias = bias.masked_fill(~allowed, -torch.inf)
            self._masks[key] = bias[:, None, None, self.state.start_slot(index) :]
        return self._masks[key]
