"""The state that a training run resumes from: tensors and plain values in one safetensors file, checked when read.

Nothing in it can run code when it is read, as a pickle could.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..checksums import tensors_digest
from ..errors import InputError, ResourceError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dicts, lists, tensors, numbers, strings and None in one step; tuples come back as lists.

    Raises ResourceError for a full disk or a folder that cannot be written; what was there before stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    plain = json.dumps(_taken_apart(state, tensors))
    head = {"state": plain, "sha256": tensors_digest(plain, tensors)}
    partial = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=head)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ResourceError(f"the training state could not be written to {path}: {error}; make room and run again") from error


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save_state` wrote, tensors on `device`. InputError for a file that is no such state, or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if head["sha256"] != tensors_digest(head["state"], tensors):
            raise ValueError("its checksum does not fit its content")
        return _put_together(json.loads(head["state"]), {name: value.to(device) for name, value in tensors.items()})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no training state, or damaged ({error}): remove it to begin anew") from error


def _taken_apart(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # a copy: tied weights share their memory
        return {"tensor": name}
    if isinstance(value, dict):  # pairs, for an optimiser's keys are numbers
        return {"dict": [[key, _taken_apart(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_taken_apart(entry, tensors) for entry in value]}
    return value


def _put_together(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(entry, tensors) for key, entry in content}
    return [_put_together(entry, tensors) for entry in content]
