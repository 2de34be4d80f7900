"""LayerTopK: ours, not the paper's. Every layer chooses for itself, at every decode step, the image tokens that it reads.

DyRate and its like make one ranking below layer P for all layers above. Here each layer >= P reads the k image tokens that its
own newest query row weighs most, so its choice is that of the very row that reads. That a query picks what it reads from a cache
kept whole is known from Quest (Tang et al., arXiv 2406.10774, which picks pages by bounds on their scores), and that few keys
carry most of a row's weight from H2O (Zhang et al., arXiv 2306.14048, which evicts the others for good); here single image
tokens are picked, by exact scores, and nothing leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ..errors import InputError, check_whole
from .base import Method, PrefillView, StepView, check_rate, round_kept
from .relook import POOLS, check_tilt, tilted

if TYPE_CHECKING:
    from ..decoder import Runner
    from ..models import Adapter, Prompt

TOKENS = 86  # of 576: 25 to 30 % of LLaVA-1.5-7B's FLOPs by the paper's formula, with 20 to 64 text tokens and 64 passes


@dataclass
class LayerTopK(Method):
    """At each decode step every layer >= P reads the k image tokens that its own newest query row weighs most.

    layer: P; layers below it read everything. tokens: k, or rate: the share of the N image tokens that is not read,
    k = round(N (1 - rate)); one of the two, neither is tokens=86. Where N <= k nothing is left out.
    pool: a token's weight is the "max" or "mean" over the query heads of the row's softmax over all that it could read, text
    and itself included; the earlier token goes first among equals. What is read (k image tokens, all text, the row itself) then
    has a softmax of its own.
    tilt: of k over the layers from P on, in [-1, 1], as `RelookRate`'s: above 0 the first read more and the deepest fewer.

    Cost: the prompt's pass is computed and counted in full, and the cache keeps everything. A decode step's `kept` is k (each
    layer's own number is in `kept_by_layer`), in both conventions. To choose, a layer scores the keys that it then does not
    read: 2 * heads * head_dim * (N - k) FLOPs a layer and step, which `cached` counts in "decode" (`scores_all`) and the paper's
    formula has no term for. With a cache next to nothing is saved so: LLaVA-1.5-7B, 86 of 576 tokens, 64 passes, costs 99.9 %
    of the unpruned model by `cached` where the paper's formula says 30 %. Memory traffic: the keys of all image tokens are
    read, the values of k alone, so at most half of the image's traffic is saved; `accounting.decode_traffic` and `kv_bytes`
    of `kept_by_layer` leave the unread tokens' keys out.

    Runs in our own loop, greedily or sampling. `trace.reads` (`kept_at`) are layer P's; `LayerwiseDecoder.layer_reads` has all.

    Raises:
        InputError: settings out of range, tokens and rate both given, or the context manager of stock `generate` asked for.
    """

    layer: int = 1  # type: ignore[assignment]
    tokens: int | None = None
    rate: float | None = None
    pool: str = "max"
    tilt: float = 0.0
    name: ClassVar[str] = "layer-topk"
    scores_all: ClassVar[bool] = True
    _tail: tuple[int, int] = field(default=(0, 1), init=False, repr=False, compare=False)  # P, L
    rank = "step"
    reversible = True

    def __post_init__(self) -> None:
        if self.tokens is not None and self.rate is not None:
            raise InputError(f"LayerTopK: tokens={self.tokens!r} and rate={self.rate!r} say the same: give one of the two.")
        if self.rate is not None:
            self.rate = check_rate(self, self.rate)
        else:
            self.tokens = check_whole("LayerTopK: tokens", TOKENS if self.tokens is None else self.tokens, 0)
        if self.pool not in POOLS:
            raise InputError(f"LayerTopK: pool={self.pool!r} must be one of {', '.join(POOLS)}.")
        check_tilt(self, self.tilt)

    def prepare(self, n_layers: int, n_heads: int, device: torch.device) -> int:
        self._tail = (self.resolve_layer(n_layers), n_layers)
        return self._tail[0]

    def counts(self, n_image: Tensor) -> Tensor:
        """k of samples with n_image [B] int64 image tokens, before `tilt`: [B] int64."""
        return n_image.clamp(max=self.tokens) if self.rate is None else round_kept(n_image, self.rate)

    def prefill(self, view: PrefillView) -> Tensor:
        return view.n_image

    def step(self, view: StepView) -> Tensor:
        return self.counts(view.n_image)

    def at_layer(self, layer: int, kept: Tensor, n_image: Tensor) -> Tensor:
        return tilted(kept, n_image, self.tilt, layer, *self._tail)

    def runner(self, adapter: Adapter, prompt: Prompt, capacity: int) -> Runner:
        from ..layerwise_decoder import LayerwiseDecoder

        return LayerwiseDecoder(adapter, prompt, self, capacity)

    def __call__(self, model: Any) -> NoReturn:
        """Refused: stock attention uses a row's weights before anyone could choose by them.

        Raises:
            InputError: always.
        """
        raise InputError(
            "LayerTopK chooses inside every layer by that layer's own attention, which a stock model does not show before it "
            "is used: there is no context manager. Run it by dyrate_lib.generate(), greedily or with do_sample=True; beams are "
            "not supported."
        )
