"""Methods that cut inside the language model at several layers, each time by that layer's own attention.

Such a method says before which layers it cuts (`cuts`), which rows of the prompt are asked (`queries`), and what stays
(`cut`). It may merge what leaves into new tokens and may let every layer read less as the reply grows (`read_share`).
It knows nothing of models or caches: `staged_state.StagedState` carries out what it says, in our loop
(`staged_decoder.StagedDecoder`) and under stock `generate` (`hooks_staged.StagedPruning`) alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import masks
from ..errors import InputError
from .base import Method

if TYPE_CHECKING:
    from ..decoder import Runner
    from ..hooks_staged import StagedPruning
    from ..models import Adapter, Prompt

RELEASED_DEPTH = 32  # every released list of layers is for a language model of this depth


@dataclass(frozen=True)
class StageView:
    """What a method sees at one of its cuts, for B samples of up to N image tokens and R asked rows.

    stage: 0 for the first cut. attention [B, R, N] float32: head-mean attention of each asked row over the image tokens
    as they are now (raster order, merged ones where they lie); 0 where absent. asked [B, R] bool: which of the R are
    there. hidden [B, N, D]: the image tokens' rows at this depth. last [B, N] bool: the prompt's last token, if that is an
    image token: it must stay, for the reply starts there. counts, n_image: image tokens of each sample now and in the
    unpruned prompt (merged tokens are counted in the former).
    """

    stage: int
    attention: Tensor
    asked: Tensor
    hidden: Tensor
    last: Tensor
    counts: list[int]
    n_image: list[int]

    @property
    def present(self) -> Tensor:
        """[B, N] bool: the places that hold an image token."""
        counts = torch.tensor(self.counts, device=self.attention.device)
        return masks.prefix_masks(counts, self.attention.shape[-1])

    def scores(self) -> Tensor:
        """Attention averaged over the asked rows: [B, N] float32, -inf where absent, inf for what must stay."""
        asked = self.asked.to(self.attention.dtype)
        mean = torch.einsum("br,brn->bn", asked, self.attention) / asked.sum(-1, keepdim=True).clamp(min=1)
        return mean.masked_fill(~self.present, -torch.inf).masked_fill(self.last, torch.inf)


@dataclass(frozen=True)
class Cut:
    """What a method decides. keep [B, N] bool; scores [B, N] float32 (-inf absent) that it went by; merged [B, M, D] or
    None: new tokens, placed after the image tokens, of which each sample has its first n_merged."""

    keep: Tensor
    scores: Tensor
    merged: Tensor | None = None
    n_merged: Sequence[int] = ()


def keep_best(scores: Tensor, counts: Sequence[int] | Tensor) -> Tensor:
    """The `counts` highest of each row of scores [B, N], ties to the earlier: [B, N] bool."""
    counts = torch.as_tensor(counts, device=scores.device)
    return masks.ranking_to_tokens(masks.prefix_masks(counts, scores.shape[-1]), masks.rank_tokens(scores))


def scale_cuts(cuts: Sequence[int], n_layers: int, depth: int = RELEASED_DEPTH) -> tuple[int, ...]:
    """Cuts made for `depth` layers at the same relative depth of `n_layers`: cut n_layers / depth, rounded half up, at
    least 1 and each after the one before. At the released depth nothing changes.

    Raises:
        InputError: the model has too few layers for so many cuts.
    """
    scaled: list[int] = []
    for cut in cuts:
        scaled.append(max(math.floor(cut * n_layers / depth + 0.5), scaled[-1] + 1 if scaled else 1))
    if scaled and scaled[-1] >= n_layers:
        raise InputError(
            f"A model of {n_layers} layers is too shallow for {len(scaled)} cuts: give layers= of your own."
        )
    return tuple(scaled)


def as_list(numbers: Any) -> Any:
    """An array or a tensor of numbers as a list; anything else as it is."""
    return numbers.tolist() if hasattr(numbers, "tolist") and getattr(numbers, "ndim", 0) == 1 else numbers


def check_layers(owner: Method, layers: Any) -> None:
    """`layers` is None or a rising sequence of whole numbers.

    Raises:
        InputError: it is not.
    """
    if layers is None:
        return
    whole = isinstance(layers, Sequence) and all(isinstance(n, Integral) and not isinstance(n, bool) for n in layers)
    if not whole or not layers or any(b <= a for a, b in zip(layers, layers[1:])) or layers[0] < 0:
        raise InputError(
            f"{type(owner).__name__}: layers={layers!r} must be rising whole numbers from 0, or None to scale the released ones."
        )


class Staged(Method):
    """Base of the methods that cut at several layers. Subclasses are dataclasses and define `cuts` and `keeps`.

    renumber: tokens that are left get positions 0..n-1 after every cut, and at decode each layer's position is the number
        of entries it holds; else positions stay and decode goes on from the unpruned length. A model whose positions have
        several axes (Qwen's) keeps them in any case: a running number would undo the picture's rows and columns.
    looks: "before" scores by the attention of the layer before the cut, "next" by that of the layer that follows it,
        made from what that layer would receive.
    anneals: layers read fewer image tokens as the reply grows, see `read_share`.

    Several pictures in a prompt are ranked together. In the trace `kept`, `kept_indices` and `kept_at` are those of layer P,
    the first that receives fewer; `kept` counts merged tokens, the indices leave them out; `kept_by_layer` has all layers.
    """

    renumber: bool = False
    looks: ClassVar[str] = "before"
    anneals: ClassVar[bool] = False

    def cuts(self, n_layers: int) -> tuple[int, ...]:
        """The layers at whose input tokens leave, rising, in a model of `n_layers`."""
        raise InputError(f"{type(self).__name__} does not say where it cuts: define cuts().")

    def keeps(self, stage: int, current: int, n_image: int) -> int:
        """Image tokens that stay of `current` at cut `stage`, out of `n_image` in the prompt, merged ones left out.

        Raises:
            InputError: it depends on the content.
        """
        raise InputError(f"{type(self).__name__} does not say how many tokens to keep: define keeps().")

    def merges(self, pruned: int) -> int:
        """New tokens made of `pruned` that leave at one cut."""
        return 0

    def read_share(self, step: int) -> float:
        """The share of its image tokens that a layer reads at decode step `step` >= 1; must not rise."""
        return 1.0

    def queries(self, prompt: Prompt) -> Tensor:
        """The rows that are asked at every cut, as a mask over the prompt's columns: [B, T] bool. Default: the last."""
        asked = torch.zeros_like(prompt.types, dtype=torch.bool)
        asked[:, -1] = True
        return asked

    def cut(self, view: StageView) -> Cut:
        """What stays at a cut. Default: the `keeps(...)` tokens that the asked rows attend to most."""
        scores = view.scores()
        counts = [self.keeps(view.stage, now, n) for now, n in zip(view.counts, view.n_image)]
        return Cut(keep_best(scores, counts), scores)

    # -- what follows from these -------------------------------------------------------------------------------------

    def resolve_layer(self, n_layers: int) -> int:
        """P, the first layer that receives fewer tokens.

        Raises:
            InputError: a cut is out of range for a model of `n_layers`.
        """
        cuts = self.cuts(n_layers)
        if not cuts or cuts[0] < 1 or cuts[-1] >= n_layers:
            raise InputError(
                f"{type(self).__name__}: it would cut before layers {list(cuts)}, a model of {n_layers} layers can be cut "
                f"before layers 1 to {n_layers - 1}: choose other layers."
            )
        return cuts[0]

    def read_counts(self, counts: Sequence[int], step: int) -> list[int]:
        """Image tokens that a layer with `counts` after the prompt reads at `step`: ceil(n f(t)), f(0) = 1."""
        if step == 0 or not self.anneals:
            return list(counts)
        # 1e-9: a share such as 0.7 is stored a hair high, ceil must not gain a token by it
        return [min(n, max(0, math.ceil(n * self.read_share(step) - 1e-9))) for n in counts]

    def plan(self, n_image: int, n_layers: int, steps: int = 1) -> np.ndarray:
        """Image tokens at each layer's input in each pass, known in advance: [steps, n_layers] int64; row 0 the prompt's.

        Raises:
            InputError: it depends on the content, or the settings do not fit the depth.
        """
        if n_image < 0 or steps < 1:
            raise InputError(f"A plan needs n_image >= 0 and steps >= 1, got {n_image} and {steps}.")
        self.resolve_layer(n_layers)
        stages = {cut: stage for stage, cut in enumerate(self.cuts(n_layers))}
        now, counts = n_image, []
        for layer in range(n_layers):
            if layer in stages:
                kept = min(self.keeps(stages[layer], now, n_image), now)
                now = kept + self.merges(now - kept)
            counts.append(now)
        return np.array([self.read_counts(counts, step) for step in range(steps)], dtype=np.int64)

    def runner(self, adapter: Adapter, prompt: Prompt, capacity: int) -> Runner:
        from ..staged_decoder import StagedDecoder

        return StagedDecoder(adapter, prompt, self, capacity)

    def __call__(self, model: Any) -> StagedPruning:
        from ..hooks_staged import StagedPruning

        return StagedPruning(model, self)
