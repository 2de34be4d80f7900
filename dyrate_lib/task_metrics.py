"""The seven short-answer tasks' metrics, each by its benchmark's protocol, with intervals over pictures.

    scores = score_task("pope", {item.id: reply, ...}, dataset)
    scores.score, scores.interval(), scores.parts["adversarial F1"]
    paired(pruned, unpruned)            # difference, lo, hi: the same resamples for both

A score is a function of sums over pictures, so that F1, CircularEval and MME's points are resampled as they are defined.
Scores are in percent; MME's in points, 200 a category.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .answers import normalise_vqa, option_letter, same_but_case, soft_accuracy, yes_or_no
from .datasets import Item
from .errors import InputError
from .scenes.tasks import PROMPTS_A_PICTURE, base_task
from .stats import bootstrap_sums

__all__ = [
    "METRICS", "Metric", "TaskScores", "normalise_vqa", "option_letter", "paired", "same_but_case", "score_task", "soft_accuracy",
    "yes_or_no",
]  # fmt: skip

POPE_SETTINGS = ("random", "popular", "adversarial")
Answered = list[tuple[Item, str]]  # a picture's prompts with their replies


@dataclass(frozen=True)
class Metric:
    """How a task is scored.

    headline: name of the main figure. collect: statistics of pictures, float64 [pictures, k]. of: the main figure as a
    function of their sums, [.., k] -> [..]. parts: the other figures by name.
    """

    headline: str
    collect: Callable[[Sequence[Answered]], np.ndarray]
    of: Callable[[np.ndarray], np.ndarray]
    parts: Callable[[Sequence[Answered], np.ndarray], dict[str, float]]


@dataclass(frozen=True, eq=False)
class TaskScores:
    """Scores of one model on one task.

    score: the headline figure, percent or points. parts: others by name (see `METRICS`). ids: pictures, sorted. sums: float64
    [pictures, k], what each picture adds to the statistics that `of` makes the headline figure of.
    """

    task: str
    headline: str
    score: float
    parts: dict[str, float]
    ids: tuple[str, ...]
    sums: np.ndarray = field(repr=False)

    def of(self, sums: np.ndarray) -> np.ndarray:
        """The headline figure of summed statistics: [.., k] -> [..]."""
        return METRICS[self.task].of(np.asarray(sums, dtype=np.float64))

    def interval(self, n: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
        """(lo, hi): percentile bootstrap over pictures. Raises InputError for n below 1 or a level outside (0, 1)."""
        return _quantiles(self.of(bootstrap_sums(self.sums, n, seed)), level)


def paired(
    a: TaskScores, b: TaskScores, n: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """The headline figure of `a` minus that of `b`, with its bootstrap interval over the same resampled pictures: (d, lo, hi).

    Raises:
        InputError: other tasks or other pictures; n below 1 or a level outside (0, 1).
    """
    if a.task != b.task:
        raise InputError(f"scores of {a.task} and of {b.task} have no difference: compare two models on one task")
    if a.ids != b.ids or a.sums.shape != b.sums.shape:
        raise InputError(
            f"paired scores must come from the same pictures: {len(a.ids)} and {len(b.ids)}, of which "
            f"{len(set(a.ids) & set(b.ids))} are in both; score both on one data set"
        )
    lo, hi = _quantiles(a.of(bootstrap_sums(a.sums, n, seed)) - b.of(bootstrap_sums(b.sums, n, seed)), level)
    return a.score - b.score, lo, hi


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, not {level}")
    lo, hi = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def score_task(task: str, replies: Mapping[str, str], items: Sequence[Item]) -> TaskScores:
    """Scores replies to a task's data set.

    Args:
        task: one of `METRICS`. replies: item id -> reply as generated. items: of `open_dataset("scenes:TASK:SPLIT")`, all prompts
            of every picture.

    Raises:
        InputError: an unknown task, no items, items of another task, missing or extra replies, a picture without all its
            prompts.
    """
    if task not in METRICS:
        raise InputError(f"unknown task {task!r}: choose one of {', '.join(METRICS)}")
    metric, pictures = METRICS[task], _pictures(task, replies, list(items))
    groups = [pictures[picture] for picture in sorted(pictures)]
    sums = metric.collect(groups)
    score = float(metric.of(sums.sum(axis=0)))
    parts = {metric.headline: score} | metric.parts(groups, sums)
    return TaskScores(task, metric.headline, score, parts, tuple(sorted(pictures)), sums)


def _pictures(task: str, replies: Mapping[str, str], items: Sequence[Item]) -> dict[str, Answered]:
    """The items and their replies by picture, all checked."""
    if not items:
        raise InputError("there is nothing to score: no items")
    strange = [item.id for item in items if item.meta.get("family") != task]
    if strange:
        raise InputError(f"{strange[0]!r} is no item of {task}: take those of open_dataset('scenes:{task}:SPLIT', n)")
    ids = {item.id for item in items}
    if len(ids) != len(items):
        raise InputError(f"{len(items)} items have {len(ids)} ids: give each item once")
    missing, extra = sorted(ids - set(replies)), sorted(map(str, set(replies) - ids))
    if missing or extra:
        raise InputError(
            f"there must be one reply for each item: {len(missing)} items without a reply {missing[:3]}, "
            f"{len(extra)} replies without an item {extra[:3]}"
        )
    pictures: dict[str, Answered] = {}
    for item in items:
        if not isinstance(replies[item.id], str):
            raise InputError(f"the reply to {item.id!r} must be a string, not {type(replies[item.id]).__name__}")
        pictures.setdefault(item.meta["picture"], []).append((item, replies[item.id]))
    wanted = PROMPTS_A_PICTURE[base_task(task)]
    for picture, asked in pictures.items():
        if len(asked) != wanted:
            raise InputError(
                f"picture {picture!r} has {len(asked)} of its {wanted} prompts: {task} is scored by whole pictures, take a "
                f"number of items that is a multiple of {wanted}"
            )
    return pictures


# ------------------------------------------------------------------------------------------------------------ accuracy


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100.0 * sums[..., 0] / sums[..., -1]


def _accuracy(headline: str, judge: Callable[[Item, str], float]) -> Metric:
    """One prompt a picture: statistics are (score, 1); `parts` by category, for VizWiz the type of its answer."""

    def collect(groups: Sequence[Answered]) -> np.ndarray:
        return np.array([[judge(*asked[0]), 1.0] for asked in groups])

    return Metric(headline, collect, _percent, _by_category)


def _by_category(groups: Sequence[Answered], sums: np.ndarray) -> dict[str, float]:
    rows = _rows(groups)
    return {category: float(_percent(sums[chosen].sum(axis=0))) for category, chosen in rows.items()}


def _rows(groups: Sequence[Answered]) -> dict[str, list[int]]:
    """Which pictures are of each category, categories in alphabetical order."""
    found: dict[str, list[int]] = {}
    for row, asked in enumerate(groups):
        found.setdefault(str(asked[0][0].meta["category"]), []).append(row)
    return dict(sorted(found.items()))


def _same(item: Item, reply: str) -> float:
    return float(same_but_case(reply, item.references[0]))


def _soft(item: Item, reply: str) -> float:
    return soft_accuracy(reply, item.references)


def _letter(item: Item, reply: str) -> float:
    return float(option_letter(reply, item.meta["options"]) == item.references[0])


def _yes_no(item: Item, reply: str) -> float:
    return float(yes_or_no(reply) == item.references[0])


# ------------------------------------------------------------------------------------------- several prompts a picture


def _by_part(asked: Answered) -> dict[str, tuple[Item, str]]:
    return {str(item.meta["part"]): (item, reply) for item, reply in asked}


def _pope_collect(groups: Sequence[Answered]) -> np.ndarray:
    """(right yes, false yes of random, popular, adversarial, 1). What is neither yes nor no counts as no."""
    rows = []
    for asked in groups:
        said = {part: yes_or_no(reply) == "yes" for part, (_, reply) in _by_part(asked).items()}
        rows.append([said["yes"], *(said[setting] for setting in POPE_SETTINGS), 1.0])
    return np.array(rows, dtype=np.float64)


def _pope_f1(sums: np.ndarray) -> np.ndarray:
    """The mean of the three settings' F1 of 'yes', in percent: 2 TP / (2 TP + FP + FN), with TP + FN the pictures."""
    right, false, n = sums[..., :1], sums[..., 1:4], sums[..., 4:]
    return 100.0 * (2 * right / (right + false + n)).mean(axis=-1)


def _pope_parts(groups: Sequence[Answered], sums: np.ndarray) -> dict[str, float]:
    """accuracy, precision, recall, F1 and yes-rate: means over the settings, then of each. Precision without any yes is 0."""
    right, *false, n = sums.sum(axis=0).tolist()
    settings = {
        setting: {
            "accuracy": 100.0 * (right + n - wrong) / (2 * n),
            "precision": 100.0 * right / (right + wrong) if right + wrong else 0.0,
            "recall": 100.0 * right / n,
            "F1": 100.0 * 2 * right / (right + wrong + n),
            "yes-rate": 100.0 * (right + wrong) / (2 * n),
        }
        for setting, wrong in zip(POPE_SETTINGS, false, strict=True)
    }
    means = {name: sum(found[name] for found in settings.values()) / 3 for name in settings["random"]}
    return means | {f"{setting} {name}": value for setting, found in settings.items() for name, value in found.items()}


def _mmbench_collect(groups: Sequence[Answered]) -> np.ndarray:
    """(right in all four rotations, in rotation 0, number of rotations right, 1)."""
    rows = []
    for asked in groups:
        right = {part: _letter(item, reply) for part, (item, reply) in _by_part(asked).items()}
        rows.append([min(right.values()), right["0"], sum(right.values()), 1.0])
    return np.array(rows)


def _mmbench_parts(groups: Sequence[Answered], sums: np.ndarray) -> dict[str, float]:
    """vanilla accuracy (each question once), that of all prompts, and circular accuracy by ability."""
    _, vanilla, right, n = sums.sum(axis=0).tolist()
    others = {"vanilla accuracy": 100.0 * vanilla / n, "accuracy of all rotations": 100.0 * right / (4 * n)}
    return others | _by_category(groups, sums)


def _mme_collect(groups: Sequence[Answered]) -> np.ndarray:
    """For each category, in alphabetical order: (prompts right, both right, 1) of its pictures, zeros of others."""
    rows = _rows(groups)
    sums = np.zeros((len(groups), len(rows), 3))
    for k, chosen in enumerate(rows.values()):
        for row in chosen:
            right = [_yes_no(item, reply) for item, reply in groups[row]]
            sums[row, k] = sum(right), min(right), 1.0
    return sums.reshape(len(groups), -1)


def _mme_points(sums: np.ndarray) -> np.ndarray:
    """[.., categories, 2]: acc and acc+ in percent of each category; NaN where a resample has no picture of it."""
    table = sums.reshape(*sums.shape[:-1], -1, 3)
    with np.errstate(invalid="ignore"):
        return 100.0 * table[..., :2] / (table[..., 2:] * np.array([2.0, 1.0]))


def _mme_total(sums: np.ndarray) -> np.ndarray:
    """The sum over categories of acc + acc+, points. A category that a resample misses counts as the mean of the others."""
    each = _mme_points(sums).sum(axis=-1)
    return np.nanmean(each, axis=-1) * each.shape[-1]


def _mme_parts(groups: Sequence[Answered], sums: np.ndarray) -> dict[str, float]:
    """Of each category its points, acc and acc+."""
    found: dict[str, float] = {}
    for category, (acc, plus) in zip(_rows(groups), _mme_points(sums.sum(axis=0)).tolist(), strict=True):
        found |= {category: acc + plus, f"{category} acc": acc, f"{category} acc+": plus}
    return found


_TEXTVQA = _accuracy("soft accuracy", _soft)
METRICS: dict[str, Metric] = {
    "gqa": _accuracy("accuracy", _same),
    "vizwiz": _accuracy("soft accuracy", _soft),
    "scienceqa": _accuracy("accuracy", _letter),
    "textvqa": _TEXTVQA,
    "textvqa-ocr": _TEXTVQA,
    "pope": Metric("F1", _pope_collect, _pope_f1, _pope_parts),
    "mmbench": Metric("circular accuracy", _mmbench_collect, _percent, _mmbench_parts),
    "mme": Metric("acc + acc+", _mme_collect, _mme_total, _mme_parts),
}
