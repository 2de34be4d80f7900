"""Capturing device work in a CUDA graph and running it again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ResourceError
from .state import send

if TYPE_CHECKING:
    from .runner import Engine

log = logging.getLogger("dyrate_lib.engine")


class Replayable:
    """Work that is run as it is the first time (so that kernels are compiled and libraries ready), then captured.

    The first call computes; the second captures and replays; later ones replay. So a shape that is met once costs no capture.
    All graphs of an engine share one memory pool: they run one after the other, never at once. `Engine.graphs` knows who
    holds one: a pool that has lost its last graph takes no further ones.
    """

    def __init__(self, engine: Engine, generator: torch.Generator | None = None) -> None:
        self.engine, self.generator = engine, generator
        self.calls, self.failed = 0, False
        self.graph: Any = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Do the work. It must queue the same operations on the same addresses every time.

        Raises:
            ResourceError: there is no room for what a graph keeps.
        """
        self.calls += 1
        if self.calls == 1 or self.failed:
            work()
            return
        if self.graph is None:
            try:
                self._capture(work)
            except RuntimeError as error:
                if any(isinstance(cause, torch.OutOfMemoryError) for cause in _causes(error)):
                    raise ResourceError(
                        f"A captured part of the loop needs more memory than is free on {self.engine.device}: take fewer samples "
                        "at once, release other models, or use engine='reference'."
                    ) from error
                if not any("captur" in str(cause).lower() for cause in _causes(error)):
                    raise  # the work is at fault, not its being captured
                self.failed = True
                log.warning("a part of the loop cannot be captured and runs as it is: %s", str(error).splitlines()[0])
                work()
                return
        self.graph.replay()

    def _capture(self, work: Callable[[], None]) -> None:
        engine = self.engine
        if engine.pool is None or not engine.graphs:
            engine.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None:
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, pool=engine.pool):
            work()
        self.graph = graph
        engine.graphs.add(self)


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised on top of: ending a capture that has failed fails, too."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


class Eye:
    """Vision tower and projector for pictures [P, 3, h, w] of one shape, held in a graph."""

    def __init__(self, engine: Engine, shape: torch.Size) -> None:
        self.engine, self.part = engine, Replayable(engine)
        self.pixels = torch.empty(shape, device=engine.device, dtype=engine.dtype)
        tokens = shape[0] * engine.info.n_image_tokens
        self.features = torch.empty(tokens, engine.info.hidden, device=engine.device, dtype=engine.dtype)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        send(self.pixels, pixels)
        self.part(self._work)
        return self.features

    def _work(self) -> None:
        self.features.copy_(self.engine.tower.features(self.pixels, self.engine.ops))
