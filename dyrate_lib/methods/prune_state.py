"""What is read now: a batch's image tokens while a method drops them. Tensors alone; both of the loops that prune hold one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import masks
from .base import Method, PrefillView, StepView


class PruneState:
    """Which image tokens of each sample are read now, and where they lie in the layers >= P. Tensors only, no model.

    Slots: image tokens of the layers >= P lie in `n_slots` slots, least important first, before the text
    (`masks.tail_order`). While tokens only leave from the low end of one ranking, what is read is a suffix of the slots.
    """

    def __init__(
        self, method: Method, layer: int, n_layers: int, types: Tensor, image_index: Tensor, content_key: Tensor
    ) -> None:
        self.method, self.layer, self.n_layers = method, layer, n_layers
        self.types, self.image_index, self.content_key = types, image_index, content_key
        self.present = image_index >= 0
        self.n_image = self.present.sum(-1)
        self.steps = 0
        # tensors from `start` on
        self.ranking: Any = None
        self.kept: Any = None
        self._reads: Any = None
        self._order: Any = None  # the ranking that `reads` is a prefix of: `ranking`, or that of the newest rows
        self._rows: list[Tensor] = []  # scores of the newest query rows, where the method ranks by several
        self.slots: dict[int, int] = {}
        self._extents: dict[int, tuple[int, int]] = {}

    def start(
        self, shares: Tensor, scores: Tensor, hidden: Tensor | None = None, tokens: Tensor | None = None
    ) -> None:
        """Order the tokens and choose how many stay for the prompt. Arguments as `PrefillView`'s."""
        view = PrefillView(scores, shares, self.n_image, self.content_key, hidden, tokens)
        order = self.method.order(view)
        # absent tokens last, whatever the method says
        late = torch.gather(~self.present, 1, order).long()
        self.ranking = torch.gather(order, 1, torch.argsort(late, dim=-1, stable=True))
        self.kept = torch.minimum(self.method.prefill(view).clamp(min=0), self.n_image)
        self._reads, self._order = None, self.ranking
        if self.method.window > 1:
            self._rows = [scores]
        self._extents.clear()
        for layer in range(self.layer, self.n_layers):
            rows = self.n_image if self.method.reversible else self.layer_kept(layer)
            self.slots[layer] = int(rows.max()) if rows.numel() else 0

    @property
    def reads(self) -> Any:
        """[B, N] bool: the image tokens (raster order) that are read now; None before `start`."""
        if self._reads is None and self.ranking is not None:
            self._reads = masks.ranking_to_tokens(masks.prefix_masks(self.kept, self.ranking.shape[1]), self.ranking)
        return self._reads

    @reads.setter
    def reads(self, value: Any) -> None:
        self._reads = value

    def advance(self, shares: Tensor, scores: Tensor | Callable[[], Tensor], hidden: Tensor | None = None) -> None:
        """Let the method look at the newest query row and drop (or, if reversible, restore) tokens.

        scores: [B, N], or what makes them: only methods that rank anew at each step ask. hidden: [B, D], or None.
        """
        self.steps += 1
        if self.method.rank != "step" and type(self.method).step is Method.step:
            return  # nothing changes after the prompt
        view = StepView(self.steps, shares, self.kept, self.n_image, self.content_key, hidden)
        kept = self.method.step(view).clamp(min=0)
        kept = torch.minimum(kept, self.n_image if self.method.reversible else self.kept)
        if self.method.rank == "step":
            scores = self._pooled(scores if isinstance(scores, Tensor) else scores())
            candidates = scores if self.method.reversible else scores.masked_fill(~self.reads, -torch.inf)
            order = masks.rank_tokens(candidates, self.present)
            self.reads = masks.ranking_to_tokens(masks.prefix_masks(kept, order.shape[1]), order)
            self._order = order
        else:
            self.reads = None  # the first `kept` of the ranking, should anybody ask
        self.kept = kept
        self._extents.clear()

    def _pooled(self, scores: Tensor) -> Tensor:
        """Scores [B, N] that rank now, the newest row's among them."""
        if self.method.window == 1:
            return scores
        self._rows = [*self._rows, scores][-self.method.window :]
        return self.method.pooled(torch.stack(self._rows))

    def layer_kept(self, layer: int) -> Tensor:
        """[B] int64: image tokens that layer `layer` reads now."""
        return self.n_image if layer < self.layer else self.method.at_layer(layer, self.kept, self.n_image)

    def extent(self, layer: int) -> tuple[int, int]:
        """The largest and the smallest number of image tokens that a sample reads at layer `layer` >= P now.

        Asked of the device once a step, not once a layer, unless the layers differ: each answer makes the host wait.
        """
        key = self.extent_key(layer)
        if key not in self._extents:
            kept = self.layer_kept(layer)
            most, least = torch.stack((kept.max(), kept.min())).tolist()
            self._extents[key] = (most, least)
        return self._extents[key]

    def extent_key(self, layer: int) -> int:
        """The same for layers that read the same number of tokens: -1, or the layer itself where it has a rule of its own."""
        own = type(self.method).at_layer is not Method.at_layer or self.method.caps(layer, self.n_image) is not None
        return layer if own else -1

    def start_slot(self, layer: int) -> int:
        """The first slot of layer `layer` that any sample still reads."""
        if self.method.rank == "step" or self.method.reversible:
            return 0
        return self.slots[layer] - self.extent(layer)[0]

    def uniform(self, layer: int) -> bool:
        """Whether every sample reads all slots from `start_slot` on."""
        if self.method.rank == "step" or self.method.reversible:
            return False
        most, least = self.extent(layer)
        return most == least

    def slot_reads(self, layer: int) -> Tensor:
        """[B, slots of the layer] bool: the slots that hold a token which this sample reads at this layer now."""
        n = self.slots[layer]
        if self.method.rank == "step" or self.method.reversible:
            reads = self.reads
            if self.extent_key(layer) != -1:
                reads = masks.ranking_to_tokens(masks.prefix_masks(self.layer_kept(layer), reads.shape[1]), self._order)
            return masks.slot_reads(reads, self.ranking, n)
        return masks.prefix_masks(self.layer_kept(layer), n).flip(-1)

    def tail(self) -> tuple[Tensor, Tensor]:
        """Columns [B, S] and occupancy [B, S] bool of the prompt's tokens as layer P receives them (`masks.tail_order`)."""
        columns, valid = masks.tail_order(self.types, self.image_index, self.ranking, self.slots[self.layer])
        if not self.method.reversible:
            n = self.slots[self.layer]
            valid = torch.cat((valid[:, :n] & self.slot_reads(self.layer), valid[:, n:]), dim=1)
        return columns, valid

    def select(self, index: Tensor) -> None:
        """Reorder the samples (beam search): every per-sample tensor takes rows `index`."""
        for key in ("types", "image_index", "content_key", "present", "n_image", "ranking", "kept", "_reads", "_order"):
            value = getattr(self, key)
            if value is not None:
                setattr(self, key, value.index_select(0, index.to(value.device)))
        self._rows = [row.index_select(0, index.to(row.device)) for row in self._rows]
        self._extents.clear()
