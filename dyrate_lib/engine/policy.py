"""How many image tokens each layer reads, decided on the device: a method's rule in a form that a graph can hold.

Three rules cover the methods: nothing changes after the prompt (FastV, VTW, random, none); a course known beforehand
(`RatePath`, a replayed trace, annealing), a table with one row a step; or the predictor's choice (DyRate). A method whose
rule is none of these is refused, and the reference loop takes it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..methods.base import Method, imagined_counts
from ..methods.before import BeforeLLM
from ..methods.dyrate import DyRate
from ..methods.schedule import RatePath
from ..methods.staged import Staged
from ..predictor_inputs import BLIND

COURSES = 64  # courses remembered: to foretell one takes a call of the method for every step
_known: OrderedDict[tuple, Tensor] = OrderedDict()


@dataclass
class Rule:
    """A method's rule for B samples and L layers.

    course: [steps, B] int64, the count at every pass (0 the prompt's), or None; predictor: (weight [R, 4 H], bias [R]) or None,
    run at every pass; its choice counts where there is no course (else it is run and ignored, as in a replay). caps: [L, B]
    int64, the most that each layer may read, or None. moves: whether anything changes after the prompt's pass.
    by_rank: "prefill" or "step"; reversible: dropped tokens may come back.
    """

    course: Tensor | None
    predictor: tuple[Tensor, Tensor] | None
    caps: Tensor | None
    moves: bool
    by_rank: str = "prefill"
    reversible: bool = False


def rule_of(method: Method, layer: int, n_layers: int, n_heads: int, n_image: Tensor, steps: int) -> Rule:
    """The rule of `method` for samples of n_image [B] int64 image tokens over `steps` passes.

    Raises:
        Unsupported: the method follows no rule that can be held on the device.
    """
    check_method(method)
    layered = [method.caps(index, n_image) if index >= layer else None for index in range(n_layers)]
    caps = None
    if any(cap is not None for cap in layered):
        caps = torch.stack([n_image if cap is None else cap for cap in layered])
    moves = type(method).step is not Method.step
    rank, reversible = getattr(method, "rank", "prefill"), bool(method.reversible)
    predictor = _linear(method)
    if layer >= n_layers:
        return Rule(n_image[None].expand(steps, -1), None, None, False)
    if _is_dyrate(method):
        return Rule(None, predictor, caps, True, rank, reversible)
    # a predictor's weights may change between two calls
    key = None if isinstance(method, DyRate) else _key(method, n_image, steps)
    course = None if key is None else _known.get(key)
    if course is None:
        course = _course(method, n_image, steps if moves else 1, n_heads)
        course = course.expand(steps, -1).contiguous()
        if key is not None:
            while len(_known) >= COURSES:
                _known.popitem(last=False)
            _known[key] = course
    return Rule(course, predictor, caps, moves, rank, reversible)


def check_method(method: Method) -> None:
    """Refuse what the graph cannot hold.

    Raises:
        Unsupported: says why.
    """
    if method.refresh:
        raise Unsupported(
            f"The graph engine does not run {type(method).__name__}: it runs the whole sequence anew for every token. Use "
            "engine='reference'."
        )
    if type(method).at_layer is not Method.at_layer or method.window > 1:
        raise Unsupported(
            f"The graph engine does not run {type(method).__name__}: it ranks by one row, and layers differ by caps alone. Use "
            "engine='reference'."
        )
    reads = getattr(_predictor(method), "inputs", "shares")
    if reads not in ("shares", *BLIND):
        what = "the hidden state" if reads == "hidden" else "another picture's attention"
        raise Unsupported(
            f"The graph engine does not run a predictor that reads {what}: its steps hold attention shares only. Use "
            "engine='reference'."
        )
    if type(method).runner not in (Method.runner, BeforeLLM.runner, Staged.runner):
        raise Unsupported(
            f"The graph engine does not run {type(method).__name__}: it brings a decoder of its own. Use engine='reference'."
        )


def _is_dyrate(method: Method) -> bool:
    kind = type(method)
    if not isinstance(method, DyRate) or method.loaded.inputs != "shares":
        return False
    return kind.step is DyRate.step and kind.prefill is DyRate.prefill


def _key(method: Method, n_image: Tensor, steps: int) -> tuple | None:
    """What a course depends on, None where the method's settings are not plain values."""
    if not is_dataclass(method):
        return None
    settings = tuple(_plain(getattr(method, field.name)) for field in fields(method) if field.init)
    key = (type(method), settings, steps, str(n_image.device), tuple(n_image.tolist()))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _plain(value: Any) -> Any:
    """Lists and mappings as tuples; a tensor as it is not hashable by value."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return tuple((key, _plain(item)) for key, item in value.items())
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def _linear(method: Method) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of the predictor that a method runs on the shares at every pass, on the device, or None."""
    placed = _predictor(method)
    if placed is None or placed.inputs != "shares":
        return None
    return placed.linear.weight.data.float(), placed.linear.bias.data.float()


def _predictor(method: Method) -> Any:
    return getattr(method, "_placed", None) or getattr(method, "_predictor", None)


def _course(method: Method, n_image: Tensor, steps: int, n_heads: int) -> Tensor:
    """[steps, B] int64: what the method asks for at every pass, whatever it sees.

    Raises:
        Unsupported: it depends on what it sees.
    """
    if type(method).prefill is RatePath.prefill and type(method).step is RatePath.step:
        return _rate_course(method, n_image, steps)  # type: ignore[arg-type]
    probe = copy.deepcopy(method)
    probe.prepare(10**6, n_heads, torch.device("cpu"))
    found = [imagined_counts(probe, n_image.cpu(), steps, n_heads, seed) for seed in (0, 1)]
    if not torch.equal(*found):
        raise Unsupported(
            f"The graph engine does not run {type(method).__name__}: how many tokens stay depends on what it sees, by a rule "
            "of its own. Use engine='reference'."
        )
    return found[0].to(n_image.device)


def _rate_course(method: RatePath, n_image: Tensor, steps: int) -> Tensor:
    rows = method._rows()
    method.check_rows(n_image.shape[0])
    path = [[row[min(step, len(row) - 1)] for row in rows] for step in range(steps)]
    now = torch.tensor(path, dtype=torch.float64).to(n_image.device)
    return n_image - torch.floor(now * n_image + 1e-9).long()


__all__ = ["Rule", "check_method", "rule_of"]
