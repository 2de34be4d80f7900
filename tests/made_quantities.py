"""Made-up quantities for the verdicts of notebook 07: planted verdicts for each claim, and a plausible set of all of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from dyrate_lib.criteria import Check, Claim, Quantity
from dyrate_lib.experiments.paper_verdicts import all_claims

N = 1000


def _candidates(checks: Iterable[Check]) -> Iterable[Quantity]:
    """Estimates around the criteria's values, with narrow intervals and with wide ones."""
    values = sorted({v for c in checks for v in (c.value if isinstance(c.value, tuple) else (c.value,))})
    unit = min([abs(v) for v in values if v] or [1.0])
    middles = [sum(pair) / 2 for pair in itertools.pairwise(values)]
    for middle in [*values, *middles]:
        for step, half in itertools.product((0.0, 0.5, -0.5, 2.0, -2.0), (0.1, 0.7)):
            mean = middle + step * unit
            yield Quantity(mean, mean - half * unit, mean + half * unit, N)


@functools.cache
def _fitting(checks: tuple[Check, ...], wanted: tuple[bool, ...]) -> dict[str, Any]:
    for candidate in _candidates(checks):
        name = checks[0].quantity
        if tuple(check.outcome({name: candidate})[0] for check in checks) == wanted:
            return dict(vars(candidate))
    raise AssertionError(f"no quantity gives {wanted} to {[c.id for c in checks]}")


def planted(claim: Claim, outcome: dict[str, bool] | bool) -> dict[str, Any]:
    """Quantities under which all checks on a quantity hold (or all core ones fail): by the quantity's name, or all alike."""
    out = {}
    for name in claim.quantities:
        checks = tuple(check for check in claim.checks if check.quantity == name)
        holds = outcome if isinstance(outcome, bool) else outcome.get(name, True)
        if holds:
            out[name] = _fitting(checks, (True,) * len(checks))
            continue
        core = [check.core for check in checks]
        for wanted in itertools.product((False, True), repeat=len(checks)):
            if not any(w and (c or not any(core)) for w, c in zip(wanted, core, strict=True)):
                try:
                    out[name] = _fitting(checks, wanted)
                    break
                except AssertionError:
                    continue
    assert set(out) == set(claim.quantities)
    return out


def plausible(seed: int = 0) -> dict[str, Any]:
    """A set such as a full-scale run might give: attention tells a little, dropping costs something, short answers suffer."""
    random = np.random.default_rng(seed)

    def made(mean: float, half: float, n: int = N) -> dict[str, Any]:
        mean = mean + random.normal(0, half / 3)
        return {"mean": float(mean), "lo": float(mean - half), "hi": float(mean + half), "n": n}

    out: dict[str, Any] = {}
    for key, claim in all_claims().items():
        out |= planted(claim, key in ("C2", "C6", "C9"))
    for model, role in itertools.product(("small", "base"), ("coco", "flickr30k", "late")):
        head, much = f"c11.{model}.{role}", {"coco": 1.0, "flickr30k": 1.6, "late": 2.2}[role] * (1.2 if model == "base" else 1)
        gains = {"oracle": 55 * much, "shares": 18 * (3 - 1.4 * much), "step": 14 * (3 - 1.3 * much), "foreign": 9.0}
        out[f"{head}.oracle_minus_none"] = made(gains["oracle"], 13)
        out[f"{head}.shares_minus_none"] = made(gains["shares"], 11)
        out[f"{head}.shares_minus_step"] = made(gains["shares"] - gains["step"], 9)
        out[f"{head}.shares_minus_foreign"] = made(gains["shares"] - gains["foreign"], 9)
        out[f"{head}.share_of_gap"] = made(gains["shares"] / gains["oracle"], 0.1)
        out[f"{head}.flops_gap_max"] = {"mean": 0.006, "n": N}
        out[f"c12.{model}.{role}.rate_need"] = made(-0.12, 0.03)
        out[f"c12.{model}.{role}.rate_need_given_step"] = made(-0.01, 0.03)
        for name, gain in (("original", -105.0), ("dyrate", 40.0)):
            out[f"c15.{model}.{role}.better_minus_{name}"] = made(gain, 15)
        out[f"c15.{model}.{role}.better_gain"] = made(-0.11, 0.015)
        out[f"c15.{model}.{role}.flops_ratio"] = made(0.251, 0.002)
    for model, role in itertools.product(("small", "base"), ("coco", "nocaps", "flickr30k")):
        out[f"c3.{model}.{role}.dyrate_minus_original"] = made(-150, 16)
        out[f"c3.{model}.{role}.dyrate_gain"] = made(-0.17, 0.018)
    for model in ("small", "base"):
        out[f"c3.{model}.coco.flops_ratio"] = made(0.335, 0.003)
        out[f"c3.{model}.coco.dyrate_minus_random"] = made(300, 20)
        for task in ("gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench", "mme"):
            out[f"c10.{model}.{task}.dyrate_minus_original"] = made(random.choice([-14.0, -3.0, 0.2]), 2.2)
        for other in ("reversible", "reranked"):
            out[f"c13.{model}.late.final_against_{other}"] = made(-0.09, 0.02)
            out[f"c13.{model}.flickr30k.final_against_{other}"] = made(-0.01, 0.02)
        out[f"c4.{'7b' if model == 'small' else '13b'}.dyrate_end_to_end_ratio"] = made(0.95, 0.001, 20)
    return out
