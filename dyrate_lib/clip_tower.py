"""The vision side of an adapter, for methods that cut before the language model: what they read of a CLIP tower.

A part of `models.Adapter` in a file of its own; towers without a CLS token are refused by `check_clip`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .errors import InputError


class ClipTower:
    """Hidden states, queries, keys and norms of the tower. `model`, `core` and `config` are the adapter's."""

    model: Any
    core: Any
    config: Any
    tower: ClassVar[str]

    @property
    def _clip(self) -> Any:
        """The CLIP model in the vision tower (releases before 5 kept it one module deeper)."""
        tower = getattr(self.core, self.tower, None)
        return getattr(tower, "vision_model", tower)

    def check_clip(self, who: str) -> None:
        """Refuse a tower without CLS token, or features that are not the patches of one layer. Raises InputError."""
        if not hasattr(getattr(self._clip, "embeddings", None), "class_embedding"):
            raise InputError(
                f"{who} reads the CLS token of a CLIP vision tower, which {type(self.model).__name__} does not have: use a "
                "method that needs none, such as DivPrune or FastV."
            )
        strategy, layer = self.config.vision_feature_select_strategy, self.config.vision_feature_layer
        if strategy != "default" or not isinstance(layer, int):
            raise InputError(
                f"{who} takes the patches of one vision layer; this model has vision_feature_layer={layer} and "
                f"vision_feature_select_strategy={strategy!r}: it needs a single layer and 'default'."
            )

    @property
    def clip_patches(self) -> int:
        """Patches of a picture, or of one crop."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @property
    def vision_layers(self) -> Any:
        return self._clip.encoder.layers

    @property
    def n_vision_layers(self) -> int:
        return len(self.vision_layers)

    @property
    def vision_feature_index(self) -> int:
        """Which of the n_vision_layers + 1 hidden states feeds the projector; state i is the output of layer i - 1."""
        return int(self.config.vision_feature_layer) % (self.n_vision_layers + 1)

    def vision_qk(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of vision layer `index`, from its input [M, N + 1, C]: the CLS row's query [M, 1, C] and all keys [M, N + 1, C].

        Heads lie side by side.
        """
        layer = self.vision_layers[index]
        normed = layer.layer_norm1(hidden)
        return layer.self_attn.q_proj(normed[:, :1]), layer.self_attn.k_proj(normed)

    @property
    def n_vision_heads(self) -> int:
        return int(self.config.vision_config.num_attention_heads)

    def vision_norm(self, x: Tensor) -> Tensor:
        """The tower's last norm, which its picture embedding goes through: [.., C]."""
        return self._clip.post_layernorm(x)

    def project_features(self, x: Tensor) -> Tensor:
        """Vision features [.., C] to the language model's width [.., D]."""
        return self.core.multi_modal_projector(x)
