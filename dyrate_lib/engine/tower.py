"""A CLIP vision tower as the engine runs it: what the projector reads, and nothing beyond.

q, k and v are one product whose parameters become views of the fused matrix (`watch.fuse`), so that the weights are held once;
LayerNorm and the residual before it are one kernel, quick-GELU is one, the layers behind `vision_feature_layer` and the last
norm are left out, and the CLS row leaves in the last layer that is run, where the projector does not read it. A tower that is
none of transformers' CLIP towers with quick-GELU, or that has forward hooks, runs by its own modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Adapter
from .watch import Place, Watch, fuse, part_again

if TYPE_CHECKING:
    from .ops import TorchOps

NAMES = ("CLIPVisionModel", "CLIPVisionTransformer")  # the latter inside the former, before transformers 5
QKV = ("q_proj", "k_proj", "v_proj")


@dataclass
class TowerLayer:
    """One encoder layer. qkv [3 C, C], out [C, C], first [W, C], second [C, W] with their biases; norms (weight, bias, eps)."""

    norm: tuple[Tensor, Tensor, float]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    post_norm: tuple[Tensor, Tensor, float]
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]


class Tower:
    """Vision tower and projector of a LLaVA-1.5. odd: why the tower runs by its own modules, or None.

    device, dtype: the language model's.
    """

    def __init__(self, adapter: Adapter, device: torch.device, dtype: torch.dtype) -> None:
        self.adapter, self.dtype = adapter, dtype
        self.layers: list[TowerLayer] = []
        self._fused: list[nn.Parameter] = []
        self.odd = _odd_tower(adapter, device, dtype)
        if self.odd is None:
            self._read()
        self._watch = Watch(_places(adapter))

    @property
    def hooked(self) -> bool:
        """Whether a module has forward hooks: they are called only where nothing is captured."""
        return self._watch.hooked

    def intact(self) -> bool:
        """Whether tower and projector are still what was read: see `Watch.intact`."""
        return self._watch.intact()

    def release(self) -> None:
        """Give the tower's parameters storage of their own again. The tower cannot be used after that."""
        part_again(self._fused)
        self.layers, self._fused = [], []

    def features(self, pixels: Tensor, ops: TorchOps) -> Tensor:
        """Pictures [P, 3, h, w] through tower and projector: [P n, D]."""
        config = self.adapter.config.vision_config
        if self.odd is not None or self.hooked or pixels.shape[-2:] != (config.image_size,) * 2:
            return self._by_modules(pixels)  # which refuse pictures of another size
        patches = self.patches(pixels.to(self.dtype), ops)
        return self.adapter.project_features(patches).flatten(0, 1)

    def patches(self, pixels: Tensor, ops: TorchOps) -> Tensor:
        """What the projector reads of pictures [P, 3, h, h]: [P, n, C], n patches, after the CLS row where that is read."""
        x = self._embed(pixels)
        pictures, rows, width = x.shape
        heads, last = self.adapter.n_vision_heads, len(self.layers) - 1
        drops = self.adapter.config.vision_feature_select_strategy == "default"
        x = ops.layer_norm(x.view(-1, width), *self._pre_norm)
        x, normed = self._into(ops, x, None, 0)
        for index, w in enumerate(self.layers):
            qkv = ops.linear(normed, *w.qkv).view(pictures, rows, 3, heads, -1)
            q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # views: attention takes them as they lie
            if index == last and drops:
                x, q, rows = x.view(pictures, rows, width)[:, 1:].reshape(-1, width), q[:, :, 1:], rows - 1
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, width)
            x, normed = ops.add_layer_norm(x, ops.linear(attended, *w.out), *w.post_norm)
            inner = ops.quick_gelu(ops.linear(normed, *w.first))
            delta = ops.linear(inner, *w.second)
            x, normed = self._into(ops, x, delta, index + 1)
        x = x.view(pictures, rows, width)
        return x[:, 1:] if drops and not self.layers else x

    def _into(self, ops: TorchOps, x: Tensor, delta: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
        """x + delta [M, C], and its norm as layer `index` wants it (of no use where there is no such layer)."""
        if index == len(self.layers):
            x = x if delta is None else x + delta
            return x, x
        if delta is None:
            return x, ops.layer_norm(x, *self.layers[index].norm)
        return ops.add_layer_norm(x, delta, *self.layers[index].norm)

    def _embed(self, pixels: Tensor) -> Tensor:
        """CLS and patches with their positions: [P, 1 + n, C]. Patches do not overlap: their convolution is a product."""
        weight, start, positions = self._embedding
        side = weight.shape[-1]
        pieces = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [P, 3, rows, side, columns, side]
        pieces = pieces.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        patches = F.linear(pieces, weight.flatten(1))
        return torch.cat((start.expand(len(patches), 1, -1), patches), dim=1) + positions

    def _by_modules(self, pixels: Tensor) -> Tensor:
        return torch.cat(list(self.adapter.picture_features({"pixel_values": pixels}, self.dtype)), dim=0)

    def _read(self) -> None:
        clip = self.adapter._clip
        embeddings = clip.embeddings
        self._embedding = (
            embeddings.patch_embedding.weight.data, embeddings.class_embedding.data, embeddings.position_embedding.weight.data
        )  # fmt: skip
        self._pre_norm = _norm(clip.pre_layrnorm)
        for layer in self.adapter.vision_layers[: self.adapter.vision_feature_index]:
            attention = layer.self_attn
            weights, biases = ([getattr(getattr(attention, name), kind) for name in QKV] for kind in ("weight", "bias"))
            self._fused += [*weights, *biases]
            self.layers.append(
                TowerLayer(
                    norm=_norm(layer.layer_norm1), qkv=(fuse(weights), fuse(biases)), out=_matrix(attention.out_proj),
                    post_norm=_norm(layer.layer_norm2), first=_matrix(layer.mlp.fc1), second=_matrix(layer.mlp.fc2),
                )  # fmt: skip
            )


def _norm(module: Any) -> tuple[Tensor, Tensor, float]:
    return module.weight.data, module.bias.data, float(module.eps)


def _matrix(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight.data, module.bias.data


def _places(adapter: Adapter) -> Iterator[Place]:
    """All modules of vision tower and projector, each at its place."""
    for name in (adapter.tower, "multi_modal_projector"):
        top = getattr(adapter.core, name)
        yield adapter.core, name, top
        for parent in top.modules():
            for child_name, child in parent.named_children():
                yield parent, child_name, child


def _odd_tower(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a tower cannot be run as this module does, or None."""
    clip, config = adapter._clip, adapter.config
    if type(clip).__name__ not in NAMES or not hasattr(clip, "pre_layrnorm"):
        return f"it is a {type(clip).__name__}, not a CLIP vision tower"
    if not isinstance(config.vision_feature_layer, int):
        return "several of its layers are read"
    if config.vision_feature_select_strategy not in ("default", "full"):
        return f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}"
    tower = getattr(adapter.core, adapter.tower)
    if {(parameter.device, parameter.dtype) for parameter in tower.parameters()} != {(device, dtype)}:
        return "its weights are not all of the language model's type and on its device"
    convolution = clip.embeddings.patch_embedding
    side = adapter.config.vision_config.patch_size
    if type(convolution) is not nn.Conv2d or convolution.bias is not None or convolution.stride != (side, side):
        return "its patches are embedded in a way of its own"
    for layer in adapter.vision_layers[: adapter.vision_feature_index]:
        why = _odd_layer(layer)
        if why:
            return why
    norm = clip.pre_layrnorm
    return None if type(norm) is nn.LayerNorm else f"its first norm is a {type(norm).__name__}"


def _odd_layer(layer: Any) -> str | None:
    attention, mlp = layer.self_attn, layer.mlp
    if type(layer).__name__ != "CLIPEncoderLayer" or type(mlp.activation_fn).__name__ != "QuickGELUActivation":
        return f"a layer is a {type(layer).__name__} with {type(mlp.activation_fn).__name__}"
    if attention.dropout and attention.training:
        return "its attention drops out"
    matrices = [*(getattr(attention, name) for name in (*QKV, "out_proj")), mlp.fc1, mlp.fc2]
    odd = next((part for part in matrices if type(part) is not nn.Linear or part.bias is None), None)
    odd = odd or next((part for part in (layer.layer_norm1, layer.layer_norm2) if type(part) is not nn.LayerNorm), None)
    return None if odd is None else f"a layer holds a {type(odd).__name__}"
