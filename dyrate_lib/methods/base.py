"""What a pruning method is: a small dataclass that says which image tokens stay, at prefill and at each later step.

A method knows nothing of models or caches. It is asked twice: `order` and `prefill` once, when the prompt has been read
up to layer P; `step` before each further token. Who asks is either our own loop (`generation.generate`) or the hooks
that `method(model)` puts on a stock model (`hooks.StockPruning`); both share `PruneState`, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
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

    scores [B, N] float32: head-mean attention of the last prompt token at layer P - 1 (-inf where absent);
    shares [B, H, 4] float32; n_image [B] int64; content_key [B] int64, one number a sample, the same in any batch.
    hidden [B, D]: that row as it enters layer P, for methods that ask (`Method.wants_hidden`).
    """

    scores: Tensor
    shares: Tensor
    n_image: Tensor
    content_key: Tensor
    hidden: Tensor | None = None


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
    """

    name: ClassVar[str] = ""
    rank: str = "prefill"
    reversible: bool = False
    refresh: bool = False
    window: int = 1
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

    def start(self, shares: Tensor, scores: Tensor, hidden: Tensor | None = None) -> None:
        """Order the tokens and choose how many stay for the prompt. shares [B, H, 4]; scores [B, N]; hidden [B, D] or None."""
        view = PrefillView(scores, shares, self.n_image, self.content_key, hidden)
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
