"""Which engine a model can have, and the engines there are."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..errors import InputError, Unsupported
from ..models import Adapter
from .ops import TorchOps
from .runner import Engine
from .weights import check_model

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_SIZES = (16, 32, 64, 128, 256)
_HELD = "_dyrate_engine"  # where a model keeps its engine


def unsupported(model: Any) -> str | None:
    """Why the graph engine cannot run this model here, as a sentence with its cure, or None where it can."""
    parameter = next(model.parameters())
    cure = " Use engine='reference'."
    if parameter.device.type != "cuda":
        return f"The graph engine needs a CUDA device, the model is on {parameter.device.type}.{cure}"
    if importlib.util.find_spec("triton") is None:
        return f"The graph engine needs the package triton: pip install triton.{cure[:-1]} meanwhile."
    try:
        adapter = Adapter(model)
        check_model(adapter)
    except InputError as error:
        return str(error)
    dtype, size = adapter.model.lm_head.weight.dtype, adapter.info().head_dim
    if dtype not in DTYPES:
        return f"The graph engine computes in bfloat16, float16 or float32, not {dtype}.{cure}"
    if size not in HEAD_SIZES:
        return f"The graph engine's kernel takes head sizes {HEAD_SIZES}, the model has {size}.{cure}"
    return None


def engine_for(model: Any, engine: str | Engine | None) -> Engine:
    """The engine that `generate` shall use: the one given, or the model's own.

    Raises:
        Unsupported: the model cannot have one; says why. InputError: the one given is not this model's, or no longer.
    """
    if not isinstance(engine, Engine):
        return engine_of(model)
    if engine.adapter.model is not model:
        raise InputError("This engine was made for another model: make one for this model, or pass engine='graph'.")
    if not engine.usable():
        raise InputError(
            "This engine has been released, or its model was moved, cast or changed since: make a new one, or pass "
            "engine='graph', which does so itself."
        )
    return engine


def engine_of(model: Any) -> Engine:
    """The model's engine, made at the first call and kept with the model; made anew where the model has changed.

    Raises:
        Unsupported: the model cannot have one; says why.
    """
    engine = vars(model).get(_HELD)
    if engine is None or not engine.usable():
        release(model)
        why = unsupported(model)
        if why is not None:
            raise Unsupported(why)
        from .triton_ops import TritonOps

        engine = Engine(model, TritonOps(), capture=True)
        vars(model)[_HELD] = engine
    return engine


def eager_engine(model: Any, ops: TorchOps | None = None, buckets: bool = False) -> Engine:
    """An engine that captures nothing and computes by the twins (or `ops`): for tests, on any device and in any precision."""
    return Engine(model, ops or TorchOps(), capture=False, buckets=buckets)


def release(model: Any) -> None:
    """Give back what the model's engine holds: caches, graphs, and the fused storage of its weights. The model is as before."""
    engine = vars(model).pop(_HELD, None)
    if engine is not None:
        engine.release()
