"""One new row through the decoder's layers, at a decode step of our own loops.

A step of a small model is spent in Python and in calling operators, not in them: `DirectStep` therefore takes the
weights themselves, normalises, projects and rotates queries and keys at once, and makes the rotary tables of the whole
reply beforehand. Its arithmetic is that of the modules, operation by operation. Wherever a module is not what it seems
(quantised, hooked, of a family of its own) and in other precisions `ModuleStep` calls the modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Adapter

STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # the others' frequencies hang on how long the sequence is

Rotary = tuple[Tensor, Tensor]


class ModuleStep:
    """A step by the adapter's modules: any device, precision and family. Rows are [B, 1, D]."""

    def __init__(self, adapter: Adapter, like: Tensor) -> None:
        self.adapter, self.like = adapter, like

    def embed(self, token: Tensor) -> Tensor:
        """[B] int64 tokens to rows."""
        return self.adapter.embed_tokens(token[:, None]).to(self.like.dtype)

    def rotary(self, positions: Tensor) -> Rotary:
        """What `project` takes, for positions [B, 1] or [B, 1, axes] int64."""
        return self.adapter.rotary(positions, self.like)

    def reply_rotary(self, last: Tensor, step: int, capacity: int) -> Rotary:
        """`rotary` of the `step`-th (from 1) token behind positions `last` ([B, 1] or [B, 1, axes]) of at most `capacity`."""
        return self.rotary(last + step)

    def project(self, index: int, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Layer `index`'s rotated query [B, H, 1, d], rotated key and value [B, kv heads, 1, d] of the rows."""
        q, k, v = self.adapter.project(index, self.adapter.normed_input(index, x), rotary)
        return q, k, v

    def finish(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output from its input rows and the attention's output [B, H, 1, d]."""
        return self.adapter.finish(index, x, attended)

    def logits(self, x: Tensor) -> Tensor:
        """Rows to [B, vocab]."""
        return self.adapter.logits(x[:, -1])


class _Linear(NamedTuple):
    """A product: weight [in, out] (a view of the module's) and bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: nn.Linear) -> _Linear:
        return cls(module.weight.t(), module.bias)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight, out=out)
        return torch.addmm(self.bias, x, self.weight, out=out)


class _Norm(NamedTuple):
    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: Any) -> _Norm:
        return cls(module.weight, float(module.variance_epsilon))

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Layer(NamedTuple):
    before: _Norm
    q: _Linear
    k: _Linear
    v: _Linear
    o: _Linear
    after: _Norm
    gate: _Linear
    up: _Linear
    down: _Linear

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            before=_Norm.of(layer.input_layernorm), q=_Linear.of(attention.q_proj), k=_Linear.of(attention.k_proj),
            v=_Linear.of(attention.v_proj), o=_Linear.of(attention.o_proj), after=_Norm.of(layer.post_attention_layernorm),
            gate=_Linear.of(mlp.gate_proj), up=_Linear.of(mlp.up_proj), down=_Linear.of(mlp.down_proj),
        )  # fmt: skip


class DirectStep(ModuleStep):
    """A step by the weights themselves, in float32. Rows are [B, D].

    Make one by `step_for`. No weight is copied; they must not be replaced while the reply is made.
    """

    def __init__(self, adapter: Adapter, like: Tensor) -> None:
        super().__init__(adapter, like)
        self._layers = [_Layer.of(layer) for layer in adapter.layers]
        self._norm, self._head = _Norm.of(adapter.norm), _Linear.of(adapter.model.lm_head)
        self._dim = int(adapter.layers[0].self_attn.head_dim)
        self._n_q, self._n_k = self._layers[0].q.weight.shape[1], self._layers[0].k.weight.shape[1]
        self._qk = like.new_empty(like.shape[0], self._n_q + self._n_k)
        self._q_out, self._k_out = self._qk[:, : self._n_q], self._qk[:, self._n_q :]
        self._halves = self._qk.view(like.shape[0], -1, 2, self._dim // 2)
        self._heads = self._qk.view(like.shape[0], -1, self._dim)
        kind = getattr(getattr(adapter.language_model, "rotary_emb", None), "rope_type", None)
        self._static = kind in STATIC_ROPES
        self._table: Rotary | None = None

    def embed(self, token: Tensor) -> Tensor:
        return self.adapter.embed_tokens(token)

    def rotary(self, positions: Tensor) -> Rotary:
        cos, sin = self.adapter.rotary(positions, self.like)
        # x cos + (-x2, x1) sin = x cos + (x2, x1) (-sin, sin): the sign is put into the table
        half = self._dim // 2
        return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)

    def reply_rotary(self, last: Tensor, step: int, capacity: int) -> Rotary:
        if not self._static:
            return self.rotary(last + step)
        if self._table is None:
            ahead = torch.arange(1, capacity + 1, device=last.device)
            self._table = self.rotary(last + ahead.view(1, -1, *[1] * (last.ndim - 2)))
        cos, sin = self._table
        return cos[:, step - 1 : step], sin[:, step - 1 : step]

    def project(self, index: int, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        layer = self._layers[index]
        normed = layer.before(x)
        layer.q(normed, self._q_out)
        layer.k(normed, self._k_out)
        swapped = self._halves.flip(2).view(self._heads.shape)
        rotated = (self._heads * rotary[0]).add_(swapped.mul_(rotary[1]))[:, :, None]
        n = self._n_q // self._dim
        value = layer.v(normed).view(x.shape[0], -1, 1, self._dim)
        return rotated[:, :n], rotated[:, n:], value

    def finish(self, index: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = self._layers[index]
        x = layer.o(attended.reshape(x.shape[0], -1)).add_(x)
        normed = layer.after(x)
        return layer.down(F.silu(layer.gate(normed), inplace=True).mul_(layer.up(normed))).add_(x)

    def logits(self, x: Tensor) -> Tensor:
        return self._head(self._norm(x))


def step_for(adapter: Adapter, like: Tensor) -> ModuleStep:
    """The step for a batch whose embeddings are `like` [B, T, D]: a `DirectStep` where every module is plain."""
    kind = like.device.type
    direct = kind in ("cpu", "cuda") and like.dtype == torch.float32 and not torch.is_autocast_enabled(kind)
    return (DirectStep if direct and _plain(adapter, like.device) else ModuleStep)(adapter, like)


def _plain(adapter: Adapter, device: torch.device) -> bool:
    """Whether layers are LLaMA's in every module that a step calls: linear layers, RMS norms and SiLU, on `device`, no hooks."""
    if type(adapter).project is not Adapter.project or type(adapter).finish is not Adapter.finish:
        return False
    if type(adapter).normed_input is not Adapter.normed_input or type(adapter).logits is not Adapter.logits:
        return False
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return False
    first = adapter.layers[0].self_attn
    return all(_is_plain(module, device) for module in _called(adapter)) and all(
        layer.self_attn.q_proj.weight.shape == first.q_proj.weight.shape
        and layer.self_attn.k_proj.weight.shape == first.k_proj.weight.shape
        and layer.self_attn.head_dim == first.head_dim
        for layer in adapter.layers
    )


def _called(adapter: Adapter) -> Iterator[nn.Module]:
    """The modules that a step calls."""
    for layer in adapter.layers:
        yield layer.input_layernorm
        yield layer.post_attention_layernorm
        yield layer.mlp
        yield from (getattr(layer.self_attn, f"{name}_proj") for name in "qkvo")
        yield from (getattr(layer.mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    yield adapter.norm
    yield adapter.model.lm_head


def _is_plain(module: nn.Module, device: torch.device) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if any(
        type(p) is not nn.Parameter or p.dtype != torch.float32 or p.device != device for p in module.parameters()
    ):
        return False
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        return hasattr(module, "variance_epsilon") and [key for key, _ in module.named_parameters()] == ["weight"]
    return type(module) is nn.Linear or name in ("SiLUActivation", "SiLU") or name.endswith("MLP")
