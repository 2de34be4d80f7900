"""Scenes as tasks of lmms-eval: the items of `open_dataset`, scored by the project's own metrics. Needs lmms-eval.

Pictures are rendered when a question is asked, so loading a task takes moments and nothing lies on the disk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from lmms_eval.api.task import ConfigurableMessagesTask

from ..datasets import CaptionDataset, open_dataset
from ..metrics import caption_scores, normalise_answer

SPLIT = "test"  # as lmms-eval calls the one split of these tasks, whatever the scenes' own is
QUESTION_TOKENS, CAPTION_TOKENS = 16, 64

Doc = Mapping[str, Any]


@functools.lru_cache(maxsize=32)
def items(spec: str, n: int, seed: int) -> CaptionDataset:
    """The data set behind a task."""
    return open_dataset(spec, n, seed)


def family(spec: str) -> str:
    """The family or task of a specification: pope for scenes:pope:test."""
    return spec.split(":")[1]


def is_caption(spec: str) -> bool:
    """Whether replies are captions (else short answers)."""
    from .. import scenes

    return family(spec) in scenes.FAMILIES


class ScenesTask(ConfigurableMessagesTask):
    """One scenes data set. The YAML file names it in its metadata: spec, n, seed."""

    def __init__(self, config: dict[str, Any]) -> None:
        about = dict(config.get("metadata") or {})
        self.spec, self.n, self.seed = str(about["spec"]), int(about["n"]), int(about.get("seed", 0))
        longest = CAPTION_TOKENS if is_caption(self.spec) else QUESTION_TOKENS
        made = aggregations(self.spec, self.n, self.seed)
        metrics = [{"metric": name, "aggregation": fn, "higher_is_better": True} for name, fn in made.items()]
        names = tuple(made)
        super().__init__(
            config={
                "task": config["task"], "dataset_path": self.spec, "test_split": SPLIT, "output_type": "generate_until",
                "doc_to_visual": functools.partial(_picture, self.spec, self.n, self.seed), "doc_to_text": "prompt",
                "doc_to_target": "target", "process_results": functools.partial(_result, names), "metric_list": metrics,
                # no stop strings: a reply ends with the model's end token, as in the project's own harness
                "generation_kwargs": {"max_new_tokens": longest, "do_sample": False, "temperature": 0, "until": []},
                "metadata": {"version": 1.0, **about},
            }
        )  # fmt: skip

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """The texts as a table; nothing comes over a network."""
        rows = [
            {
                "number": i,
                "id": item.id,
                "prompt": item.prompt,
                "references": item.references,
                "target": item.references[0],
            }
            for i, item in enumerate(items(self.spec, self.n, self.seed))
        ]
        self.dataset = datasets.DatasetDict({SPLIT: datasets.Dataset.from_list(rows)})
        self.dataset_no_image = self.dataset


def _picture(spec: str, n: int, seed: int, doc: Doc) -> list[Any]:
    return [items(spec, n, seed)[int(doc["number"])].image]


def _result(names: Sequence[str], doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    row = {"number": int(doc["number"]), "id": doc["id"], "reply": results[0], "references": list(doc["references"])}
    return dict.fromkeys(names, row)


# ------------------------------------------------------------------------------------------------------------ metrics


def aggregations(spec: str, n: int, seed: int) -> dict[str, Callable[[list[dict[str, Any]]], float]]:
    """Metric names and what makes them of all rows of a task; on the scale of the project's own tables (x 100)."""
    if is_caption(spec):
        return {"CIDEr": _caption("cider"), "BLEU-4": _caption("bleu4"), "ROUGE-L": _caption("rouge_l")}
    if family(spec) == "questions":
        return {"exact_match": _exact}
    from ..task_metrics import METRICS

    return {METRICS[family(spec)].headline.replace(" ", "_"): functools.partial(_task, spec, n, seed)}


def _caption(which: str) -> Callable[[list[dict[str, Any]]], float]:
    def score(rows: list[dict[str, Any]]) -> float:
        scores = caption_scores({r["id"]: r["reply"] for r in rows}, {r["id"]: r["references"] for r in rows})
        return float(getattr(scores, which))

    return score


def _exact(rows: list[dict[str, Any]]) -> float:
    hits = [normalise_answer(r["reply"]) in {normalise_answer(text) for text in r["references"]} for r in rows]
    return 100.0 * math.fsum(hits) / len(hits)


def _task(spec: str, n: int, seed: int, rows: list[dict[str, Any]]) -> float:
    from ..task_metrics import score_task

    data = items(spec, n, seed)
    asked = [data[number] for number in sorted({r["number"] for r in rows})]
    return float(score_task(family(spec), {r["id"]: r["reply"] for r in rows}, asked).score)
