"""Why the selection can be trained: the straight-through gradient beside the exact one, on a toy small enough to enumerate.

The toy has the paper's selection and nothing else: T steps, n_rates rates, nested masks over N ranked tokens, m_t = m_{t-1} *
sum_k y_{t,k} m^k, and a loss that needs some of the tokens. Every path of rates can be listed, so the expected loss and its
gradient in the logits are known exactly.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from .. import masks

STEPS, N_RATES, N_TOKENS = 3, 4, 8
# how much each ranked token matters at each step: less and less, as the paper finds
NEED = (
    torch.tensor([1.0, 0.6, 0.3]).double()[:, None]
    * torch.tensor([0.40, 0.25, 0.15, 0.08, 0.05, 0.04, 0.02, 0.01]).double()
)
COST = 0.45  # price of a kept share of the tokens, the toy's FLOPs term
# (of the distribution, of the soft sample); the first three as training has them
TEMPERATURES = ((2.0, 1.0), (1.0, 1.0), (0.5, 1.0), (1.0, 5.0), (1.0, 0.5))


def toy_loss(keep: Tensor) -> Tensor:
    """[.., T, N] masks to [..] losses: squared need that was dropped, plus the price of what is read."""
    dropped = (NEED.to(keep.dtype) * (1 - keep)).sum(-1)
    return (dropped**2).sum(-1) + COST * keep.mean(-1).mean(-1)


def _rate_masks() -> Tensor:
    kept = masks.kept_counts(torch.tensor([N_TOKENS]), N_RATES)
    return masks.prefix_masks(kept, N_TOKENS).double()


def expected_loss(logits: Tensor) -> Tensor:
    """E[loss] over all n_rates^T paths, exactly. logits: [T, n_rates] float64."""
    log_pi = torch.log_softmax(logits, dim=-1)
    paths = torch.tensor(list(itertools.product(range(N_RATES), repeat=STEPS)))
    probability = torch.exp(functools.reduce(torch.add, (log_pi[t, paths[:, t]] for t in range(STEPS))))
    one_hot = torch.nn.functional.one_hot(paths, N_RATES).double()
    keep = masks.select_masks(one_hot, _rate_masks().expand(len(paths), -1, -1))
    return (probability * toy_loss(keep)).sum()


def finite_differences(logits: Tensor, h: float = 1e-5) -> Tensor:
    """The gradient of `expected_loss` by central differences, [T, n_rates]."""
    out = torch.zeros_like(logits)
    for index in itertools.product(*map(range, logits.shape)):
        moved = torch.zeros_like(logits)
        moved[index] = h
        out[index] = (expected_loss(logits + moved) - expected_loss(logits - moved)) / (2 * h)
    return out


def straight_through_gradient(logits: Tensor, tau: float, samples: int, seed: int = 0) -> Tensor:
    """Mean over samples of the gradient that training follows: one-hot forward, soft backward. [T, n_rates]."""
    leaf = logits.clone().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    one_hot = masks.gumbel_one_hot(leaf.expand(samples, -1, -1), tau, generator)
    keep = masks.select_masks(one_hot.double(), _rate_masks().expand(samples, -1, -1))
    (gradient,) = torch.autograd.grad(toy_loss(keep).mean(), leaf)
    return gradient


def gradient_demonstration(samples: int = 20000, seed: int = 0) -> dict[str, Any]:
    """Exact, finite-difference and straight-through gradients, and how they agree, as JSON values.

    Two temperatures are told apart: `sharpening` divides the logits (training lowers it, so that in the end a draw is nearly
    the argmax), `sample` is that of the soft sample behind the backward pass (training leaves it at 1).

    Returns logits; exact (autograd through the enumeration) against differences; and for each pair of temperatures the exact
    gradient, the straight-through mean, its cosine to the exact one, the ratio of lengths, the share of entries of equal sign.
    """
    logits = torch.randn(STEPS, N_RATES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.5
    cases = []
    for sharpening, sample in TEMPERATURES:
        exact = _exact_gradient(logits, sharpening)
        estimate = straight_through_gradient(logits / sharpening, sample, samples, seed) / sharpening
        cases.append(
            {
                "sharpening": sharpening, "sample": sample, "exact": exact.tolist(), "gradient": estimate.tolist(),
                "cosine": float(torch.nn.functional.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0)),
                "length_ratio": float(estimate.norm() / exact.norm()),
                "same_sign": float((estimate.sign() == exact.sign()).double().mean()),
            }
        )  # fmt: skip
    gap = (_exact_gradient(logits, 1.0) - finite_differences(logits)).abs().max()
    return {
        "samples": samples, "logits": logits.tolist(), "exact_minus_differences": float(gap), "cases": cases,
        "flops_term": _flops_term(logits),
    }  # fmt: skip


def _exact_gradient(logits: Tensor, sharpening: float) -> Tensor:
    leaf = logits.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(expected_loss(leaf / sharpening), leaf)
    return gradient


def _flops_term(logits: Tensor) -> dict[str, float]:
    """The closed form of the expected kept share (`running_rate_distribution`) beside the enumeration, values and gradients."""
    kept = masks.kept_counts(torch.tensor(N_TOKENS), N_RATES).double() / N_TOKENS

    def closed(x: Tensor) -> Tensor:
        return (masks.running_rate_distribution(torch.softmax(x, dim=-1)[None])[0] @ kept).mean()

    def listed(x: Tensor) -> Tensor:
        log_pi = torch.log_softmax(x, dim=-1)
        paths = torch.tensor(list(itertools.product(range(N_RATES), repeat=STEPS)))
        probability = torch.exp(functools.reduce(torch.add, (log_pi[t, paths[:, t]] for t in range(STEPS))))
        return (probability * kept[paths.cummax(dim=1).values].mean(-1)).sum()

    pairs = []
    for form in (closed, listed):
        leaf = logits.clone().requires_grad_(True)
        value = form(leaf)
        pairs.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    return {
        "value_difference": float((pairs[0][0] - pairs[1][0]).abs()),
        "gradient_difference": float((pairs[0][1] - pairs[1][1]).abs().max()),
        "gradient_norm": float(pairs[1][1].norm()),
    }
