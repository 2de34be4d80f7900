"""The rate predictor: DyRate's only trained part, a linear classifier on attention shares (eq. 2)."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import masks
from .checksums import tensors_digest
from .errors import InputError, ResourceError, check_whole
from .predictor_inputs import BY_NUMBER, STEPS, width_of
from .records import remove_litter


class RatePredictor(nn.Module):
    """What one query row tells (the paper: its attention shares) to logits over `n_rates` pruning rates.

    A single linear layer, 4 * n_heads inputs (the paper: "a linear classifier"). Weights start at zero, so an untrained
    predictor gives every rate the same probability, and its argmax, the first, keeps all tokens.

    n_heads: attention heads of the model's language model; layer: the P it was trained for (features come from P - 1),
    None for an untrained one, which goes with any layer.
    metadata: what it was trained with (model, target, convention, seed, ...), saved beside the weights.
    inputs: what it reads, the paper's or a control. "shares" [.., n_heads, 4]; "step" [..] int64, the step's number (one-hot,
    a table of 64 rows whose last is that of all later steps); "none" [.., 0], so that the bias, a constant rate, is all there
    is; "hidden" [.., hidden], the state that enters layer P, of unit mean square (`unit_rms`); "foreign" [.., n_heads, 4], the
    shares of another picture at the same step, from `bank`; "oracle" [..] int64, what the next token needs (`need_codes`).
    hidden: D, the size of the hidden state, for "hidden" only.

    bank, bank_keys (of "foreign"): shares [M, S, n_heads, 4] float16 of M pictures seen in training, and their content keys
    [M] int64; empty until it is trained.

    Raises:
        InputError: a number that is none, or unknown inputs.
    """

    bank: Tensor
    bank_keys: Tensor

    def __init__(
        self, n_heads: int, n_rates: int = 10, layer: int | None = None, metadata: dict[str, Any] | None = None, *,
        inputs: str = "shares", hidden: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = {"n_heads": n_heads, "n_rates": n_rates, "layer": 1 if layer is None else layer}
        for name, value in (sizes | ({} if hidden is None else {"hidden": hidden})).items():
            check_whole(f"RatePredictor: {name}", value, 1)
        self.n_heads, self.n_rates, self.layer, self.inputs, self.hidden = n_heads, n_rates, layer, inputs, hidden
        self.metadata = dict(metadata or {})
        width = width_of(inputs, n_heads, hidden)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element")  # of a layer that reads nothing
            self.linear = nn.Linear(width, n_rates)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if inputs == "foreign":
            self.register_buffer("bank", torch.zeros(0, STEPS, n_heads, 4, dtype=torch.float16))
            self.register_buffer("bank_keys", torch.zeros(0, dtype=torch.long))

    @property
    def rates(self) -> Tensor:
        """[n_rates] float32: r_k = (k - 1) / n_rates."""
        return masks.rates(self.n_rates)

    def forward(self, features: Tensor) -> Tensor:
        """What it reads (see the class; "shares": [.., n_heads, 4]) to [.., n_rates] logits, float32 whatever the weights' dtype.

        Raises:
            InputError: the features are of another size, as those of another model are.
        """
        weight, bias = self.linear.weight.float(), self.linear.bias.float()
        # a predictor may have been moved to the model's half precision; shares are float32
        rows = self.rows(features)
        return F.embedding(rows, weight.t()) + bias if self.inputs in BY_NUMBER else F.linear(rows, weight, bias)

    def rows(self, features: Tensor) -> Tensor:
        """Features as the linear layer takes them: [.., width] float32, or rows of its table [..] int64. Errors as `forward`."""
        if self.inputs in BY_NUMBER:
            if features.dtype != torch.long:
                raise InputError(f"This predictor reads {self.inputs} numbers (int64), got {features.dtype}.")
            if self.inputs == "step":
                return features.clamp(0, STEPS - 1)
            if features.numel() and not 0 <= int(features.min()) <= int(features.max()) < self.linear.in_features:
                raise InputError(f"This oracle reads needs as 0..{self.linear.in_features - 1} (need_codes).")
            return features
        if self.inputs in ("shares", "foreign"):
            if features.shape[-2:] != (self.n_heads, 4):
                raise InputError(
                    f"This predictor reads {self.n_heads} heads x 4 token types, got {tuple(features.shape[-2:])}: "
                    "it was trained for another model; train one for this model (train_predictor)."
                )
            return features.float().flatten(-2)
        if features.shape[-1] != self.linear.in_features:
            raise InputError(
                f"This predictor reads {self.linear.in_features} numbers ({self.inputs}), got {features.shape[-1]}: "
                "it was trained for another model; train one for this model (train_predictor)."
            )
        return features.float()

    def foreign_shares(self, content_key: Tensor, step: int) -> Tensor:
        """Another picture's shares at `step`, from the bank: [B] int64 content keys to [B, n_heads, 4] float32.

        The key alone picks the picture, so a sample gets the same one in any batch, and never itself.

        Raises:
            InputError: the predictor has no bank: it reads something else, or was not trained.
        """
        n = len(self.bank) if self.inputs == "foreign" else 0
        if n < 2:
            raise InputError("This predictor holds no other pictures' shares: train one (train_predictor, inputs='foreign').")
        picked = content_key.to(self.bank.device) % n
        own = self.bank_keys[picked] == content_key.to(self.bank.device)
        return self.bank[(picked + own) % n, min(step, self.bank.shape[1] - 1)].float()

    def flops(self) -> int:
        """FLOPs of one call for one row: two per weight and one per bias. A row of a table is looked up, not multiplied, and
        where nothing is read the bias is the answer. Norms are left out, as everywhere (`accounting`)."""
        if self.inputs == "none":
            return 0
        products = 0 if self.inputs in BY_NUMBER else 2 * self.linear.in_features * self.n_rates
        return products + self.n_rates

    def save(self, path: str | Path, **metadata: Any) -> Path:
        """Write weights, metadata and a checksum of both to a safetensors file, atomically. Returns the path.

        Raises:
            ResourceError: a full disk, or a folder that cannot be written; what was there before stays as it was.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        self.metadata.update(metadata)
        kind = {} if self.inputs == "shares" else {"inputs": self.inputs, "hidden": self.hidden}
        head = {"n_heads": self.n_heads, "n_rates": self.n_rates, "layer": self.layer, **kind, **self.metadata}
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
            kind = {"inputs": head.pop("inputs"), "hidden": head.pop("hidden")} if "inputs" in head else {}
            width = width_of(kind.get("inputs", "shares"), shape["n_heads"], kind.get("hidden"))
            if tuple(tensors["linear.weight"].shape) != (shape["n_rates"], width):
                raise ValueError("its weights are not of the size it says")  # before room is made for a size it says
            predictor = cls(**shape, metadata=head, **kind)
            if predictor.inputs == "foreign":
                bank, keys = tensors["bank"], tensors["bank_keys"]
                if bank.ndim != 4 or bank.shape[1] < 1 or bank.shape[2:] != (predictor.n_heads, 4) or len(keys) != len(bank):
                    raise ValueError("its bank of shares is not of the size it says")
                predictor.bank, predictor.bank_keys = torch.empty_like(bank), torch.empty_like(keys)
            predictor.load_state_dict(tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError, OSError) as error:
            raise InputError(
                f"{path} is not a rate predictor, or it is damaged ({error}): restore or retrain it."
            ) from error
        return predictor.eval().requires_grad_(False)
