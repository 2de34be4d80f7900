"""Table IV: decoding strategies, and fixed, depth-based and learned rates; then n_rates, P, re-ranking, reversible.

One model, the one in the role of 7B, as in the paper. All costs are FLOPs ratios in the paper's convention unless said
otherwise. `FP` is one fixed rate from step 0. `DP` is a reading of the paper's C_retain, whose R' is not defined: from
the fourth layer on (index 3, P = 3) a share P_4th leaves, and R' grows linearly with depth until at the last layer no
image token is left; P_4th is then set by the FLOPs asked for. FP and DP at the paper's costs prune from P = 3 on, as the
paper's do; at DyRate's cost from DyRate's own P on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..compare import load_paper
from ..methods import DepthPrune, DyRate, Method
from ..predictor import RatePredictor
from ..training import train_predictor
from .budgets import DEPTH_RATIO, FIXED_RATIO, PAPER_LAYER, depth_for, depth_on_llava, fixed_for, reply_shapes
from .context import Record, Study
from .summaries import (
    asked_for,
    difference_with_interval,
    mean_with_interval,
    show_interval,
    verdict_line,
)

KEY, LAYER, TARGET = "small", 2, 0.333
VARIANT_TARGET = 0.5  # every variant can reach it: with P = 4, or with five rates, a third of the FLOPs is out of reach
TOP_P, TOP_K = 0.9, 6  # the paper gives no p; k is from its text
STRATEGIES = ("greedy", "beam-2", "beam-5", "top-p", "top-k")
STRATEGY_LABELS = {
    "greedy": "Greedy", "beam-2": "Beam-2", "beam-5": "Beam-5", "top-p": f"top_p = {TOP_P}", "top-k": f"top_k = {TOP_K}",
}  # fmt: skip
# name -> (layer P, number of rates, rank, reversible); the first is what the others are compared with
VARIANTS: dict[str, tuple[int, int, str, bool]] = {
    "P = 2, 20 rates": (2, 20, "prefill", False),
    "5 rates": (2, 5, "prefill", False),
    "10 rates": (2, 10, "prefill", False),
    "P = 3": (3, 20, "prefill", False),
    "P = 4": (4, 20, "prefill", False),
    "ranked anew at each step": (2, 20, "step", False),
    "reversible": (2, 20, "prefill", True),
}


def main_role(study: Study) -> str:
    """Nocaps' role, on which Table IV stands; with a COCO folder the folder."""
    return "nocaps" if study.on_scenes else "coco"


def roles(study: Study) -> tuple[str, ...]:
    """The sets of parts (b) and (c): Nocaps' role and, on scenes at full scale, the captions that need the picture late."""
    return (main_role(study), "late") if study.on_scenes and study.scale.name == "full" else (main_role(study),)


# --------------------------------------------------------------------------------------------------------- records


def compute(study: Study) -> list[Record]:
    """All records of this notebook."""
    cells: list[Callable[[], Any]] = []
    for kind in ("original", "dyrate"):
        cells += [partial(decoded, study, kind, strategy) for strategy in STRATEGIES]
    for role in roles(study):
        cells += [partial(pruned, study, role, row) for row in PRUNING]
    for role in roles(study):
        cells += [partial(variants, study, role, name) for name in VARIANTS]
    found = [record for cell in study.each(cells, "ablations") for record in cell()]
    return found + [trained(study, *shape) for shape in _shapes_trained()]


def decoded(study: Study, kind: str, strategy: str) -> list[Record]:
    """Records of one decoding strategy, one a sampling seed; kind "original" or "dyrate" (first predictor seed)."""
    method = study.method(kind, KEY, target=TARGET) if kind == "dyrate" else None
    role, n = main_role(study), study.scale.n_ablation
    return [study.captions(KEY, role, method, decoding=d, n=n) for d in decodings(study, strategy)]


def decodings(study: Study, strategy: str) -> list[dict[str, Any] | None]:
    """The decoding settings of a strategy, one a sampling seed."""
    if strategy == "greedy":
        return [None]
    if strategy.startswith("beam-"):
        return [{"num_beams": int(strategy.removeprefix("beam-"))}]
    filtered = {"top_p": TOP_P} if strategy == "top-p" else {"top_k": TOP_K}
    return [{"do_sample": True, **filtered, "seed": seed} for seed in study.scale.sampling_seeds]


PRUNING = ("original", "fastv-3", "fixed", "depth", "dyrate", "fixed, matched", "depth, matched")


def pruned(study: Study, role: str, row: str) -> list[Record]:
    """Records of one row of part (b); DyRate has one a predictor seed."""
    return [study.captions(KEY, role, method, n=study.scale.n_ablation) for method in pruning_methods(study, role, row)]


def pruning_methods(study: Study, role: str, row: str) -> list[Method]:
    """The method of a row; `matched` rows cost what DyRate's replies did on this set, the others what Table IVb prints."""
    if row in ("original", "fastv-3"):
        return [study.method(row, KEY)]
    if row == "dyrate":
        return [study.method("dyrate", KEY, target=TARGET, seed=seed) for seed in study.scale.predictor_seeds]
    wanted, layer = {"fixed": FIXED_RATIO, "depth": DEPTH_RATIO}.get(row), PAPER_LAYER
    if wanted is None:
        layer = int(study.method("dyrate", KEY, target=TARGET).layer or LAYER)
        wanted = float(np.mean([flops_ratio(record) for record in pruned(study, role, "dyrate")]))
    shapes = reply_shapes(pruned(study, role, "original")[0])
    find = fixed_for if row.startswith("fixed") else depth_for
    return [find(study.info(KEY), shapes, wanted, layer)]


def trained(study: Study, layer: int, n_rates: int) -> Record:
    """A predictor for a variant, trained at the ablations' own number of steps. Payload: weight, bias, last figures."""
    from .training_runs import training_set

    data, scale = training_set(study), study.scale
    known = inspect.signature(train_predictor).parameters
    config = {
        **{name: known[name].default for name in ("lr", "lam", "tau", "convention")}, "target": VARIANT_TARGET, "seed": 0,
        "steps": scale.ablation_steps, "batch_size": scale.train_batch, "layer": layer,
        "n_rates": n_rates, "max_new_tokens": scale.max_new_tokens, "data": data.identity,
    }  # fmt: skip

    def fn() -> dict[str, Any]:
        model, processor = study.model(KEY)
        result = train_predictor(
            model, processor, data, target=VARIANT_TARGET, layer=layer, n_rates=n_rates, steps=scale.ablation_steps,
            batch_size=scale.train_batch, seed=0, max_new_tokens=scale.max_new_tokens, progress=False,
        )  # fmt: skip
        linear = result.predictor.linear
        return {"weight": linear.weight, "bias": linear.bias, "n_heads": result.predictor.n_heads, "last": result.history[-1]}

    return study.record("ablations/training", config, fn, models=[KEY])


def _shapes_trained() -> list[tuple[int, int]]:
    return list(dict.fromkeys((layer, n_rates) for layer, n_rates, _, _ in VARIANTS.values()))


def variants(study: Study, role: str, name: str) -> list[Record]:
    """A variant's replies as a list, as the other cells are."""
    return [variant(study, role, name)]


def variant(study: Study, role: str, name: str) -> Record:
    """Replies under one variant of DyRate."""
    layer, n_rates, rank, reversible = VARIANTS[name]
    payload = trained(study, layer, n_rates)["payload"]
    predictor = RatePredictor(payload["n_heads"], n_rates, layer)
    predictor.linear.weight.data = torch.tensor(payload["weight"])
    predictor.linear.bias.data = torch.tensor(payload["bias"])
    method = DyRate(predictor.eval().requires_grad_(False), rank=rank, reversible=reversible)
    return study.captions(KEY, role, method, n=study.scale.n_ablation)


def flops_ratio(record: Record, convention: str = "paper") -> float:
    """Mean FLOPs ratio of a record's replies."""
    return float(np.mean([entry["flops"][convention] for entry in record["payload"]]))


# --------------------------------------------------------------------------------------------------------- numbers


def cider(study: Study, records: Sequence[Record], role: str) -> np.ndarray:
    """[pictures] CIDEr x 100 of each picture, averaged over the records (seeds)."""
    return np.mean([study.scores(record, role).per_image_cider for record in records], axis=0)


def quantities(study: Study) -> dict[str, Any]:
    """What claims C7 and C8 are judged by."""
    n, seed, role = study.scale.bootstrap, study.seed, main_role(study)
    score = {strategy: cider(study, decoded(study, "original", strategy), role) for strategy in STRATEGIES[:4]}
    ordered = sorted(score, key=lambda strategy: float(score[strategy].mean()))
    found: dict[str, Any] = {
        "c7.best_minus_worst": difference_with_interval(score[ordered[-1]], score[ordered[0]], n, seed)
    }
    for strategy, name in (("beam-2", "beam2"), ("beam-5", "beam5"), ("top-p", "top_p")):
        found[f"c7.{name}_minus_greedy"] = difference_with_interval(score[strategy], score["greedy"], n, seed)
    rows = {row: pruned(study, role, row) for row in ("original", "fixed", "depth")}
    fixed, depth, original = (cider(study, rows[row], role) for row in ("fixed", "depth", "original"))
    found["c8.fixed_minus_depth"] = difference_with_interval(fixed, depth, n, seed)
    found["c8.fixed_minus_original"] = difference_with_interval(fixed, original, n, seed)
    for row in ("fixed", "depth"):
        found[f"c8.{row}_flops_ratio"] = {"mean": flops_ratio(rows[row][0]), "n": len(rows[row][0]["payload"])}
    return {**asked_for("C7", found), **asked_for("C8", found)}


def decoding_table(study: Study) -> pd.DataFrame:
    """Table IVa beside ours: CIDEr by strategy, unpruned and under DyRate, paired differences to greedy."""
    paper = load_paper("table4a").set_index("method")["nocaps"]
    n, seed, role = study.scale.bootstrap, study.seed, main_role(study)
    rows = []
    for strategy in STRATEGIES:
        row: dict[str, Any] = {"strategy": STRATEGY_LABELS[strategy]}
        row["paper, CIDEr (LLaVA-1.5-7B, Nocaps)"] = float(paper.get(strategy, np.nan))
        for kind, name in (("original", "unpruned"), ("dyrate", "DyRate")):
            records = decoded(study, kind, strategy)
            values = cider(study, records, role)
            row[f"{name}, CIDEr"] = show_interval(mean_with_interval(values, n, seed), 2)
            greedy = cider(study, decoded(study, kind, "greedy"), role)
            row[f"{name}, minus greedy"] = show_interval(difference_with_interval(values, greedy, n, seed), 2)
            row[f"{name}, tokens"] = float(np.mean([entry["steps"] for record in records for entry in record["payload"]]))
        row["seeds"] = len(decodings(study, strategy))
        rows.append(row)
    return pd.DataFrame(rows)


PRUNING_LABELS = {
    "original": "LLaVA (unpruned)", "fastv-3": "FastV (P=3, R=0.5)", "fixed": "FP", "depth": "DP", "dyrate": "DyRate (learned)",
    "fixed, matched": "FP at DyRate's FLOPs", "depth, matched": "DP at DyRate's FLOPs",
}  # fmt: skip


def pruning_table(study: Study) -> pd.DataFrame:
    """Table IVb beside ours, and the three ways to spend the same FLOPs; paired differences to the unpruned model."""
    paper = load_paper("table4b").set_index("method")
    n, seed = study.scale.bootstrap, study.seed
    rows = []
    for role in roles(study):
        original = cider(study, pruned(study, role, "original"), role)
        for name in PRUNING:
            records = pruned(study, role, name)
            values = cider(study, records, role)
            known = name in paper.index and role == main_role(study)
            rows.append(
                {
                    "set": study.dataset(role, study.scale.n_ablation).name, "strategy": PRUNING_LABELS[name],
                    "paper, CIDEr": float(paper.loc[name, "nocaps"]) if known else np.nan,
                    "paper, FLOPs %": float(paper.loc[name, "flops_percent"]) if known else np.nan,
                    "FLOPs %": 100 * float(np.mean([flops_ratio(record) for record in records])),
                    "FLOPs %, cached": 100 * float(np.mean([flops_ratio(record, "cached") for record in records])),
                    "CIDEr": float(values.mean()),
                    "95 % interval": "[{lo:.2f}, {hi:.2f}]".format(**mean_with_interval(values, n, seed)),
                    "minus unpruned": show_interval(difference_with_interval(values, original, n, seed), 2),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def variant_table(study: Study) -> pd.DataFrame:
    """Variants of DyRate, each predictor trained for the same budget; paired differences to the first."""
    n, seed = study.scale.bootstrap, study.seed
    rows = []
    for role in roles(study):
        first = cider(study, [variant(study, role, next(iter(VARIANTS)))], role)
        for name in VARIANTS:
            record = variant(study, role, name)
            values = cider(study, [record], role)
            rows.append(
                {
                    "set": study.dataset(role, study.scale.n_ablation).name, "variant": name,
                    "asked for, FLOPs %": 100 * VARIANT_TARGET,
                    "FLOPs %": 100 * flops_ratio(record), "FLOPs %, cached": 100 * flops_ratio(record, "cached"),
                    "CIDEr": float(values.mean()),
                    "95 % interval": "[{lo:.2f}, {hi:.2f}]".format(**mean_with_interval(values, n, seed)),
                    "minus the first": show_interval(difference_with_interval(values, first, n, seed), 2),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def settings(study: Study) -> str:
    """The rates that FP and DP were given on the main set, as lines to print."""
    lines = []
    for row in ("fixed", "depth", "fixed, matched", "depth, matched"):
        method = pruning_methods(study, main_role(study), row)[0]
        if isinstance(method, DepthPrune):
            first = method.rates[method.layer]  # type: ignore[index]
            lines.append(f"{PRUNING_LABELS[row]}: P_4th = {first:.3f} at layer {method.layer}, all image tokens gone at the last")
        else:
            lines.append(f"{PRUNING_LABELS[row]}: R = {method.rates[0]:.4f} from layer {method.layer} on")  # type: ignore[attr-defined]
    return "\n".join([*lines, depth_on_llava()])


def verdicts(study: Study) -> str:
    """The stable last lines of the notebook."""
    measured = quantities(study)
    return "\n".join(verdict_line(claim, measured) for claim in ("C7", "C8"))


def figure_decoding(study: Study) -> Figure:
    """CIDEr by decoding strategy, unpruned and under DyRate, with intervals; the paper's values as diamonds."""
    from .ablation_figures import figure_decoding

    return figure_decoding(study)


def figure_pruning(study: Study) -> Figure:
    """CIDEr over FLOPs of the ways to spend them, with intervals, one panel a set."""
    from .ablation_figures import figure_pruning

    return figure_pruning(study)
