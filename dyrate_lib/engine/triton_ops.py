"""The operations of a layer by Triton's kernels and cuBLAS, whichever was measured to be the faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import attention_kernel, bookkeeping_kernel, small_kernels, step, tower_kernels
from .ops import TorchOps
from .skinny_kernel import MOST_ROWS, Config, skinny
from .state import State
from .weights import LayerWeights

# (rows of x up to, kind of product) -> configuration; what is not here goes to cuBLAS. Measured by `tune.py`; kinds as there.
# On an H200, at LLaVA-1.5-7B's sizes; above one row cuBLAS is ahead wherever a norm or SwiGLU would be folded in.
DEFAULT: dict[tuple[int, str], Config] = {
    (1, "qkv"): Config(8, 512, 4, 1),
    (1, "out"): Config(2, 2048, 4, 1),
    (1, "gate_up"): Config(4, 1024, 4, 1),
    (1, "down"): Config(16, 512, 8, 1),
    (1, "head"): Config(16, 256, 4, 1),
    (16, "out"): Config(32, 256, 4, 4),
    (16, "down"): Config(32, 256, 4, 4),
    (64, "down"): Config(32, 256, 4, 4),
}
# Rows of x (from, to) whose products cuBLASLt takes. On an H200, at LLaVA-1.5-7B's sizes, one trial found the layers from P on
# about 0.2 ms faster by it at 192 rows; the trial is not among the records.
LT_ROWS = (MOST_ROWS + 1, 320)


@contextmanager
def blas_library(name: str) -> Iterator[None]:
    """torch's products by "cublas" or "cublaslt" meanwhile. What is captured keeps what it was captured with."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


class TritonOps(TorchOps):
    """table: (rows up to, kind) -> Config of the skinny kernel; a product with no entry is cuBLAS's.

    early: kernels of a decode step start while the one before ends (see `skinny_kernel`); None does so on Hopper and later.
    It serves products of one row; those of several lose by it.
    attention: block and warps of the decode attention kernel. lt_rows: products of x with so many rows (from, to) are left to
    cuBLASLt.
    """

    name = "triton"
    rms_norm = staticmethod(small_kernels.rms_norm)
    swiglu = staticmethod(small_kernels.swiglu)
    add_layer_norm = staticmethod(tower_kernels.add_layer_norm)
    quick_gelu = staticmethod(tower_kernels.quick_gelu)
    rope_store = staticmethod(small_kernels.rope_store)

    def __init__(
        self,
        table: dict[tuple[int, str], Config] | None = None,
        early: bool | None = None,
        attention: dict[str, int] | None = None,
        lt_rows: tuple[int, int] = LT_ROWS,
    ) -> None:
        if early is None:
            early = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
        self.table, self.early = dict(DEFAULT if table is None else table), early
        self.lt_rows = lt_rows
        self.attention: dict[str, Any] = {"early": self.early, **(attention or {})}

    def decode_attention(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return attention_kernel.decode_attention(*args, **(kwargs | self.attention))

    def advance(self, state: State) -> None:  # type: ignore[override]
        if state.plan.own_reads:
            step.advance(state)
        else:
            bookkeeping_kernel.advance(state, self.early)

    def emit(self, state: State, token: Tensor | None, grows: bool) -> None:  # type: ignore[override]
        bookkeeping_kernel.emit(state, token, grows)  # never early: before it stands a copy, which is no kernel

    def config(self, rows: int, kind: str) -> Config | None:
        """The skinny kernel's configuration for a product of `rows` rows, None where cuBLAS takes it."""
        if rows > MOST_ROWS:
            return None
        fits = [limit for limit, name in self.table if name == kind and limit >= rows and (limit == 1) == (rows == 1)]
        return self.table[min(fits), kind] if fits else None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with self._library(x):
            return super().linear(x, weight, bias)

    def add_linear(self, x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with self._library(x):
            return super().add_linear(x, a, weight, bias)

    def _library(self, x: Tensor) -> AbstractContextManager[None]:
        by_lt = x.is_cuda and self.lt_rows[0] <= x.shape[0] <= self.lt_rows[1]
        return blas_library("cublaslt") if by_lt else nullcontext()

    def norm_qkv(self, x: Tensor, w: LayerWeights) -> Tensor:
        config = self.config(x.shape[0], "qkv")
        if config is None:
            return super().norm_qkv(x, w)
        return skinny(x, w.qkv, config, norm=w.norm, eps=w.eps, bias=w.qkv_bias, early=self.early)

    def attention_out(self, x: Tensor, attended: Tensor, w: LayerWeights) -> Tensor:
        config = self.config(x.shape[0], "out")
        if config is None:
            return super().attention_out(x, attended, w)
        return skinny(attended, w.o, config, bias=w.o_bias, residual=x, early=self.early)

    def mlp(self, x: Tensor, w: LayerWeights) -> Tensor:
        first, second = self.config(x.shape[0], "gate_up"), self.config(x.shape[0], "down")
        if first is None:
            inner = self.swiglu(self.linear(self.rms_norm(x, w.post_norm, w.post_eps), w.gate_up))
        else:
            inner = skinny(x, w.gate_up, first, norm=w.post_norm, eps=w.post_eps, gated=True, early=self.early)
        if second is None:
            return self.add_linear(x, inner, w.down)
        return skinny(inner, w.down, second, residual=x, early=self.early)

    def head(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        config = self.config(x.shape[0], "head")
        if config is None:
            return super().head(x, norm, eps, weight)
        return skinny(x.contiguous(), weight, config, norm=norm, eps=eps, early=self.early)
