"""The controls' numbers: scores at equal cost, differences in pairs, and what claims C11 to C14 are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..stats import bootstrap_statistic, mean_over_seeds
from ..stats_tests import holm, sign_flip_p_value
from . import controls
from .benchmarks import remembered
from .context import Record, Study
from .controls_needs import following, more_to_see
from .equal_cost import at_cost, slope
from .summaries import Quantity, difference_with_interval, largest

AGAINST = ("step", "none", "foreign")  # what C11 compares the shares with
FINALITY_ROLES = ("flickr30k", "late")  # C13
SEEN_ROLES = ("coco", "flickr30k")  # C14


@dataclass(frozen=True)
class Scored:
    """A row's cells, one a seed: pictures' CIDEr as run and at the shares' cost, means over seeds; what each seed cost."""

    raw: np.ndarray
    equal: np.ndarray
    costs: tuple[float, ...]
    cached: float

    @property
    def cost(self) -> float:
        """Mean FLOPs ratio, paper's convention."""
        return float(np.mean(self.costs))


def cider(study: Study, record: Record, role: str) -> np.ndarray:
    """[pictures] CIDEr x 100."""
    return study.scores(record, role).per_image_cider


def curve(study: Study, key: str, role: str) -> tuple[list[float], list[np.ndarray]]:
    """Costs and scores of the constant rates around the shares' cost."""
    cells = controls.curve(study, key, role)
    return [controls.ratio(record) for record in cells], [cider(study, record, role) for record in cells]


def scored(study: Study, key: str, role: str, cells: Sequence[Record], wanted: float | None = None) -> Scored:
    """The cells' scores, and these at the cost `wanted` (the shares' on this set if none is given)."""
    wanted = controls.reference(study, key, role) if wanted is None else wanted
    costs, table = remembered(study, ("constant rates", key, role), lambda: curve(study, key, role))
    values, spent = [cider(study, record, role) for record in cells], tuple(map(controls.ratio, cells))
    equal = [at_cost(value, cost, wanted, costs, table) for value, cost in zip(values, spent, strict=True)]
    cached = float(np.mean([controls.ratio(record, "cached") for record in cells]))
    return Scored(mean_over_seeds(values), mean_over_seeds(equal), spent, cached)


def fed(study: Study, key: str, role: str, kind: str) -> Scored:
    """A control's scores, at the shares' cost too."""
    return remembered(
        study, ("scored", key, role, kind), lambda: scored(study, key, role, controls.controls(study, key, role, kind))
    )


def changed(study: Study, key: str, role: str, name: str) -> Scored:
    """A variant's scores (final, reversible, reranked), at the shares' cost too."""
    return remembered(
        study, ("variant", key, role, name), lambda: scored(study, key, role, controls.variants(study, key, role, name))
    )


def difference(study: Study, a: np.ndarray, b: np.ndarray) -> Quantity:
    """a - b over the same pictures, with its interval."""
    return difference_with_interval(a, b, study.scale.bootstrap, study.seed)


def relative(study: Study, a: np.ndarray, b: np.ndarray) -> Quantity | None:
    """(mean a - mean b) / mean b, pictures resampled in pairs; None where the mean of b is 0."""
    if not b.sum():
        return None
    value, lo, hi = bootstrap_statistic(np.column_stack([a - b, b]), n=study.scale.bootstrap, seed=study.seed)
    return {"mean": value, "lo": lo, "hi": hi, "n": int(a.size)}


def share_of_gap(study: Study, key: str, role: str) -> Quantity:
    """(shares - none) / (oracle - none) of mean scores at equal cost; 0 where the oracle gains nothing: no gap is recovered."""
    shares, none, oracle = (fed(study, key, role, kind).equal for kind in ("shares", "none", "oracle"))
    if oracle.mean() <= none.mean():
        return {"mean": 0.0, "lo": 0.0, "hi": 0.0, "n": int(none.size)}
    sums = np.column_stack([shares - none, oracle - none])
    value, lo, hi = bootstrap_statistic(sums, n=study.scale.bootstrap, seed=study.seed)
    return {"mean": value, "lo": lo, "hi": hi, "n": int(none.size)}


def cost_gap(study: Study, key: str, role: str, kinds: Sequence[str]) -> float:
    """Largest difference between the FLOPs ratio of any control and that of the shares, as run."""
    first = fed(study, key, role, "shares").cost
    return largest(abs(fed(study, key, role, kind).cost - first) for kind in kinds)


def point_of_flops(study: Study, key: str, role: str) -> float:
    """What 0.01 of the FLOPs ratio adds to CIDEr on the curve of constant rates at the shares' cost."""
    costs, table = remembered(study, ("constant rates", key, role), lambda: curve(study, key, role))
    return slope(costs, table, controls.reference(study, key, role))


def adjusted(study: Study, pairs: dict[tuple, tuple[np.ndarray, np.ndarray]]) -> dict[tuple, float]:
    """Holm-adjusted p-values of paired differences, all given being one family (sign-flip test)."""
    values = [sign_flip_p_value(a - b, seed=study.seed) for a, b in pairs.values()]
    return dict(zip(pairs, map(float, holm(values)), strict=True)) if values else {}


# ---------------------------------------------------------------------------------------------- claims C11 to C14


def cells(study: Study) -> list[tuple[str, str]]:
    """(model, set) of all tables."""
    return [(key, role) for key in controls.models(study) for role in controls.roles(study)]


def attention_quantities(study: Study) -> dict[str, Any]:
    """C11: the shares against each control."""
    out: dict[str, Any] = {}
    for key, role in cells(study):
        head, first = f"c11.{key}.{role}", fed(study, key, role, "shares")
        for kind in AGAINST:
            out[f"{head}.shares_minus_{kind}"] = difference(study, first.equal, fed(study, key, role, kind).equal)
        kinds = [kind for kind in (*AGAINST, "oracle") if kind in controls.inputs(study)]
        out[f"{head}.flops_gap_max"] = {"mean": cost_gap(study, key, role, kinds), "n": int(first.raw.size)}
        if "oracle" in kinds:
            oracle, none = (fed(study, key, role, kind).equal for kind in ("oracle", "none"))
            out[f"{head}.oracle_minus_none"] = difference(study, oracle, none)
            out[f"{head}.share_of_gap"] = share_of_gap(study, key, role)
    return out


def need_quantities(study: Study) -> dict[str, Any]:
    """C12: the paper's predictor and the need."""
    found = {(key, role): following(study, key, role, "shares") for key, role in cells(study)}
    return {f"c12.{key}.{role}.{name}": value for (key, role), values in found.items() for name, value in values.items()}


def finality_quantities(study: Study) -> dict[str, Any]:
    """C13: final dropping against reversible, and against ranking anew."""
    out: dict[str, Any] = {}
    for key, role in cells(study):
        if role not in FINALITY_ROLES:
            continue
        final, others = changed(study, key, role, "final"), {n: changed(study, key, role, n) for n in controls.VARIANTS[1:]}
        for name, other in others.items():
            found = relative(study, final.equal, other.equal)
            if found is not None:
                out[f"c13.{key}.{role}.final_against_{name}"] = found
        gap = largest(abs(other.cost - final.cost) for other in others.values())
        out[f"c13.{key}.{role}.flops_gap_max"] = {"mean": gap, "n": int(final.raw.size)}
    return out


def seen_quantities(study: Study) -> dict[str, Any]:
    """C14: the share removed and what there is to see."""
    pairs = [(key, role) for key, role in cells(study) if role in SEEN_ROLES and study.on_scenes]
    found = {(key, role): more_to_see(study, key, role) for key, role in pairs}
    return {f"c14.{key}.{role}.{name}": value for (key, role), values in found.items() for name, value in values.items()}


def quantities(study: Study) -> dict[str, Any]:
    """What claims C11 to C15 read."""
    from .better import quantities as better_quantities
    from .summaries import asked_for

    found = {
        **attention_quantities(study), **need_quantities(study), **finality_quantities(study), **seen_quantities(study),
        **better_quantities(study),
    }  # fmt: skip
    return {k: v for claim in ("C11", "C12", "C13", "C14", "C15") for k, v in asked_for(claim, found, beyond=True).items()}
