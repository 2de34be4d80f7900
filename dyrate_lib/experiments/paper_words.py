"""Notebook 07's sentences, assembled from the measured quantities.

Each says what was measured with its interval and n, and 'not measured' where nothing was. Which way a difference goes is said by
its interval alone: nothing here knows a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..compare import VERDICTS
from ..criteria import Quantity
from .overview_data import MODELS, SETS
from .paper_verdicts import all_claims, verdicts

MISSING = "not measured"
TASKS = ("gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench", "mme")
BETTER, WORSE, OPEN, FEW = "better", "worse", "undecided", "too few"


def estimates(measured: Mapping[str, Any], names: Iterable[str]) -> list[float]:
    """The estimates of those quantities that were measured on enough pictures."""
    found = {name: Quantity.of(measured[name]) for name in names if name in measured}
    return [q.mean for name, q in found.items() if q.n is not None and q.n >= least_n(name)]


def told(measured: Mapping[str, Any], name: str, spec: str = "+.1f", unit: str = "") -> str:
    """'+1.2 [+0.3, +2.1] (n = 1000)', or 'not measured'. A % in `spec` shows a share in percent."""
    if name not in measured:
        return MISSING
    q = Quantity.of(measured[name])
    ends = "" if q.lo is None or q.hi is None else f" [{format(q.lo, spec)}, {format(q.hi, spec)}]"
    n = "" if q.n is None else f" (n = {q.n})"
    return f"{format(q, spec)}{unit}{ends}{n}"


def least_n(name: str) -> int:
    """How many pictures (or runs) a quantity must rest on, by the strictest check that reads it."""
    checks = [check for claim in all_claims().values() for check in claim.checks if check.quantity == name]
    return max((check.min_n for check in checks if not check.exact), default=1)


def direction(measured: Mapping[str, Any], name: str, at: float = 0.0) -> str:
    """Whether a quantity's interval lies above `at` (better), below (worse), around it, or rests on too few; or is missing."""
    if name not in measured:
        return MISSING
    q = Quantity.of(measured[name])
    if q.n is None or q.n < least_n(name) or q.lo is None or q.hi is None:
        return FEW
    return BETTER if q.lo > at else WORSE if q.hi < at else OPEN


def tally(measured: Mapping[str, Any], names: Iterable[str], at: float = 0.0) -> str:
    """'better in 2 of 6, worse in 1, undecided in 3'; what was not measured, or on too few pictures, is counted too."""
    found = [direction(measured, name, at) for name in names]
    if set(found) == {MISSING}:
        return MISSING
    counts = [(word, found.count(word)) for word in (BETTER, WORSE, OPEN, FEW, MISSING)]
    words = {FEW: "on too few pictures to say in", MISSING: "not measured in"}
    parts = [f"{words.get(word, word + ' in')} {n}" for word, n in counts if n or word == BETTER]
    return f"{parts[0]} of {len(found)}" + "".join(f", {part}" for part in parts[1:])


def cells(template: str, models: Sequence[str] = MODELS, sets: Sequence[str] = tuple(SETS)) -> list[str]:
    """Names of a quantity over models and sets: {model} and {set} are filled."""
    return list(dict.fromkeys(template.format(model=model, set=role) for role in sets for model in models))


def per_model(measured: Mapping[str, Any], template: str, spec: str, models: Sequence[str] = MODELS) -> str:
    """'small +1.2 [..] (n = 1000), base not measured': a quantity for each model, which fills {model}."""
    return ", ".join(f"{model} {told(measured, template.format(model=model), spec)}" for model in models)


def verdict_sentence(measured: Mapping[str, Any]) -> str:
    """How many claims of the paper, and of those added here, got which verdict."""
    found = verdicts(measured)
    parts = []
    for whose, added in (("the paper's {} claims", False), ("the {} added here", True)):
        keys = [key for key in found if beyond(key) is added]
        by = {v: [k for k in keys if found[k].verdict == v] for v in VERDICTS}
        counted = [f"{len(ks)} {v} ({', '.join(ks)})" for v, ks in by.items() if ks]
        parts.append(f"Of {whose.format(len(keys))}: {'; '.join(counted)}.")
    return " ".join(parts)


def beyond(claim: str) -> bool:
    """Whether a claim is not the paper's own but was asked here: C11 to C15."""
    return claim[0] == "C" and int(claim[1:]) > 10


def quality_sentence(measured: Mapping[str, Any]) -> str:
    """C3: what DyRate at a third of the FLOPs changes."""
    each = [
        f"{model}, short captions: CIDEr {told(measured, f'c3.{model}.coco.dyrate_gain', '+.1%')}, "
        f"FLOPs {told(measured, f'c3.{model}.coco.flops_ratio', '.1%')}"
        for model in MODELS
    ]
    names = cells("c3.{model}.{set}.dyrate_minus_original", sets=("coco", "nocaps", "flickr30k"))
    return (
        "Trained for a third of the FLOPs in the paper's convention, DyRate changes caption quality as follows. "
        f"{'; '.join(each)}. "
        f"Over sets and models it is, against unpruned, {tally(measured, names)}."
    )


def attention_sentence(measured: Mapping[str, Any]) -> str:
    """C11: the attention shares against each control, and what they recover of the oracle's gain."""
    words = {"step": "the step number alone", "none": "nothing (a constant)", "foreign": "another picture's attention"}
    each = [f"{text}: {tally(measured, cells(f'c11.{{model}}.{{set}}.shares_minus_{kind}'))}" for kind, text in words.items()]
    gap = estimates(measured, cells("c11.{model}.{set}.share_of_gap"))
    recovered = f"{min(gap):.0%} to {max(gap):.0%} in {len(gap)} cells" if gap else f"{MISSING} on enough pictures"
    return (
        "Does attention tell how much to prune? At equal FLOPs a predictor fed with attention shares is, against one fed with "
        f"{'; '.join(each)}. Share that it recovers of what knowing each word's need would gain: {recovered}."
    )


def need_sentence(measured: Mapping[str, Any]) -> str:
    """C12: rate and need at the same step, on captions that need the image last."""
    each = per_model(measured, "c12.{model}.late.rate_need_given_step", "+.2f")
    return (
        "Rank correlation of the named rate with the need for the image at the same step, where the need comes last (negative: "
        f"it prunes less where the image is needed): {each}."
    )


def finality_sentence(measured: Mapping[str, Any]) -> str:
    """C13: what final dropping costs."""
    each = [
        f"against {text}, {per_model(measured, f'c13.{{model}}.late.final_against_{kind}', '+.1%')}"
        for kind, text in (("reversible", "dropping that can be undone"), ("reranked", "ranking anew at every step"))
    ]
    return f"CIDEr of final dropping, where the need comes last: {'; '.join(each)}."


def answers_sentence(measured: Mapping[str, Any]) -> str:
    """C10: short answers."""
    names = [f"c10.{model}.{task}.dyrate_minus_original" for model in MODELS for task in TASKS]
    known = {name: Quantity.of(measured[name]).mean for name in names if name in measured}
    worst = min(known, key=lambda name: known[name], default="")
    where = ""
    if worst:
        _, model, task, _ = worst.split(".")
        where = f" Lowest difference: {told(measured, worst, '+.1f', ' points')} on {task}, {model}."
    return f"On the seven short-answer tasks DyRate is, against unpruned, {tally(measured, names)}.{where}"


def budget_sentence(measured: Mapping[str, Any]) -> str:
    """C5: how far the budgets were missed."""
    targets = ("0.5", "0.333", "0.2")
    each = [f"{target}: {per_model(measured, f'c5.{{model}}.t{target}.abs_error_max', '.1%')}" for target in targets]
    return f"FLOPs budgets asked for without a search were missed at worst over seeds by: {'; '.join(each)}."


def latency_sentence(measured: Mapping[str, Any]) -> str:
    """C4: time at batch 1."""
    each = per_model(measured, "c4.{model}.dyrate_end_to_end_ratio", ".3f", ("7b", "13b")).replace("b ", "B ")
    return f"End-to-end time over the unpruned model's at batch 1, LLaVA-1.5's shapes: {each}; n counts runs."


def better_sentence(measured: Mapping[str, Any]) -> str:
    """C15: our own rule."""
    names = cells("c15.{model}.{set}.better_gain")
    known, spent = estimates(measured, names), estimates(measured, cells("c15.{model}.{set}.flops_ratio"))
    if not known or not spent:
        return f"Our own rule at a quarter of the FLOPs: {MISSING} on enough pictures."
    return (
        f"Our own rule, set for a quarter of the FLOPs ({min(spent):.1%} to {max(spent):.1%} spent), changes CIDEr by "
        f"{min(known):+.1%} to {max(known):+.1%} over {len(known)} sets and models; against unpruned it is "
        f"{tally(measured, names)}."
    )


SENTENCES = (
    verdict_sentence, attention_sentence, quality_sentence, need_sentence, finality_sentence, answers_sentence, budget_sentence,
    latency_sentence, better_sentence,
)  # fmt: skip


def abstract(measured: Mapping[str, Any]) -> str:
    """The abstract's results as Markdown: one paragraph a question."""
    return "\n\n".join(sentence(measured) for sentence in SENTENCES)


def extent_line(measured: Mapping[str, Any]) -> str:
    """What there is to judge by: how many of the quantities that the criteria read, and the smallest and largest n."""
    asked = {name for claim in all_claims().values() for name in claim.quantities}
    found = {name: Quantity.of(measured[name]) for name in sorted(asked) if name in measured}
    n = [q.n for q in found.values() if q.lo is not None and q.n is not None]
    rest = f"; their intervals rest on {min(n)} to {max(n)} pictures (of C4 and C6: runs)" if n else ""
    return f"{len(found)} of the {len(asked)} quantities that the criteria read are there{rest}"
