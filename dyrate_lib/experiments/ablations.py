"""Table IV: decoding strategies, and fixed, depth-based and learned rates; then n_rates, P, re-ranking, reversible.

One model, the one in the role of 7B, as in the paper. All costs are FLOPs ratios in the paper's convention unless said
otherwise. `FP` is one fixed rate from step 0. `DP` is a reading of the paper's C_retain, whose R' is not defined: from
the fourth layer on (index 3, P = 3) a share P_4th leaves, and R' grows linearly with depth until at the last layer no
image token is left; P_4th is then set by the FLOPs asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..accounting import paper_layer_flops
from ..compare import load_paper
from ..methods import DepthPrune, DyRate, Method, RatePath
from ..models import ModelInfo
from ..predictor import RatePredictor
from ..training import train_predictor
from .context import Record, Study
from .summaries import (
    asked_for,
    difference_with_interval,
    mean_with_interval,
    show_interval,
    verdict_line,
)

KEY, LAYER, TARGET = "small", 2, 0.333
DEPTH_LAYER = 3  # the paper's DP starts at the fourth layer, whatever P is elsewhere
FIXED_RATIO, DEPTH_RATIO = 0.288, 0.581  # what FP and DP cost in Table IVb
VARIANT_TARGET = 0.5  # every variant can reach it: P = 4, or five rates, cannot reach a third of the FLOPs
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
    """The sets of parts (b) and (c): Nocaps' role and, on scenes, the captions that need the picture late."""
    return (main_role(study), "late") if study.on_scenes else (main_role(study),)


# --------------------------------------------------------------------------------------------------------- records


def compute(study: Study) -> list[Record]:
    """All records of this notebook."""
    cells: list[Callable[[], Any]] = []
    for kind in ("original", "dyrate"):
        cells += [lambda k=kind, s=strategy: decoded(study, k, s) for strategy in STRATEGIES]
    for role in roles(study):
        cells += [lambda r=role, row=row: pruned(study, r, row) for row in PRUNING]
    for role in variant_roles(study):
        cells += [lambda r=role, v=name: [variant(study, r, v)] for name in VARIANTS]
    found = [record for cell in study.each(cells, "ablations") for record in cell()]
    return found + [trained(study, *shape) for shape in _shapes_trained()]


def variant_roles(study: Study) -> tuple[str, ...]:
    """Sets on which the variants are tried: the main one alone at smoke scale."""
    return roles(study) if study.scale.name == "full" else roles(study)[:1]


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
    wanted = {"fixed": FIXED_RATIO, "depth": DEPTH_RATIO}.get(row)
    if wanted is None:
        wanted = float(np.mean([flops_ratio(record) for record in pruned(study, role, "dyrate")]))
    shapes = reply_shapes(pruned(study, role, "original")[0])
    find = fixed_for if row.startswith("fixed") else depth_for
    return [find(study.info(KEY), shapes, wanted)]


def trained(study: Study, layer: int, n_rates: int) -> Record:
    """A predictor for a variant, trained at the ablations' own number of steps. Payload: weight, bias, last figures."""
    from .training_runs import training_set

    data, scale = training_set(study), study.scale
    config = {
        "target": VARIANT_TARGET, "seed": 0, "steps": scale.ablation_steps, "batch_size": scale.train_batch, "layer": layer,
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


def variant(study: Study, role: str, name: str) -> Record:
    """Replies under one variant of DyRate."""
    layer, n_rates, rank, reversible = VARIANTS[name]
    payload = trained(study, layer, n_rates)["payload"]
    predictor = RatePredictor(payload["n_heads"], n_rates, layer)
    predictor.linear.weight.data = torch.tensor(payload["weight"])
    predictor.linear.bias.data = torch.tensor(payload["bias"])
    method = DyRate(predictor.eval().requires_grad_(False), rank=rank, reversible=reversible)
    return study.captions(KEY, role, method, n=study.scale.n_ablation)


# ------------------------------------------------------------------------------------------------- rates for a budget


def reply_shapes(record: Record) -> list[tuple[int, int, int]]:
    """(prompt tokens, image tokens, steps) of each reply: what a FLOPs ratio depends on besides the kept counts."""
    return [(entry["prompt_length"], entry["n_image"], entry["steps"]) for entry in record["payload"]]


def constant_ratio(info: ModelInfo, shapes: Sequence[tuple[int, int, int]], kept: Callable[[int], np.ndarray]) -> float:
    """Mean FLOPs ratio, paper's convention, when layer l keeps kept(n_image)[l] image tokens at every step."""
    total, known = 0.0, {}
    for shape in shapes:
        if shape not in known:
            length, n_image, steps = shape
            full = np.asarray(length + np.arange(steps), dtype=np.float64)
            rows = full[:, None] - n_image + kept(n_image)[None, :]
            whole = info.n_layers * float(paper_layer_flops(full, info.hidden, info.mlp).sum())
            known[shape] = float(paper_layer_flops(rows, info.hidden, info.mlp).sum()) / whole
        total += known[shape]
    return total / len(shapes)


def fixed_for(info: ModelInfo, shapes: Sequence[tuple[int, int, int]], ratio: float, layer: int = LAYER) -> RatePath:
    """The fixed rate whose cost comes nearest to `ratio`; keeps at least no token and at most all."""
    n_image = max(n for _, n, _ in shapes)

    def cost(count: int) -> float:
        return constant_ratio(info, shapes, lambda n: np.where(np.arange(info.n_layers) < layer, n, min(count, n)))

    return RatePath(layer, ((n_image - _nearest(cost, n_image, ratio)) / n_image,))


def depth_for(info: ModelInfo, shapes: Sequence[tuple[int, int, int]], ratio: float, layer: int = DEPTH_LAYER) -> DepthPrune:
    """The depth-based rates (see the module's head) whose cost comes nearest to `ratio`; P_4th in thousandths."""

    def cost(thousandths: int) -> float:
        rates = depth_rates(info.n_layers, 1 - thousandths / 1000, layer)
        shares = np.array([1 - rates.get(index, 0.0) for index in range(info.n_layers)])
        return constant_ratio(info, shapes, lambda n: np.round(n * shares))

    return DepthPrune(depth_rates(info.n_layers, 1 - _nearest(cost, 1000, ratio) / 1000, layer))


def depth_rates(n_layers: int, first: float, layer: int = DEPTH_LAYER) -> dict[int, float]:
    """Share removed at each layer from `layer` on: `first` there, all at the last layer, linear between."""
    span = max(n_layers - 1 - layer, 1)
    return {index: round(first + (1 - first) * (index - layer) / span, 6) for index in range(layer, n_layers)}


def _nearest(cost: Callable[[int], float], top: int, wanted: float) -> int:
    """The argument in 0..top at which a rising cost comes nearest to the wanted one."""
    low, high = 0, top
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= wanted else (middle + 1, high)
    return min((k for k in (low - 1, low) if k >= 0), key=lambda k: abs(cost(k) - wanted))


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
    for role in variant_roles(study):
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
            lines.append(f"{PRUNING_LABELS[row]}: P_4th = {method.rates[DEPTH_LAYER]:.3f}, all image tokens gone at the last layer")
        else:
            lines.append(f"{PRUNING_LABELS[row]}: R = {method.rates[0]:.4f} from layer {LAYER} on")  # type: ignore[attr-defined]
    return "\n".join([*lines, depth_on_llava()])


def depth_on_llava() -> str:
    """What the reading of DP costs at LLaVA-1.5-7B's dimensions if P_4th is zero, beside what Table IVb prints."""
    n_layers, hidden, mlp, n_image = 32, 4096, 11008, 576
    shares = 1 - np.array([depth_rates(n_layers, 0.0).get(index, 0.0) for index in range(n_layers)])
    found = []
    for text in (32, 64, 128):
        whole = n_layers * float(paper_layer_flops(float(text + n_image), hidden, mlp))
        found.append(100 * float(paper_layer_flops(text + n_image * shares, hidden, mlp).sum()) / whole)
    return (
        "DP at LLaVA-1.5-7B's dimensions with P_4th = 0: "
        + ", ".join(f"{value:.1f} % with {text} text tokens" for value, text in zip(found, (32, 64, 128), strict=True))
        + f"; Table IVb prints {100 * DEPTH_RATIO:.1f} %"
    )


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
