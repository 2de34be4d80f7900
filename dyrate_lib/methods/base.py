"""What a pruning method is: a small dataclass that says which image tokens stay, at prefill and at each later step.

A method knows nothing of models or caches. It is asked twice: `order` and `prefill` once, when the prompt has been read
up to layer P; `step` before each further token. Who asks is either our own loop (`generation.generate`) or the hooks
that `method(model)` puts on a stock model (`hooks.StockPruning`); both share `prune_state.PruneState`, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import masks
from ..errors import InputError

if TYPE_CHECKING:
    from ..decoder import Runner
    from ..hooks import StockPruning
    from ..models import Adapter, Prompt


PRUNED = "_dyrate_pruning"  # set on a model while a context prunes it


@dataclass(frozen=True)
class PrefillView:
    """What a method sees at prefill, for B samples of up to N image tokens and H heads.

    scores [B, N] float32: head-mean attention of the last prompt token at layer P - 1, or what the method's own loop rates by
    (-inf where absent);
    shares [B, H, 4] float32; n_image [B] int64; content_key [B] int64, one number a sample, the same in any batch.
    hidden [B, D]: that row as it enters layer P, for methods that ask (`Method.wants_hidden`).
    tokens [B, N, D]: the image tokens as they enter layer P, where a loop has them to hand (`MergedDecoder`).
    """

    scores: Tensor
    shares: Tensor
    n_image: Tensor
    content_key: Tensor
    hidden: Tensor | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class StepView:
    """What a method sees before it reads the image again at decode step `step` >= 1.

    shares [B, H, 4] of the newest query row; kept [B] int64 so far; n_image [B] int64; content_key and hidden as at prefill.
    """

    step: int
    shares: Tensor
    kept: Tensor
    n_image: Tensor
    content_key: Tensor | None = None
    hidden: Tensor | None = None


class Method:
    """Base of all methods. Subclasses are dataclasses with a `layer` (P) and override what they need.

    rank: "prefill" orders the tokens once; "step" orders them anew by each newest query row.
    reversible: a dropped token may come back, its keys and values are kept and only what is read falls.
    refresh: no cache, the whole sequence is run and pruned anew for every token (the original FastV).
    window: with rank="step", how many of the newest query rows rank together (`pooled`).
    scores_all: a decode step's query is scored against every image token's key also where fewer are read (`accounting.flops`).
    """

    name: ClassVar[str] = ""
    rank: str = "prefill"
    reversible: bool = False
    refresh: bool = False
    window: int = 1
    scores_all: ClassVar[bool] = False
    layer: int | None = None

    @property
    def wants_hidden(self) -> bool:
        """Whether `prefill` and `step` are to be shown the hidden state; our own reference loop has it."""
        return False

    def resolve_layer(self, n_layers: int) -> int:
        """P for a model of `n_layers`: layers 0..P-1 see every token.

        Raises:
            InputError: P is not in 1..n_layers-1.
        """
        if (
            self.layer is None
            or isinstance(self.layer, bool)
            or not isinstance(self.layer, Real)
            or not 1 <= self.layer < n_layers
            or int(self.layer) != self.layer
        ):
            raise InputError(
                f"{type(self).__name__}: layer={self.layer} is out of range: layers 0..layer-1 see every token, so choose a "
                f"whole number from 1 to {n_layers - 1} for this model of {n_layers} layers."
            )
        return int(self.layer)

    def prepare(self, n_layers: int, n_heads: int, device: torch.device) -> int:
        """Check the settings against a model before any work; returns P."""
        return self.resolve_layer(n_layers)

    def check_rows(self, rows: int) -> None:
        """Refuse a batch of `rows` samples that the settings do not fit, before any work. Default: any number will do."""

    def order(self, view: PrefillView) -> Tensor:
        """Image tokens from the most to the least important, [B, N] int64. Default: FastV's rule."""
        return masks.rank_tokens(view.scores)

    def prefill(self, view: PrefillView) -> Tensor:
        """Tokens kept at prefill, [B] int64."""
        raise InputError(f"{type(self).__name__} does not say how many tokens to keep: define prefill().")

    def step(self, view: StepView) -> Tensor:
        """Tokens kept at a decode step, [B] int64. Default: as before."""
        return view.kept

    def caps(self, layer: int, n_image: Tensor) -> Tensor | None:
        """The most tokens that layer `layer` >= P may keep, [B] int64, or None for no cap of its own."""
        return None

    def at_layer(self, layer: int, kept: Tensor, n_image: Tensor) -> Tensor:
        """Tokens that layer `layer` >= P reads where `kept` [B] int64 stay: [B] int64. Default: those, up to the layer's cap.

        One that may give a layer more than `kept` goes with `reversible` only: elsewhere the others are gone.
        """
        cap = self.caps(layer, n_image)
        return kept if cap is None else torch.minimum(kept, cap)

    def pooled(self, rows: Tensor) -> Tensor:
        """Scores [B, N] from those of the newest query rows, [window or fewer, B, N], the newest last."""
        return rows[-1]

    def plan(self, n_image: int, n_layers: int, steps: int = 1) -> np.ndarray:
        """Image tokens at each layer's input in each forward pass, for one sample of `n_image`: [steps, n_layers] int64.

        Row 0 is the prefill. It is what the trace of a real run must show, foretold without a model (`budgets`). The
        default asks `prefill`, `step` and `caps` twice, with made-up scores and shares that differ.

        Raises:
            InputError: how many tokens stay depends on the content, or the settings do not fit.
        """
        if n_image < 0 or steps < 1:
            raise InputError(f"a plan needs n_image >= 0 and steps >= 1, not {n_image} and {steps}")
        first, second = (_imagined(self, n_image, n_layers, steps, seed) for seed in (0, 1))
        if not np.array_equal(first, second):
            raise InputError(
                f"{type(self).__name__}: how many tokens stay depends on the content, so there is no plan to foretell: "
                "count them in the trace of a run."
            )
        return first

    def embed(self, adapter: Adapter, inputs: Any) -> Prompt:
        """The batch as the language model's first layer receives it. A method that cuts before the LLM cuts here."""
        return adapter.embed(inputs)

    def runner(self, adapter: Adapter, prompt: Prompt, capacity: int) -> Runner:
        """What runs a batch under this method in our own loop; `capacity` tokens may be generated."""
        from ..decoder import PrunedDecoder, RefreshedDecoder

        if self.refresh:
            return RefreshedDecoder(adapter, prompt, self)
        return PrunedDecoder(adapter, prompt, self, capacity)

    def __call__(self, model: Any) -> StockPruning:
        """A context manager under which stock `model.generate` prunes; on leaving it the model is as before."""
        from ..hooks import StockPruning

        return StockPruning(model, self)


def imagined_counts(method: Method, n_image: Tensor, steps: int, n_heads: int, seed: int) -> Tensor:
    """What a prepared method asks for at every pass (0 the prompt's) with made-up scores and shares: [steps, B] int64.

    n_image [B] int64 on the CPU. Two seeds that agree tell that it does not depend on what is seen.
    """
    random, now, rows = torch.Generator().manual_seed(seed), n_image, []
    for step in range(steps):
        shares = torch.rand(len(n_image), n_heads, 4, generator=random)
        shares = shares / shares.sum(-1, keepdim=True)
        if step:
            found = method.step(StepView(step, shares, now, n_image))
        else:
            scores = torch.rand(len(n_image), int(n_image.max()), generator=random)
            found = method.prefill(PrefillView(scores, shares, n_image, torch.full_like(n_image, seed)))
        now = torch.minimum(found.clamp(min=0), n_image if method.reversible or step == 0 else now)
        rows.append(now)
    return torch.stack(rows)


def _imagined(method: Method, n_image: int, n_layers: int, steps: int, seed: int) -> np.ndarray:
    """What `PruneState` would count for one sample with random scores and shares: [steps, n_layers] int64."""
    heads, counts = 4, torch.tensor([n_image])
    layer = method.prepare(n_layers, heads, torch.device("cpu"))
    still = type(method).step is Method.step and not method.reversible  # nothing changes after the prefill
    out = []
    for step, kept in enumerate(imagined_counts(method, counts, 1 if still else steps, heads, seed)):
        tail = range(layer, n_layers)
        if method.reversible and not step:  # the prompt's pass carries every token, whatever is read
            row = [counts] * n_layers
        else:
            row = [counts] * min(layer, n_layers) + [method.at_layer(index, kept, counts) for index in tail]
        out.append([int(entry[0]) for entry in row])
    return np.repeat(np.array(out, dtype=np.int64), steps if still else 1, axis=0)


def check_rate(owner: Method, rate: float) -> float:
    """A share of tokens to remove, in [0, 1].

    Raises:
        InputError: not a number in that range.
    """
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 <= rate <= 1:
        raise InputError(
            f"{type(owner).__name__}: rate={rate!r} must be the share of image tokens to remove, from 0 to 1."
        )
    return float(rate)


def round_kept(n_image: Tensor, rate: float) -> Tensor:
    """round(N (1 - R)), to even at a half, as FastV's code counts. [B] int64."""
    return torch.round(n_image.double() * (1.0 - rate)).long()
