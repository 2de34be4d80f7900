"""LLaVA-PruMerge and PruMerge+: the patches that stand out in the CLS token's attention, each merged with its like.

Source: Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv 2403.15388),
and the facts of its repository (42Shawn/LLaVA-PruMerge at 097c041).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from ..encoder import cls_attention, merge_nearest, outlier_share, rank
from ..errors import InputError
from .before import BeforeLLM, EncoderView, Reduction


@dataclass
class PruMerge(BeforeLLM):
    """Keep int(N ratio) patches in order of attention, each with its `nearest` others added, and one token for the rest.

    ratio: None (released) takes the share of outliers, attention above Q3 + 1.5 IQR, so pictures keep different counts;
        a number fixes it. At least one patch is kept (without outliers the released code divides by zero) and at most
        N - 1. Scores: CLS row of the LAST vision layer's q and k as one head of full width.
    nearest: how many others, by cosine of that layer's keys, are added to a kept patch, weighted by their attention
        (released: 32; at most N - 1). The extra token is the attention-weighted sum of all patches not kept.
    """

    ratio: float | None = None
    nearest: int = 32
    name: ClassVar[str] = "prumerge"
    tower: ClassVar[bool] = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        who = type(self).__name__
        number = isinstance(self.ratio, Real) and not isinstance(self.ratio, bool)
        if self.ratio is not None and not (number and 0 < self.ratio <= 1):
            raise InputError(f"{who}: ratio={self.ratio!r} must be the share of patches to keep, above 0 and up to 1, or None.")
        if isinstance(self.nearest, bool) or not isinstance(self.nearest, int) or self.nearest < 0:
            raise InputError(f"{who}: nearest={self.nearest!r} must be a whole number of patches, 0 or more.")

    def kept_count(self, n_image: int) -> int | None:
        self._enough(n_image)
        return None if self.ratio is None else len(self.chosen(list(range(n_image)), self.ratio)) + 1

    def _enough(self, n_image: int) -> None:
        if n_image < 2:
            raise InputError(f"{type(self).__name__} needs pictures of at least 2 patches, not {n_image}.")

    def chosen(self, order: list[int], ratio: float) -> list[int]:
        """The patches kept of a picture whose patches are ranked by `order`, in the order they enter."""
        return order[: min(max(int(len(order) * ratio), 1), len(order) - 1)]

    def merge(self, view: EncoderView) -> tuple[Tensor, Tensor, Tensor]:
        """Features before the projector [M, K + 1, C] (kept, then the extra one), counts [M] and patches [M, K] (-1 none)."""
        adapter, features = view.adapter, view.features
        last = adapter.n_vision_layers - 1
        q, k = adapter.vision_qk(last, view.hidden[last])
        scores = cls_attention(q, k)[:, 0]
        shares = outlier_share(scores).tolist() if self.ratio is None else [self.ratio] * len(scores)
        orders = rank(scores).tolist()
        picks = [self.chosen(order, share) for order, share in zip(orders, shares, strict=True)]
        n, most = scores.shape[1], max(map(len, picks))
        order = torch.tensor([row + pruned(row, n) for row in picks], device=scores.device)
        count = torch.tensor([len(row) for row in picks], device=scores.device)
        index = torch.tensor([row + [-1] * (most - len(row)) for row in picks], device=scores.device)
        kept, extra = merge_nearest(features, k[:, 1:], scores, order, count, self.nearest)
        rows = torch.cat((kept, torch.zeros_like(extra)), dim=1)
        return rows.scatter(1, count[:, None, None].expand_as(extra), extra), count, index

    def reduce(self, view: EncoderView) -> Reduction:
        features, count, index = self.merge(view)
        patch = torch.nn.functional.pad(index, (0, 1), value=-1)
        return Reduction(view.adapter.project_features(features), count + 1, patch, index)


def pruned(kept: list[int], n: int) -> list[int]:
    """The n - len(kept) patches of 0..n-1 that are merged away, ascending.

    For each patch that stands twice among the kept the first of them is left out, as in the released code, so that a
    prompt with a repeated patch knows nothing of that one.
    """
    return sorted(0 if patch in kept else patch for patch in range(n))[len(kept) :]


@dataclass
class PruMergePlus(PruMerge):
    """PruMerge with patches sampled evenly over the picture beside those that stand out; merged the same way.

    ratio None (released): every int(int(1 / share) / 3)-th patch of 0..N-2 that is not kept already is added, so about
    four times as many tokens as PruMerge, their count known only from the picture. A number: the released code's variant
    for training, which adds every int(1 / ratio)-th from half a step on, kept already or not, so that the count is fixed
    (a patch may then stand twice in the prompt, and count among its own nearest; see `pruned`).
    """

    name: ClassVar[str] = "prumerge+"

    def chosen(self, order: list[int], ratio: float) -> list[int]:
        n, kept = len(order), super().chosen(order, ratio)
        if self.ratio is not None:
            step = int(1 / ratio)
            return (kept + list(range(step // 2, n - 1, step)))[: n - 1]
        # a share of 0 (no outlier) counts as one patch, as in `PruMerge`
        step = max(int(int(1 / max(ratio, 1 / n)) / 3), 1)
        return (kept + [patch for patch in range(0, n - 1, step) if patch not in kept])[: n - 1]
