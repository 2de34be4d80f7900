"""The language model's weights as the engine multiplies by them: q, k, v in one matrix, gate and up in another.

The model's own parameters become views of the fused matrices, so nothing is held twice: the cost is one layer's copy while
fusing. The model computes as before with them, and what changes its weights in place changes the engine's too. `release`
gives every parameter storage of its own again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..models import Adapter
from .watch import Place, Watch, fuse, hooked, part_again

ROTARY = ("default", "linear", "llama3", "mrope")  # whose angles do not depend on how long the sequence has become
NORMS = ("input_layernorm", "post_attention_layernorm")
MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass
class LayerWeights:
    """One decoder layer. qkv [(H + 2 K) d, D]; o [D, H d]; gate_up [2 W, D]; down [D, W]; norms [D]; biases or None."""

    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    norm: Tensor
    post_norm: Tensor
    eps: float
    post_eps: float


class Weights:
    """All layers of a model, fused.

    Raises:
        Unsupported: a part of the model is none that the engine knows; the message says which.
    """

    @torch.inference_mode(False)  # a parameter made of an inference tensor could not be trained
    def __init__(self, adapter: Adapter) -> None:
        check_model(adapter)
        self._fused: list[nn.Parameter] = []
        self._watch: Watch | None = None
        self.layers: list[LayerWeights] = []
        for number, layer in enumerate(adapter.layers):
            self.layers.append(self._layer(layer))
            if number % 8 == 7 and layer.mlp.up_proj.weight.is_cuda:
                torch.cuda.empty_cache()  # the old pieces fit no fused matrix
        self.norm, self.eps = adapter.norm.weight, float(adapter.norm.variance_epsilon)
        self.head = adapter.model.lm_head.weight
        self.embedding = adapter.language_model.embed_tokens.weight
        self._watch = Watch(parts_of(adapter), holders_of(adapter))

    def intact(self) -> bool:
        """Whether the model still is what was fused: not moved, cast, given other weights or modules, or hooked since."""
        return self._watch is not None and self._watch.intact()

    def release(self) -> None:
        """Give the model's parameters storage of their own again."""
        part_again(self._fused)
        self._fused, self._watch, self.layers = [], None, []

    def _layer(self, layer: Any) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [getattr(attention, name) for name in ATTENTION[:3]]
        return LayerWeights(
            qkv=self._fuse([part.weight for part in qkv]),
            qkv_bias=None if qkv[0].bias is None else self._fuse([part.bias for part in qkv]),
            o=attention.o_proj.weight.data, o_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.data,
            gate_up=self._fuse([mlp.gate_proj.weight, mlp.up_proj.weight]), down=mlp.down_proj.weight.data,
            norm=layer.input_layernorm.weight.data, post_norm=layer.post_attention_layernorm.weight.data,
            eps=float(layer.input_layernorm.variance_epsilon),
            post_eps=float(layer.post_attention_layernorm.variance_epsilon),
        )  # fmt: skip

    def _fuse(self, parts: list[nn.Parameter]) -> Tensor:
        self._fused += parts
        return fuse(parts)


def parts_of(adapter: Adapter) -> Iterator[Place]:
    """The modules whose place the engine takes, each with the module that holds it and its name there."""
    for layer in adapter.layers:
        for parent, names in ((layer, (*NORMS, "mlp")), (layer.self_attn, ATTENTION), (layer.mlp, MLP)):
            for name in names:
                yield parent, name, getattr(parent, name)
    language = adapter.language_model
    for parent, name in ((language, "norm"), (language, "embed_tokens"), (language, "rotary_emb"), (adapter.model, "lm_head")):
        yield parent, name, getattr(parent, name)


def holders_of(adapter: Adapter) -> Iterator[Place]:
    """The modules that hold those of `parts_of`, and that neither loop calls."""
    yield adapter.model, "model", adapter.core
    yield adapter.core, adapter.decoder, adapter.language_model
    yield adapter.language_model, "layers", adapter.layers
    for number, layer in enumerate(adapter.layers):
        yield adapter.layers, str(number), layer
        yield layer, "self_attn", layer.self_attn


def check_model(adapter: Adapter) -> None:
    """Refuse a model that the engine would misread.

    Raises:
        Unsupported: says what stands in the way.
    """
    why = _odd_model(adapter)
    if why:
        raise Unsupported(
            f"The graph engine cannot run this {type(adapter.model).__name__}: {why}. Use engine='reference'."
        )


def _odd_model(adapter: Adapter) -> str | None:
    text, head = adapter.text_config, adapter.model.lm_head
    activation = getattr(text, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return f"its MLP's activation is {activation!r}, not SiLU"
    kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROTARY:
        return f"its rotary embedding is of the kind {kind!r}, whose angles change with the length"
    for layer in adapter.layers:
        why = _odd_layer(layer)
        if why:
            return why
    if type(head) is not nn.Linear or head.bias is not None:
        return "its output head is not a plain matrix"
    if not hasattr(adapter.norm, "variance_epsilon"):
        return f"its last norm is a {type(adapter.norm).__name__}"
    parts = [module for _, _, module in parts_of(adapter)]
    found_hooked = next((module for module in parts if hooked(module)), None)
    if found_hooked is not None:
        return f"a {type(found_hooked).__name__} of it has forward hooks, which would not be called"
    found = {(parameter.device, parameter.dtype) for module in parts for parameter in module.parameters(recurse=False)}
    if len(found) > 1:
        return "its weights lie on several devices or are of several types"
    return None


def _odd_layer(layer: Any) -> str | None:
    attention, mlp = layer.self_attn, layer.mlp
    parts = [getattr(attention, name) for name in ATTENTION] + [getattr(mlp, name) for name in MLP]
    odd = next((part for part in parts if type(part) is not nn.Linear), None)
    if odd is not None:
        return f"a projection is a {type(odd).__name__}, not a plain linear layer"
    if any(part.bias is not None for part in parts[4:]):
        return "its MLP has biases"
    if len({part.bias is None for part in parts[:3]}) > 1:
        return "only some of the query, key and value projections have biases"
    norm = next(
        (part for part in (getattr(layer, name) for name in NORMS) if not hasattr(part, "variance_epsilon")), None
    )
    return None if norm is None else f"its norm is a {type(norm).__name__}"
