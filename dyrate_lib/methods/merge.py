"""MergeRate: ours, not the paper's. What is dropped joins what stays, and what stays weighs as much as it stands for.

DyRate and its like leave the dropped tokens out of the softmax, so that whatever they held goes to the text and to the tokens
that are left. Here each dropped token joins the kept token most like it: the kept one becomes the average of its group at layer
P, and in all attention from there on the logarithm of the group's size is added to its scores, as if all its members were still
there with one key and value. Parts of this are known from elsewhere: such weights from ToMe (Bolya et al., arXiv 2210.09461, in
vision transformers, every layer, by bipartite matching), picking the token farthest from those picked from DivPrune (arXiv
2503.02175), ranking by what prompt rows look at in a low layer from FastV (arXiv 2403.06764) and SnapKV (arXiv 2404.14469). The
rate is DyRate's predictor or a schedule; what a later step drops joins again.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import merging
from ..errors import InputError
from .base import PrefillView
from .ruled import Ruled

if TYPE_CHECKING:
    from ..decoder import Runner
    from ..hooks import StockPruning
    from ..models import Adapter, Prompt


RATES = (0.8,)  # 33 % of LLaVA-1.5-7B's FLOPs from layer 1 on, by the paper's formula, with 64 text tokens and 64 passes


@dataclass
class MergeRate(Ruled):
    """Keep k image tokens from layer P on, each for the group of those that are most like it; k by a predictor or a schedule.

    predictor: a `RatePredictor` or its path, as in `DyRate`; or rates: a schedule as in `RatePath`; neither is rates=(0.8,).
        Dropping is final.
    layer: P; None takes the predictor's own, 1 for a schedule.
    rated_by: what a token is worth, by attention at layer P - 1: "text", the mean over the rows of the prompt's text after the
        picture of the largest weight that a head gives it (`attention.text_scores`), or "last", FastV's score (the last row,
        mean over heads).
    spread: share of the kept tokens, in [0, 1], chosen for being least like those chosen before (cosine of hidden states as
        they enter layer P); the others by what they are worth. In turns, so that it holds for any k (`merging.spread_order`).
    weigh: add log(group size) to the scores of a kept token at layers >= P, for prompt and reply alike.
    average: at layer P a kept token becomes the mean of its group; else it stays itself. Its position is its own.
    With rated_by="last", spread=0, weigh=False, average=False this is FastV's choice at those rates, nothing merged.

    A token joins one of its own picture while that has a kept one. Tokens that leave during the reply give their sizes to the
    kept one most like them (by their first averages); keys and values stay as they are. Where k = 0 nothing is left to join.

    Cost: counted as for any method, by the tokens of each layer: the prompt's pass is cut too. Choosing and joining take at most
    4 N k D FLOPs once a prompt, and rating by R rows of text among T tokens 2 R T heads head_dim, which no convention counts:
    0.5 % of scenes-small's prompt pass at k = 118 and R = 44, 0.02 % of LLaVA-1.5-7B's.

    Raises:
        InputError: settings out of range, predictor and rates both given, or a predictor that `DyRate` refuses; under stock
            `generate` also a model with flash attention, which takes no weights.
    """

    rated_by: str = "text"
    spread: float = 0.4
    weigh: bool = True
    average: bool = True
    name: ClassVar[str] = "merge"
    schedule_layer = 1

    def __post_init__(self) -> None:
        if self.predictor is None and self.rates is None:
            self.rates = RATES
        if isinstance(self.spread, bool) or not isinstance(self.spread, Real) or not 0 <= self.spread <= 1:
            raise InputError(f"MergeRate: spread={self.spread!r} must be the share of tokens chosen for unlikeness, from 0 to 1.")
        if self.rated_by not in ("text", "last"):
            raise InputError(f"MergeRate: rated_by={self.rated_by!r} must be text or last.")
        for name in ("weigh", "average"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"MergeRate: {name}={getattr(self, name)!r} must be True or False.")
        super().__post_init__()

    def order(self, view: PrefillView) -> Tensor:
        assert view.tokens is not None, "MergeRate is asked by loops that show it the tokens"
        kept = self.prefill(view)
        most = int(kept.max()) if kept.numel() else 0
        return merging.spread_order(view.scores, view.tokens, most, self.spread)

    def runner(self, adapter: Adapter, prompt: Prompt, capacity: int) -> Runner:
        from ..merged_decoder import MergedDecoder

        return MergedDecoder(adapter, prompt, self, capacity)

    def __call__(self, model: Any) -> StockPruning:
        from ..hooks_merged import MergedPruning

        return MergedPruning(model, self)
