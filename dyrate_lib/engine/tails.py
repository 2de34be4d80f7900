"""How the layers from P on are laid out once the counts are known: shapes of caches, and rows.

The device has nothing to do until the tail is queued, so what follows from counts met before is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..models import ModelInfo
from .cache import LayerShape, rounded
from .state import Plan

CAPTURED_ROWS = 8192  # a prompt's pass over more rows keeps the device busy without a graph
ROWS = 16  # where graphs are held, what is kept of a prompt is padded to a whole number of these
MET = 512  # counts, and layouts, that a plan remembers


@dataclass(frozen=True, eq=False)
class Tail:
    """The layers from P on for some number of tokens kept. It is equal to itself alone: it stands for a graph, which is looked
    up at every token without hashing what the tail holds.

    shapes: of their caches; sizes: of the buffers (keys, values, keys, ..); rows: the longest sequence that each layer gets;
    cuts: whether it gets other tokens than the layer before; small: whether a graph is worth its while; layout: one object for
    all tails of the same shapes.
    """

    shapes: list[LayerShape]
    sizes: list[tuple[int, ...]]
    rows: list[int]
    cuts: list[bool]
    small: bool
    layout: object


class Tails:
    """The tails of one plan. buckets: counts are rounded up so that near ones share a graph."""

    def __init__(self, plan: Plan, info: ModelInfo, buckets: bool) -> None:
        self.plan, self.info, self.buckets = plan, info, buckets
        self._met: dict[tuple[int, ...], Tail] = {}  # by what the device said
        self._made: dict[tuple, Tail] = {}  # by what followed from it
        self._layouts: dict[tuple, object] = {}

    def of(self, need: list[list[int]], text: int) -> Tail:
        """need: `State.need` as lists; text: tokens of the longest text."""
        met = (*need[0], *need[1], *need[2], text)
        found = self._met.get(met)
        if found is None:
            for memory in (self._met, self._made, self._layouts):
                if len(memory) >= MET:
                    memory.clear()
            found = self._met[met] = self._make(need, text)
        return found

    def _make(self, need: list[list[int]], text: int) -> Tail:
        plan, info = self.plan, self.info
        images, most, cuts = need
        if self.buckets:  # what stands between a sample's count and the text is not read
            images = [rounded(n, ROWS) for n in images]
        shapes = [LayerShape(n, rounded(n + text + plan.passes)) for n in images]
        sizes: list[tuple[int, ...]] = [
            (plan.batch, info.n_kv_heads, shape.entries, info.head_dim) for shape in shapes for _ in "kv"
        ]
        near = self.buckets and plan.batch * max(most) <= CAPTURED_ROWS
        rows = [min(rounded(n, ROWS), plan.columns) for n in most] if near else most
        changes = [True, *map(bool, cuts[1:])]
        key = (tuple(shapes), tuple(rows), tuple(changes))
        if key not in self._made:
            layout = self._layouts.setdefault(key[0], object())
            small = plan.batch * max(rows) <= CAPTURED_ROWS
            self._made[key] = Tail(shapes, sizes, rows, changes, small, layout)
        return self._made[key]
