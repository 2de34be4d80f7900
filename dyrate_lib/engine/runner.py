"""The engine of one model: fused weights, caches, and the plans it has met, each with its buffers and captured graphs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

from ..errors import ResourceError
from ..methods.base import Method, PrefillView
from ..methods.staged import Staged
from ..models import Adapter
from . import prefill
from .batch import Batch
from .cache import Arena, LayerShape, check_fit, rounded
from .choice import Choice
from .graphs import Eye, Replayable
from .ops import TorchOps
from .policy import rule_of
from .staged import Held, StagedRun
from .state import Plan, State
from .step import decode_step
from .tails import CAPTURED_ROWS, Tail, Tails
from .tower import Tower
from .weights import Weights

PLANS = 12  # buffers kept with their graphs: the latest ones
GRAPHS = 24  # graphs kept of each part of a plan: one for each number of tokens kept at the prompt's pass
CAPTURED_PICTURES = 16
COLUMNS = 32  # where graphs are held, prompts are padded to a whole number of these


class Engine:
    """Runs a model's batches.

    capture: hold decode steps (and short prompts' passes) in CUDA graphs. buckets: lengths are rounded up so that near ones
    share a graph; None does so where there are graphs.
    """

    def __init__(self, model: Any, ops: TorchOps, capture: bool, buckets: bool | None = None) -> None:
        self.buckets = capture if buckets is None else buckets
        self.adapter = Adapter(model)
        self.info = self.adapter.info()
        self.ops, self.capture = ops, capture
        self.weights = Weights(self.adapter)
        embedding = self.weights.embedding
        self.device, self.dtype = embedding.device, embedding.dtype
        self.low = Arena(self.device, self.dtype, self._leave_low)
        self.tail = Arena(self.device, self.dtype, self._leave_tail)
        self.plans: OrderedDict[Plan, Run] = OrderedDict()
        self.held: OrderedDict[tuple, Held] = OrderedDict()
        self.eyes: dict[torch.Size, Eye] = {}
        self.tower: Any = None  # a Tower, once there are pictures
        self.pool: Any = None
        self.graphs: WeakSet[Replayable] = WeakSet()  # those that hold a graph
        self.mark: Callable[[str], None] = lambda what: None  # told when a part of a run has been queued

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copied or saved model gets no engine with it: the next call makes one."""
        return type(None), ()

    def usable(self) -> bool:
        """Whether the model is still the one that was fused."""
        return bool(self.weights.layers) and self.weights.intact()

    def release(self) -> None:
        """Give back caches and graphs, and the model's parameters storage of their own."""
        self.reset()
        self.weights.release()
        if self.tower is not None:
            self.tower.release()
            self.tower = None

    def columns(self, batch: int, longest: int) -> int:
        """What the columns of `batch` prompts of up to `longest` tokens are made a whole number of."""
        return COLUMNS if self.buckets and batch * longest <= CAPTURED_ROWS else 1

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures [P, 3, h, w] through vision tower and projector, queued at once: [tokens of all, D].

        What changed in the tower since the last call is noticed: it is looked for while the device is at work already, and
        where there is something the pictures are seen again.
        """
        if self.tower is None:
            self.tower = Tower(self.adapter, self.device, self.dtype)
        features = self._see(pixels)
        if not self.tower.intact():
            self.eyes.clear()
            self.tower.release()
            self.tower = Tower(self.adapter, self.device, self.dtype)
            features = self._see(pixels)
        return features

    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self.capture or pixels.shape[0] > CAPTURED_PICTURES or self.tower.hooked:
            return self.tower.features(pixels.to(self.device), self.ops)
        if pixels.shape not in self.eyes:
            self.eyes[pixels.shape] = Eye(self, pixels.shape)
        return self.eyes[pixels.shape](pixels)

    def reset(self) -> None:
        """Forget all plans; caches and graphs are given back."""
        self.plans.clear()
        self.held.clear()
        self.eyes.clear()
        self.low.free()
        self.tail.free()
        self.pool = None

    def start(self, method: Method, layer: int, batch: Batch, passes: int, choice: Choice) -> Run | StagedRun:
        """Load a batch: the run that stands ready to read its prompt. layer: P, from `method.prepare`.

        Raises:
            Unsupported: the method follows no rule that a graph can hold. ResourceError: the batch cannot fit.
        """
        info = self.info
        if isinstance(method, Staged):
            return StagedRun(self, method, layer, batch, passes, choice)
        passes = rounded(passes) if self.buckets else passes
        layer = layer or info.n_layers  # P = 0: the method has cut before the language model
        rule = rule_of(method, layer, info.n_layers, info.n_heads, batch.n_image, passes)
        b, t = batch.shape
        plan = Plan(
            batch=b, columns=t, images=batch.image_index.shape[1],
            axes=batch.positions.shape[2] if batch.positions.ndim == 3 else 0, places=batch.places.shape[0],
            given=batch.embeds is not None, layer=layer, n_layers=info.n_layers, passes=passes,
            feature=layer - 1 if layer < info.n_layers else min(1, info.n_layers - 1),
            ranked=type(method).order is Method.order, moves=rule.moves, table=rule.course is not None,
            capped=rule.caps is not None, n_rates=0 if rule.predictor is None else rule.predictor[0].shape[0],
            by_rank=rule.by_rank, reversible=rule.reversible, choice=choice.key,
        )  # fmt: skip
        entries = rounded(t + passes)
        n_low = min(layer, info.n_layers)
        least = [rounded(batch.longest_text + passes)] * (info.n_layers - n_low)
        shape = (b, info.n_kv_heads, entries, info.head_dim)
        shapes = [shape] * (2 * n_low)
        if plan not in self.plans or not self.low.holds(shapes):
            self.make_room(b, t, [entries] * n_low + least, (self.low, self.tail), plan)
        buffers = self.low.carve(shapes)
        run = self._run(plan, entries)
        run.state.low = list(zip(buffers[::2], buffers[1::2], strict=True))
        run.state.load(batch, rule)
        run.begin(method, batch, choice)
        return run

    def make_room(self, batch: int, rows: int, entries: list[int], arenas: tuple[Arena, ...], plan: Plan) -> None:
        """See that a batch fits (arguments as `check_fit`), at the cost of all plans but `plan` if need be.

        arenas: those that will be used again, or given back. Raises ResourceError as `check_fit`.
        """

        def check() -> None:
            held = sum(arena.room() for arena in arenas) * self.dtype.itemsize
            check_fit(self.info, batch, rows, entries, self.device, self.dtype, held)

        try:
            check()
        except ResourceError:
            others = [other for other in self.plans if other != plan]
            if not (others or self.held or self.eyes):
                raise
            for other in others:
                del self.plans[other]
            self.held.clear()
            self.eyes.clear()
            check()

    def _leave_low(self) -> None:
        for run in self.plans.values():
            run.state.low = []

    def _leave_tail(self) -> None:
        for run in self.plans.values():
            run.state.tail = []
        for held in self.held.values():
            held.caches = []

    def staged(self, run: StagedRun, shapes: tuple[LayerShape, ...]) -> Held:
        """Buffers for a staged run, those of an earlier one of the same shapes where the caches lie as they did."""
        key = (run.plan, shapes, self.tail.made)
        if key not in self.held:
            for old in [old for old in self.held if old[2] != self.tail.made]:
                del self.held[old]
            while len(self.held) >= PLANS:
                self.held.popitem(last=False)
            cuts = len(run.method.cuts(self.info.n_layers)) if run.method.renumber else 0
            self.held[key] = Held(self, run.plan, shapes, cuts + 1)
        self.held.move_to_end(key)
        return self.held[key]

    def _run(self, plan: Plan, entries: int) -> Run:
        if plan not in self.plans:
            while len(self.plans) >= PLANS:
                self.plans.popitem(last=False)
            self.plans[plan] = Run(self, State(plan, self.info, self.device, self.dtype, entries))
        self.plans.move_to_end(plan)
        return self.plans[plan]


class Run:
    """One plan's state and its captured parts; good for one batch at a time. `prefill()` once, then `decode()` a pass."""

    def __init__(self, engine: Engine, state: State) -> None:
        self.engine, self.state, self.plan = engine, state, state.plan
        self.generator: torch.Generator | None = None
        self._parts: dict[str, OrderedDict[tuple, Replayable]] = {}
        self.tails = Tails(state.plan, engine.info, engine.buckets)
        self.tail_key: object = None  # of the caches from P on, as the decode graph knows them

    def begin(self, method: Method, batch: Batch, choice: Choice) -> None:
        """Note whose batch is loaded. The generator is the run's own, seeded as the choice's: graphs know it."""
        if self.generator is not None and choice.generator is not None:
            self.generator.manual_seed(choice.generator.initial_seed())
            choice.generator = self.generator
        self.generator = choice.generator
        self.method, self.batch, self.choice = method, batch, choice
        choice.load(self.state)

    def prefill(self) -> None:
        """Read the prompt and choose the first token (pass 0)."""
        engine, state, plan = self.engine, self.state, self.plan
        small = plan.batch * plan.columns <= CAPTURED_ROWS

        def first() -> None:
            prefill.head(state, engine.ops, engine.adapter, engine.weights, engine.info.n_heads)
            if not plan.prunes:
                engine.ops.emit(state, self.choice(state), False)

        self._do("head", (engine.low.made,), (), first, small, None if plan.prunes else self.generator)
        if not plan.prunes:
            return
        if not plan.ranked:
            prefill.decide(state, self._own_order())
            prefill.needs(state)
        tail = self._make_tail()

        def second() -> None:
            prefill.tail(state, engine.ops, engine.weights, engine.info.n_heads, tail.rows, tail.cuts)
            engine.ops.emit(state, self.choice(state), False)

        self._do("tail", (engine.tail.made,), (tail,), second, tail.small, self.generator)

    def decode(self) -> None:
        """One more token for every sample."""
        engine, state = self.engine, self.state

        def work() -> None:
            decode_step(state, engine.ops, engine.weights, engine.info.n_heads, self.choice)

        made = (engine.low.made, engine.tail.made if self.plan.prunes else 0)
        self._do("decode", made, (self.tail_key if self.plan.prunes else None,), work, True, self.generator)

    def by_layer(self, steps: int) -> torch.Tensor:
        """[B, steps, L] int64: image tokens read at each layer in each pass; in pass 0 what the prompt's pass carried."""
        state, plan = self.state, self.plan
        out = state.seen_kept[:steps].T[:, :, None].expand(-1, -1, plan.n_layers).clone()
        out[:, :, : plan.layer] = state.n_image[:, None, None]
        if state.caps is not None:
            out = torch.minimum(out, state.caps.T[:, None])
        if plan.reversible:  # the prompt's pass carries every token, whatever is read
            out[:, 0] = state.n_image[:, None]
        return out

    def _own_order(self) -> torch.Tensor:
        """The ranking [B, N] of a method with an order of its own, absent tokens last whatever it says."""
        state = self.state
        present = state.image_index >= 0
        view = PrefillView(
            prefill.image_scores(state), state.shares, state.n_image, self.batch.prompt.content_key.to(present.device)
        )
        order = self.method.order(view)
        late = torch.gather(~present, 1, order).long()
        return torch.gather(order, 1, torch.argsort(late, dim=-1, stable=True))

    def _make_tail(self) -> Tail:
        """Buffers of the layers from P on, now that the counts are known: the one time that the host waits."""
        engine, state = self.engine, self.state
        most = state.need.tolist()
        tail = self.tails.of(most, self.batch.longest_text)
        if not engine.tail.holds(tail.sizes):
            entries = [shape.entries for shape in tail.shapes]
            engine.make_room(self.plan.batch, max(most[1]), entries, (engine.tail,), self.plan)
        buffers = engine.tail.carve(tail.sizes)
        state.shapes = tail.shapes
        state.tail = list(zip(buffers[::2], buffers[1::2], strict=True))
        self.tail_key = tail.layout
        return tail

    def _do(
        self, part: str, made: tuple, shape: tuple, work: Callable[[], None], worth: bool, generator: Any = None
    ) -> None:
        """Run a part, or its graph where there is one for this shape and these caches; those of caches that moved are dropped."""
        if not (self.engine.capture and worth):
            work()
            return
        held, key = self._parts.setdefault(part, OrderedDict()), (made, shape)
        if key not in held:
            for old in [old for old in held if old[0] != made]:
                del held[old]
            while len(held) >= GRAPHS:
                held.popitem(last=False)
            held[key] = Replayable(self.engine, generator)
        held.move_to_end(key)
        held[key](work)
