"""The rate predictor: DyRate's only trained part, a linear classifier on attention shares (eq. 2)."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import masks
from .checksums import tensors_digest
from .errors import InputError, ResourceError, check_whole
from .records import remove_litter


class RatePredictor(nn.Module):
    """Attention shares of one query row to logits over `n_rates` pruning rates.

    A single linear layer, 4 * n_heads inputs (the paper: "a linear classifier"). Weights start at zero, so an untrained
    predictor gives every rate the same probability, and its argmax, the first, keeps all tokens.

    n_heads: attention heads of the model's language model; layer: the P it was trained for (features come from P - 1),
    None for an untrained one, which goes with any layer.
    metadata: what it was trained with (model, target, convention, seed, ...), saved beside the weights.
    """

    def __init__(
        self, n_heads: int, n_rates: int = 10, layer: int | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        for name, value in (("n_heads", n_heads), ("n_rates", n_rates), ("layer", 1 if layer is None else layer)):
            check_whole(f"RatePredictor: {name}", value, 1)
        self.n_heads, self.n_rates, self.layer = n_heads, n_rates, layer
        self.metadata = dict(metadata or {})
        self.linear = nn.Linear(4 * n_heads, n_rates)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def rates(self) -> Tensor:
        """[n_rates] float32: r_k = (k - 1) / n_rates."""
        return masks.rates(self.n_rates)

    def forward(self, shares: Tensor) -> Tensor:
        """[.., n_heads, 4] attention shares to [.., n_rates] logits, in float32 whatever the weights' dtype.

        Raises:
            InputError: the shares come from another number of heads.
        """
        if shares.shape[-2:] != (self.n_heads, 4):
            raise InputError(
                f"This predictor reads {self.n_heads} heads x 4 token types, got {tuple(shares.shape[-2:])}: "
                "it was trained for another model; train one for this model (train_predictor)."
            )
        # a predictor may have been moved to the model's half precision; shares are float32
        return F.linear(shares.float().flatten(-2), self.linear.weight.float(), self.linear.bias.float())

    def flops(self) -> int:
        """FLOPs of one call for one row: two per weight and one per bias."""
        return 2 * 4 * self.n_heads * self.n_rates + self.n_rates

    def save(self, path: str | Path, **metadata: Any) -> Path:
        """Write weights, metadata and a checksum of both to a safetensors file, atomically. Returns the path.

        Raises:
            ResourceError: a full disk, or a folder that cannot be written; what was there before stays as it was.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        self.metadata.update(metadata)
        head = {"n_heads": self.n_heads, "n_rates": self.n_rates, "layer": self.layer, **self.metadata}
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        head["sha256"] = tensors_digest(json.dumps(head, sort_keys=True), tensors)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_litter(path.parent, f".{path.name}.*.tmp")
            save_file(tensors, temporary, metadata={"rate_predictor": json.dumps(head, sort_keys=True)})
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise ResourceError(
                f"The predictor could not be written to {path}: {error}. Free some room or choose another folder."
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> RatePredictor:
        """Read a predictor written by `save`.

        Raises:
            ResourceError: no such file. InputError: not a predictor, or damaged: its checksum does not fit, or is missing.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise ResourceError(f"No predictor at {path}: train one (notebook 02) or check the path.")
        try:
            with safe_open(path, framework="pt") as file:
                head = json.loads((file.metadata() or {})["rate_predictor"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if head.pop("sha256") != tensors_digest(json.dumps(head, sort_keys=True), tensors):
                raise ValueError("its checksum does not fit its content")
            shape = {key: head.pop(key) for key in ("n_heads", "n_rates", "layer")}
            if tuple(tensors["linear.weight"].shape) != (shape["n_rates"], 4 * shape["n_heads"]):
                raise ValueError("its weights are not of the size it says")  # before room is made for a size it says
            predictor = cls(**shape, metadata=head)
            predictor.load_state_dict(tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OSError) as error:
            raise InputError(
                f"{path} is not a rate predictor, or it is damaged ({error}): restore or retrain it."
            ) from error
        return predictor.eval().requires_grad_(False)
