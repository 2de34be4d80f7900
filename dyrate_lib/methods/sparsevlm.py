"""SparseVLM: after a few layers, drop the image tokens that the question's visual words attend to least; merge the rest.

Source: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (arXiv 2410.04417),
and the facts of its repository (Gumpest/SparseVLMs at 26a5f48, v1.x path) and of its earlier, rank-adaptive version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..clustering import cluster_and_merge
from ..errors import InputError
from ..masks import IMG, INS, PAD
from .staged import Cut, Staged, StageView, as_list, check_layers, keep_best, scale_cuts

if TYPE_CHECKING:
    from ..models import Prompt

RELEASED_COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
RELEASED_LAYERS, ADAPTIVE_LAYERS = (2, 6, 15), (2, 6, 15, 19)


def text_raters(embeds: Tensor, types: Tensor) -> Tensor:
    """The prompt's words that ask about the picture: a mask [B, T] bool over its columns.

    embeds [B, T, D]: the language model's input; types [B, T]. Of the text after the picture, those that get more than the
    average share when every image token spreads a softmax of its dot products over that text. Where none does (a single
    word, no text after the picture, no picture) it is the last column.
    """
    text, image = types == INS, types == IMG
    products = embeds.float() @ embeds.float().transpose(1, 2)
    shares = torch.softmax(products.masked_fill(~text[:, None], -torch.inf), dim=-1)
    shares = torch.where(text[:, None], shares, 0.0)  # a row without text is all NaN
    weight = image.float() / image.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.einsum("bi,bit->bt", weight, shares)
    average = mean.sum(-1, keepdim=True) / text.sum(-1, keepdim=True).clamp(min=1)
    chosen = text & (mean > average) & image.any(-1, keepdim=True)
    last = torch.zeros_like(chosen)
    last[:, -1] = types[:, -1] != PAD
    return torch.where(chosen.any(-1, keepdim=True), chosen, last)


def rank_deficit(attention: Tensor) -> int:
    """Image tokens less the rank of the attention that raters [R] pay to them [n]: attention [R, n] to a whole number.

    The rank is taken in float64 with float32's usual tolerance, so that a row's rank does not hang on its batch.
    """
    raters, n = attention.shape
    if not n:
        return 0
    tolerance = max(raters, n) * torch.finfo(torch.float32).eps
    return n - int(torch.linalg.matrix_rank(attention.double(), rtol=tolerance))


@dataclass
class SparseVLM(Staged):
    """At the output of layers `layers` keep the image tokens that the raters attend to most, and merge what leaves.

    Raters (`text_raters`) are chosen once, on the language model's input. Scores: attention of the listed layer itself, mean
    over heads and rater rows, softmax over the whole causal row; that layer runs in full. Recycling: of the tokens that
    leave, the best int(merge_fraction pruned) + 1 form int(candidates / cluster_size) + 1 clusters; their averages follow
    the kept image tokens, and count as image tokens at the next cut.

    budget: 192, 128 or 64, the released lists for 576 image tokens (kept at each cut: 300, 200, 110; 303, 110, 36; 66, 30,
        17). counts: a list of your own instead: whole numbers, or shares from 0 to 1 of the prompt's image tokens. A count
        above what is there keeps all.
    layers: None takes 2, 6, 15 (adaptive: 2, 6, 15, 19) of 32 at the same relative depth.
    adaptive: version 1.0: removed = int(scale rank_deficit + bias), clipped to what is there. scale and bias have no
        released value that we know: 0.45 leaves about 192 of 576 on average over 32 layers, for ranks of 5 to 30.
    recycle: False drops without merging. renumber: positions are counted anew after every cut, as released; False keeps
        them (merged tokens then stand where the last image token stood). merge_fraction, cluster_size: released 0.3 and 10.
    noise: what breaks ties in clustering: None for zeros, so that a sample's reply never depends on its batch or a seed; or a
        function from (stage, candidates) to that many numbers in [0, 1), where the released code calls torch.rand.
    """

    budget: int = 192
    counts: Sequence[float] | None = None
    layers: Sequence[int] | None = None
    adaptive: bool = False
    scale: float = 0.45
    bias: float = 0.0
    recycle: bool = True
    renumber: bool = True
    merge_fraction: float = 0.3
    cluster_size: int = 10
    noise: Callable[[int, int], Tensor] | None = None
    name: ClassVar[str] = "sparsevlm"

    def __post_init__(self) -> None:
        self.layers, self.counts = as_list(self.layers), as_list(self.counts)
        check_layers(self, self.layers)
        if not self.adaptive and self.counts is None and self.budget not in RELEASED_COUNTS:
            raise InputError(
                f"SparseVLM: budget={self.budget!r} has no released list (192, 128, 64 have): give counts=."
            )
        if self.counts is not None and not (isinstance(self.counts, Sequence) and all(map(_is_count, self.counts))):
            raise InputError(f"SparseVLM: counts={self.counts!r} must be whole numbers, or shares from 0 to 1.")
        given = self.counts or ()
        if any(n == 1 and isinstance(n, Integral) for n in given) and any(0 < n < 1 for n in given):
            raise InputError(f"SparseVLM: counts={self.counts!r}: the whole number 1 is one token; write 1.0 to keep all.")
        if not self.adaptive and len(self._counts) != len(self._layers):
            raise InputError(f"SparseVLM: {len(self._counts)} counts for {len(self._layers)} layers; give one a layer.")
        numbers = (self.merge_fraction, self.cluster_size, self.scale, self.bias)
        known = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
        if not known or not 0 <= self.merge_fraction <= 1 or self.cluster_size < 1 or self.scale < 0:
            raise InputError(
                "SparseVLM needs merge_fraction from 0 to 1, cluster_size of at least 1, scale not negative, and a bias; "
                f"got {', '.join(map(repr, numbers))}."
            )

    @property
    def _counts(self) -> tuple[float, ...]:
        return tuple(RELEASED_COUNTS[self.budget] if self.counts is None else self.counts)

    @property
    def _layers(self) -> tuple[int, ...]:
        released = ADAPTIVE_LAYERS if self.adaptive else RELEASED_LAYERS
        return tuple(released if self.layers is None else self.layers)

    def cuts(self, n_layers: int) -> tuple[int, ...]:
        cuts = tuple(layer + 1 for layer in self._layers)
        return scale_cuts(cuts, n_layers) if self.layers is None else cuts

    def queries(self, prompt: Prompt) -> Tensor:
        return text_raters(prompt.embeds, prompt.types)

    def keeps(self, stage: int, current: int, n_image: int) -> int:
        if self.adaptive:
            raise InputError(
                "SparseVLM(adaptive=True) keeps what the attention's rank says: it is not known in advance."
            )
        count = self._counts[stage]
        return min(int(count) if isinstance(count, Integral) else int(count * n_image), current)

    def candidates(self, pruned: int) -> int:
        """How many of `pruned` tokens are recycled."""
        return min(int(pruned * self.merge_fraction) + 1, pruned) if self.recycle else 0

    def merges(self, pruned: int) -> int:
        found = self.candidates(pruned)
        return min(int(found / self.cluster_size) + 1, found)

    def cut(self, view: StageView) -> Cut:
        scores = view.scores()
        if self.adaptive:
            kept = [self._adapted(view, row, now) for row, now in enumerate(view.counts)]
        else:
            kept = [self.keeps(view.stage, now, n) for now, n in zip(view.counts, view.n_image)]
        kept = [max(k, must) for k, must in zip(kept, view.last.sum(-1).tolist())]  # else it would be merged too
        keep = keep_best(scores, kept)
        pruned = [now - k for now, k in zip(view.counts, kept)]
        n_merged = [self.merges(n) for n in pruned]
        merged = view.hidden.new_zeros(len(kept), max(n_merged), view.hidden.shape[-1])
        left = torch.argsort(scores.masked_fill(keep, -torch.inf), dim=-1, descending=True, stable=True)
        for row, n in enumerate(n_merged):
            if n:
                chosen = left[row, : self.candidates(pruned[row])]  # best first
                noise = None if self.noise is None else self.noise(view.stage, len(chosen))
                merged[row, :n] = cluster_and_merge(view.hidden[row, chosen][None], n, noise).output[0]
        return Cut(keep, scores, merged if max(n_merged) else None, n_merged)

    def _adapted(self, view: StageView, row: int, now: int) -> int:
        removed = int(rank_deficit(view.attention[row, view.asked[row], :now]) * self.scale + self.bias)
        return now - min(max(removed, 0), now)


def _is_count(value: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return value >= 0 if isinstance(value, Integral) else 0 <= value <= 1
