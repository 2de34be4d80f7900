"""Everything that a step reads or writes on the device, at addresses that stay: what a captured graph is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout import gather_columns
from ..models import ModelInfo
from .batch import NUMBERS, Batch
from .cache import LayerShape
from .policy import Rule

MOST_ENDS = 64  # end-of-sequence tokens that the loop can watch for


def send(buffer: Tensor, values: Tensor) -> None:
    """Copy values to a buffer on the device without waiting: from ordinary memory the host would wait for all that is queued."""
    if buffer.is_cuda and not values.is_cuda:
        values = values.to(buffer.dtype).contiguous().pin_memory()  # an expanded tensor cannot be pinned
    buffer.copy_(values, non_blocking=True)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values on the device, as `send` brings them there."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.contiguous().pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Plan:
    """What fixes the shapes of a run: B samples, T prompt columns, N image tokens, P, L, passes. A graph belongs to one plan.

    axes: of the positions (0: a plain number). places: rows of embeddings that the vision tower fills. given: embeddings come
    from outside. feature: the layer whose attention shares are taken. ranked: image tokens are ordered by the last prompt
    token's attention. moves, table, capped, by_rank, reversible: see `Rule`; n_rates of its predictor (0: none); by_rank
    "staged .." is that of `staged.StagedRun`, which uses a part of the buffers.
    choice: how the next token is chosen (`Choice.key`).
    """

    batch: int
    columns: int
    images: int
    axes: int
    places: int
    given: bool
    layer: int
    n_layers: int
    passes: int
    feature: int
    ranked: bool
    moves: bool
    table: bool
    capped: bool
    n_rates: int
    by_rank: str
    reversible: bool
    choice: tuple

    @property
    def prunes(self) -> bool:
        return self.layer < self.n_layers

    @property
    def own_reads(self) -> bool:
        """What is read is not a prefix of the first ranking, or may grow: the trace then notes it step by step."""
        return self.by_rank != "prefill" or self.reversible

    def numbers(self) -> dict[str, tuple[int, ...]]:
        """Shapes of `Batch.packed`'s parts."""
        b, t, axes = self.batch, self.columns, (self.axes,) if self.axes else ()
        return {
            "ids": (0,) if self.given else (b, t), "types": (b, t), "positions": (b, t, *axes),
            "image_index": (b, self.images), "lengths": (b,), "n_image": (b,), "last": (b, 1, *axes),
            "places": (self.places,),
        }  # fmt: skip


class State:
    """Device buffers of one plan, by use.

    The prompt: `packed` and its parts as in `Batch`; embeds [B, T, D], which become the hidden rows after layer P - 1; features
    [places, D] of the vision tower; cos, sin [B, T, d]. Lengths: `length` and `text` [B] int32, entries filled in the text
    segment below P and from P on; `now` [B] int64, image tokens read; `kept` [L, B] int32, the same by layer, 0 below P, where
    images stand among the text; `need` [3, L - P] int64, what the host must know to lay out the tail (see `prefill.needs`). The
    loop: token [B], step [1], alive [B], logits [B, V], cos_step and sin_step [B, passes, d], row t of which is the position of
    pass t. The trace: row t of every `seen_` buffer is pass t.
    """

    ids: Tensor
    types: Tensor
    positions: Tensor
    image_index: Tensor
    lengths: Tensor
    n_image: Tensor
    last: Tensor
    places: Tensor
    # None where the plan has no use for them
    course: Any
    caps: Any
    classifier: Any
    scores: Any
    index: Any
    slot_of: Any
    reads: Any
    forced: Any
    said: Any
    need: Any
    seen_reads: Any

    def __init__(self, plan: Plan, info: ModelInfo, device: torch.device, dtype: torch.dtype, low_entries: int) -> None:
        self.plan = plan
        b, t, n, passes, layers, heads, d = (
            plan.batch, plan.columns, plan.images, plan.passes, plan.n_layers, info.n_heads, info.head_dim
        )  # fmt: skip

        def made(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        shapes = plan.numbers()
        self.packed = made(sum(math.prod(shape) for shape in shapes.values()))
        parts = self.packed.split([math.prod(shapes[name]) for name in NUMBERS])
        for name, part in zip(NUMBERS, parts, strict=True):
            setattr(self, name, part.view(shapes[name]))
        self.embeds = made(b, t, info.hidden, kind=dtype)
        self.features = made(plan.places, info.hidden, kind=dtype)
        self.cos, self.sin = made(b, t, d, kind=dtype), made(b, t, d, kind=dtype)
        self.entry_types = made(b, low_entries, kind=torch.int8)
        self.entries = torch.arange(t, device=device, dtype=torch.int32).expand(b, t).contiguous()

        self.length, self.text = made(b, kind=torch.int32), made(b, kind=torch.int32)
        self.kept = made(layers, b, kind=torch.int32)
        self.now, self.ranking = made(b), made(b, n)
        self.course = made(passes, b) if plan.table else None
        self.caps = made(layers, b) if plan.capped else None
        wide = torch.float32
        self.classifier = (
            (made(plan.n_rates, 4 * heads, kind=wide), made(plan.n_rates, kind=wide)) if plan.n_rates else None
        )
        self.rate = made(b)
        self.shares = made(b, heads, 4, kind=wide)
        self.scores = made(b, heads, low_entries, kind=wide) if plan.prunes else None
        stepwise = plan.by_rank == "step" and plan.prunes
        self.index = made(b, max(n, 1), kind=torch.int32) if stepwise else None
        self.slot_of = made(b, n) if stepwise else None
        self.reads = made(b, n, kind=torch.bool) if plan.own_reads else None

        self.token, self.step, self.alive = made(b), made(1), made(b, kind=torch.bool)
        self.logits = made(b, info.vocab, kind=dtype)
        self.cos_step, self.sin_step = made(b, passes, d, kind=dtype), made(b, passes, d, kind=dtype)
        self.ends, self.pad = made(MOST_ENDS), made(1)
        self.ends_of: tuple[list[int], int] | None = None  # what they hold, as the host knows
        self.need = made(3, layers - plan.layer) if plan.prunes else None
        self.forced = made(b, passes) if plan.choice[0] == "forced" else None
        self.said = None  # [B, prompt (padded in front) + passes] ids, where the choice asks for them

        self.seen_token, self.seen_alive = made(passes, b), made(passes, b, kind=torch.bool)
        self.seen_kept, self.seen_shares = made(passes, b), made(passes, b, heads, 4, kind=wide)
        self.seen_reads = made(passes, b, n, kind=torch.bool) if plan.own_reads else None

        self.low: list[tuple[Tensor, Tensor]] = []
        self.tail: list[tuple[Tensor, Tensor]] = []
        self.shapes: list[LayerShape] = []

    def load(self, batch: Batch, rule: Rule) -> None:
        """Take in a batch and the method's rule for it: one copy for the numbers, and what else the plan has."""
        send(self.packed, batch.packed())
        if batch.features is not None:
            self.features.copy_(batch.features)
        if batch.embeds is not None:
            same = batch.order.shape[1] == batch.embeds.shape[1] and bool((batch.types >= 0).all())
            self.embeds.copy_(batch.embeds if same else gather_columns(batch.embeds, batch.order))
        for mine, theirs in ((self.course, rule.course), (self.caps, rule.caps)):
            if mine is not None and theirs is not None:
                send(mine, theirs)
        if self.classifier is not None:
            for mine, theirs in zip(self.classifier, rule.predictor or (), strict=True):
                mine.copy_(theirs)

    def entry(self, layer: int) -> tuple[Tensor, Tensor, int, Tensor]:
        """Keys, values, first text entry and text length of a layer's cache."""
        if layer < self.plan.layer:
            return *self.low[layer], 0, self.length
        at = layer - self.plan.layer
        return *self.tail[at], self.shapes[at].slots, self.text
