"""The budget in predictor training: what paths cost, as a function of the rates' distribution, and how the loss holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed, masks
from .accounting import flop_steps
from .models import ModelInfo, Prompt

CONSTRAINTS = ("penalty", "lagrangian")
ETA = 20.0  # of the Lagrangian: an error of 0.01 moves the multiplier by 0.2 a step
_WARM_STEPS, _WARM_LR = 200, 0.05  # the bias is fitted to the budget first; this costs no pass of the model


class Lengths(NamedTuple):
    """What the FLOPs of prompts hang on; as in `Prompt`."""

    length: Tensor
    n_image: Tensor

    @classmethod
    def of_all(cls, prompt: Prompt, n: int) -> Lengths:
        return cls(distributed.gathered(prompt.length, n), distributed.gathered(prompt.n_image, n))


def flops_table(
    info: ModelInfo, prompt_length: int, n_image: int, steps: int, layer: int, n_rates: int, convention: str,
    reversible: bool = False,
) -> tuple[Tensor, float]:  # fmt: skip
    """FLOPs of each step under each rate: ([steps, n_rates] float64, unpruned total).

    A step's FLOPs depend on that step's own kept count only (the prefill's on the first), so a path's cost is a sum
    over this table and its expectation is linear in the rates' distribution. reversible: tokens may come back, so the
    prompt's pass carries all of them whatever the rate (as the trace of such a method counts it).
    """
    counts = masks.kept_counts(torch.tensor(n_image), n_rates).tolist()
    columns = []
    for kept in counts:
        by_layer = torch.full((steps, info.n_layers), float(n_image), dtype=torch.float64)
        by_layer[int(reversible) :, layer:] = float(kept)
        columns.append(torch.as_tensor(flop_steps(info, prompt_length, n_image, by_layer.numpy(), convention)))
    table = torch.stack(columns, dim=-1).double()
    return table, float(table[:, 0].sum())


class FlopsRatio:
    """FLOPs ratio of a batch's paths, as a differentiable function of the rates' distribution at each step.

    reversible: the rate in force is the one drawn now, not the highest so far, and the prompt's pass carries all tokens.
    """

    def __init__(self, info: ModelInfo, layer: int, n_rates: int, convention: str, reversible: bool = False) -> None:
        self.info, self.layer, self.n_rates, self.convention = info, layer, n_rates, convention
        self.reversible = reversible
        self._tables: dict[tuple[int, int, int], tuple[Tensor, float]] = {}

    def __call__(self, distribution: Tensor, prompt: Prompt | Lengths, lengths: Sequence[int]) -> Tensor:
        """[B, R, n_rates] distribution of the rate in force at each step; lengths: valid steps. Returns [B]."""
        out = []
        triples = zip(prompt.length.tolist(), prompt.n_image.tolist(), lengths, strict=True)
        for row, key in zip(distribution, triples, strict=True):
            if key not in self._tables:
                self._tables[key] = flops_table(
                    self.info, *key, self.layer, self.n_rates, self.convention, self.reversible
                )
            table, whole = self._tables[key]
            out.append((row[: key[2]].double() * table.to(row.device)).sum() / whole)
        return torch.stack(out).float()

    def in_force(self, probabilities: Tensor) -> Tensor:
        """Distribution of the rate in force at each step where each step draws from its own: [B, R, n_rates], both."""
        return probabilities if self.reversible else masks.running_rate_distribution(probabilities)


def hard_distribution(logits: Tensor, reversible: bool = False) -> Tensor:
    """One-hot of the rate that inference would have in force: running maximum of the argmax, or (reversible) the argmax itself.

    [B, R, n_rates], both."""
    rate = logits.argmax(-1)
    return F.one_hot(rate if reversible else rate.cummax(dim=1).values, logits.shape[-1]).to(logits.dtype)


@dataclass
class Penalty:
    """lam (ratio - target)^2: a pull that vanishes at the target, so the rest of the loss moves the optimum off it, by
    (d rest / d ratio) / (2 lam)."""

    target: float
    lam: float

    def __call__(self, ratio: Tensor) -> Tensor:
        return self.lam * (ratio - self.target) ** 2

    def slope(self, ratio: Tensor) -> Tensor:
        """The derivative by the ratio."""
        return 2 * self.lam * (ratio - self.target)

    def update(self, ratio: float) -> dict[str, float]:
        """Called with each step's ratio, after the step's loss was made. Returns figures for the history."""
        return {}


@dataclass
class Lagrangian(Penalty):
    """mu (ratio - target) + lam (ratio - target)^2, mu rising by eta (ratio - target) at every step: the method of multipliers
    (Hestenes 1969; Powell 1969), descent in the weights and ascent in mu. At rest the ratio is the target whatever the rest of
    the loss wants, and mu is what the rest would gain by a larger budget: -(d rest / d ratio).

    The constraint is an equality, so mu may be negative: a budget is to be used up as well as kept to. Clamped at zero it
    would only hold ratio <= target. The square is what damps the ascent. Without it (lam = 0, the plain Lagrangian) the two
    chase each other, as Adam steps by the sign of a gradient more than by its size; DEVIATIONS.md has the figures.
    """

    eta: float = ETA
    mu: float = 0.0

    def __call__(self, ratio: Tensor) -> Tensor:
        return self.mu * (ratio - self.target) + super().__call__(ratio)

    def slope(self, ratio: Tensor) -> Tensor:
        return self.mu + super().slope(ratio)

    def update(self, ratio: float) -> dict[str, float]:
        """The ascent; the figure is the multiplier that the step's loss had."""
        before = self.mu
        self.mu = before + self.eta * (ratio - self.target)
        return {"mu": before}


def fit_bias(
    bias: Tensor, batches: Sequence[tuple[Lengths, Sequence[int]]], ratio_of: FlopsRatio, target: float, tau: float
) -> None:
    """Give the bias the values at which a distribution that ignores its input meets the budget, drawn at `tau`."""
    optimizer = torch.optim.Adam([bias], lr=_WARM_LR)
    for _ in range(_WARM_STEPS):
        error = torch.zeros((), device=bias.device)
        for prompt, lengths in batches:
            drawn = torch.softmax(bias / tau, dim=-1).expand(len(lengths), max(lengths), -1)
            ratio = ratio_of(ratio_of.in_force(drawn), prompt, lengths).mean()
            error = error + (ratio - target) ** 2
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()
