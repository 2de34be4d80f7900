"""Published dimensions of models that are counted without being built."""

from __future__ import annotations

from .errors import InputError
from .models import ModelInfo

_LANGUAGE = {
    "7b": {"n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "hidden": 4096, "mlp": 11008, "projector_hidden": 4096},
    "13b": {"n_layers": 40, "n_heads": 40, "n_kv_heads": 40, "hidden": 5120, "mlp": 13824, "projector_hidden": 5120},
}


def llava_dimensions(size: str) -> ModelInfo:
    """Dimensions of LLaVA-1.5-7B ("7b") or -13B ("13b") as their config files have them. InputError for another size."""
    if size not in _LANGUAGE:
        raise InputError(f"LLaVA-1.5 has the sizes {' and '.join(_LANGUAGE)}, not {size!r}")
    return ModelInfo(
        name=f"LLaVA-1.5-{size.upper()}", head_dim=128, vocab=32064, n_image_tokens=576, vision_layers=24, vision_hidden=1024,
        vision_mlp=4096, vision_heads=16, vision_tokens=577, patch=14, image_size=336, feature_dim=1024, **_LANGUAGE[size],
    )  # fmt: skip
