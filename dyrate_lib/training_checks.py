"""What `train_predictor` refuses before the model runs, and the one thing it warns of."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from . import distributed
from .accounting import CONVENTIONS
from .errors import InputError, check_whole
from .predictor_inputs import INPUTS
from .training_budget import CONSTRAINTS

if TYPE_CHECKING:
    from .training_budget import FlopsRatio, Lengths

NEAR = 0.01  # how far out of reach a target is let pass without a word: batches differ in length
log = logging.getLogger("dyrate_lib.training")


def check_settings(
    n_layers: int, *, target: float, convention: str, layer: int, lr: float, lam: float, tau: tuple[float, float], **whole: int
) -> None:
    """Refuse settings that no training can use. whole: those that count something, by name. Raises InputError."""
    if not _number(target) or not 0 < target <= 1:
        raise InputError(f"target={target!r} must be a FLOPs ratio in (0, 1].")
    if convention not in CONVENTIONS:
        raise InputError(f"convention={convention!r} is unknown: choose one of {', '.join(CONVENTIONS)}.")
    if not 1 <= check_whole("layer", layer) < n_layers:
        raise InputError(f"layer={layer} is out of range: choose 1..{n_layers - 1} for this model.")
    for name, value in whole.items():
        check_whole(name, value, 1)
    if not _number(lr) or lr <= 0 or not _number(lam) or lam < 0:
        raise InputError(f"lr must be a number above 0 and lam one of at least 0, got {lr!r} and {lam!r}.")
    pair = isinstance(tau, Sequence) and len(tau) == 2 and all(map(_number, tau))
    if not pair or not tau[0] >= tau[1] > 0:
        raise InputError(f"tau={tau!r} must be two temperatures above 0, the first step's and the last's, which is no higher.")


def check_controls(inputs: str, constraint: str, eta: float, reversible: bool, convention: str, batch: int) -> None:
    """Refuse what a control or a constraint cannot be trained with; batch: pictures of one step. Raises InputError."""
    for name, value, known in (("inputs", inputs, INPUTS), ("constraint", constraint, CONSTRAINTS)):
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(known)}.")
    if not _number(eta) or eta <= 0:
        raise InputError(f"eta={eta!r} must be a number above 0.")
    if not isinstance(reversible, bool):
        raise InputError(f"reversible={reversible!r} must be True or False.")
    if reversible and convention == "paper-prefill":
        raise InputError("Where tokens may come back the prompt is read in full, so by 'paper-prefill' there is nothing to save.")
    if inputs == "foreign" and batch == 1:
        raise InputError("inputs='foreign' takes another picture of the batch: choose a batch_size and a data set of at least 2.")


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_references(item: Any, number: int) -> None:
    """Refuse item `number` if it holds no reply to learn from. Raises InputError."""
    told = item.references
    listed = hasattr(told, "__len__") and not isinstance(told, str)  # a string would be read letter by letter
    if not listed or not len(told) or not all(isinstance(text, str) for text in told):
        raise InputError(f"Item {number} has references={told!r}: give a list of at least one reply, as in ['a red circle'].")


def warn_if_out_of_reach(
    batches: Sequence[tuple[Lengths, Sequence[int]]], ratio_of: FlopsRatio, target: float
) -> None:
    """Tell the log if the highest rate at every step would cost more than the target.

    No error: a study asks small models, too, for the budgets of deep ones, to see that all of it runs.
    """
    costs: list[float] = []
    for prompt, lengths in batches:
        highest = torch.zeros(len(lengths), max(lengths), ratio_of.n_rates)
        highest[..., -1] = 1.0
        costs += ratio_of(highest, prompt, lengths).tolist()
    least = sum(costs) / len(costs)
    if target < least - NEAR and distributed.rank() == 0:
        log.warning(
            "target=%.3g is out of reach: with layer=%d and %d rates these prompts and replies cost from %.3f to 1 of the "
            "unpruned ones (convention %r). Choose a target in that range, an earlier layer, or more rates.",
            target, ratio_of.layer, ratio_of.n_rates, least, ratio_of.convention,
        )  # fmt: skip
