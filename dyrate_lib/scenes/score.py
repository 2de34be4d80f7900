"""Scores of a trained scenes VLM on held-out scenes, and its model card."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..prompts import chat_prompt
from .captions import FAMILIES, PROMPTS, references
from .card import card
from .data import normalise
from .looks import render_looks
from .packing import layout
from .questions import QUESTION_KINDS, Question, questions
from .render import pack_scenes
from .tasks import NAMES, PLAIN, Look
from .training_plan import Say
from .world import make_scene


def bootstrap(values, n: int = 1000, seed: int = 0) -> dict:
    """Mean of per-picture values with its 95% percentile bootstrap interval: keys mean, low, high, n."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (n, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


@torch.no_grad()
def answer(
    model, processor, scenes, prompts: list[str], max_new_tokens: int = 64, looks: Sequence[Look] | None = None
) -> list[str]:
    """Greedy answers of the model to one prompt (user text) a scene, through stock ``generate``, in batches.

    ``looks``: one a scene, None: all plain.
    """
    looks = looks or [PLAIN] * len(scenes)
    device, dtype = model.device, model.dtype
    n_image = model.config.image_seq_length
    batch = 250 if device.type == "cuda" else 20
    out: list[str] = []
    for i in range(0, len(scenes), batch):
        texts = [chat_prompt(p).replace("<image>", "<image>" * n_image) for p in prompts[i : i + batch]]
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        pictures = render_looks(*pack_scenes(scenes[i : i + batch]), looks[i : i + batch], device)
        pixels = normalise(pictures).to(dtype)
        ids = model.generate(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=pixels,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        texts = processor.tokenizer.batch_decode(ids[:, tokens.input_ids.shape[1] :], skip_special_tokens=True)
        out += [t.strip() for t in texts]
    return out


def questions_of(kind: str, split: str, n: int) -> list[tuple[int, Question]]:
    """The first n questions of a kind over the split's scenes, as (scene seed, question)."""
    found: list[tuple[int, Question]] = []
    seed = 0
    while len(found) < n:
        found += [(seed, q) for q in questions(make_scene(seed, split)) if q.kind == kind]
        seed += 1
    return found[:n]


def evaluate(model, processor, n: int = 500, give_up: float | None = None, say: Say = print) -> tuple[dict, dict]:
    """Greedy captions and answers on held-out scenes.

    Args:
        n: pictures a caption set, questions a kind.
        give_up: ``time.monotonic()`` value after which no further set is begun (what is left out is named).

    Returns:
        Scores (set name -> mean, low, high, n: share of captions equal to one of their five references, share of right
        answers) and the predictions they come from.
    """
    scores: dict[str, dict] = {}
    predictions: dict[str, list] = {}
    jobs = [("short", "test"), *[(k, "test") for k in QUESTION_KINDS], ("narrative", "test"), ("late", "test")]
    jobs += [("short", "novel"), ("existence", "novel"), ("narrative", "novel"), ("late", "novel")]
    for name, split in jobs:
        label = f"{name}:{split}"
        if give_up is not None and time.monotonic() > give_up:
            say(f"no time left to score {label}")
            continue
        started = time.monotonic()
        if name in FAMILIES:
            seeds = list(range(n))
            scenes = [make_scene(s, split) for s in seeds]
            texts = answer(model, processor, scenes, [PROMPTS[name]] * n)
            right = [t in references(s, name) for t, s in zip(texts, scenes, strict=True)]
        else:
            asked = questions_of(name, split, n)
            scenes = [make_scene(s, split) for s, _ in asked]
            texts = answer(model, processor, scenes, [q.prompt for _, q in asked], max_new_tokens=4)
            right = [t == q.answer for t, (_, q) in zip(texts, asked, strict=True)]
            seeds = [s for s, _ in asked]
        scores[label] = bootstrap(right)
        predictions[label] = [[s, t] for s, t in zip(seeds, texts, strict=True)]
        s = scores[label]
        took = time.monotonic() - started
        say(f"{label}: {s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}] right of {s['n']} ({took:.1f} s)")
    return scores, predictions


def evaluate_tasks(
    model, processor, n: int = 500, give_up: float | None = None, say: Say = print
) -> tuple[dict, dict]:
    """Greedy answers to the short-answer tasks on held-out scenes, scored by their benchmarks' protocols.

    Args:
        n: pictures a task, each with all its prompts.
        give_up: as of :func:`evaluate`.

    Returns:
        Scores (task -> metric, its figure's score, low and high over pictures, n pictures, and parts, the other figures by
        name) and the predictions they come from.
    """
    from ..datasets import open_dataset
    from ..task_metrics import score_task

    scores: dict[str, dict] = {}
    predictions: dict[str, list] = {}
    for name in NAMES:
        if give_up is not None and time.monotonic() > give_up:
            say(f"no time left to score {name}")
            continue
        started = time.monotonic()
        items = list(open_dataset(f"scenes:{name}:test", n))
        scenes, looks = [item.meta["scene"] for item in items], [item.meta["look"] for item in items]
        texts = answer(model, processor, scenes, [item.prompt for item in items], max_new_tokens=4, looks=looks)
        replies = {item.id: text for item, text in zip(items, texts, strict=True)}
        found = score_task(name, replies, items)
        low, high = found.interval()
        scores[name] = {
            "metric": found.headline, "score": found.score, "low": low, "high": high, "n": len(found.ids), "parts": found.parts,
        }  # fmt: skip
        predictions[f"{name}:test"] = [[key, text] for key, text in replies.items()]
        took = time.monotonic() - started
        say(f"{name}: {found.headline} {found.score:.1f} [{low:.1f}, {high:.1f}], {len(found.ids)} pictures ({took:.1f} s)")
    return scores, predictions


def write_predictions(path: Path, predictions: dict) -> None:
    """Deterministic gzip (no time stamp), atomic."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(gzip.compress(json.dumps(predictions, indent=0).encode(), mtime=0))
    os.replace(partial, path)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    os.replace(partial, path)


def finish(out: Path, metrics: dict, *, device, n: int, give_up: float | None, say, ship_to: Path | None) -> None:
    """Score the checkpoint as saved (loaded anew), then write metrics, predictions and card into its folder."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from .checkpoint import ship

    def keep() -> None:
        _write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        write_card(out)
        if ship_to is not None:
            ship(out, ship_to)

    keep()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=dtype).to(device).eval()
    processor = AutoProcessor.from_pretrained(out)
    metrics["scores"], predictions = evaluate(model, processor, n, give_up, say)
    if layout(tuple(metrics["recipe"]["slots"])).tasks:
        write_predictions(out / "predictions.json.gz", predictions)
        keep()
        metrics["tasks"], answers = evaluate_tasks(model, processor, n, give_up, say)
        predictions |= answers
    write_predictions(out / "predictions.json.gz", predictions)
    keep()


def split_references(
    said: dict[str, str], references: dict[str, list[str]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """For each picture the reference whose wording the reply follows, and the other references.

    A reply that repeats a reference word for word would be scored against itself. To see what a reply lacks, it and the
    reference it follows (the longest common beginning in words) are scored alike, against the other references alone.
    """

    def common(a: str, b: str) -> int:
        pairs = zip(a.split(), b.split(), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))

    followed, others = {}, {}
    for i, texts in references.items():
        own = max(range(len(texts)), key=lambda k: common(said[i], texts[k]))
        followed[i] = texts[own]
        others[i] = [t for k, t in enumerate(texts) if k != own] if len(texts) > 1 else texts
    return followed, others


def cider_scores(out: Path) -> dict:
    """CIDEr (x100) of the stored captions, beside what one reference scores against the other four; needs Java.

    Keys by set: cider, low, high; one_reference (leave one out, mean over the five); other_wordings and followed: the
    captions, and the references they follow, against the other references (see :func:`split_references`).
    """
    from ..metrics import caption_scores, leave_one_out_cider

    predictions = json.loads(gzip.decompress((out / "predictions.json.gz").read_bytes()))
    found = {}
    for label, rows in predictions.items():
        family, split = label.split(":")
        if family not in FAMILIES:
            continue
        refs = {str(s): references(make_scene(s, split), family) for s, _ in rows}
        said = {str(s): t for s, t in rows}
        scores = caption_scores(said, refs)
        low, high = scores.interval()
        followed, others = split_references(said, refs)
        found[label] = {
            "cider": scores.cider,
            "low": low,
            "high": high,
            "one_reference": leave_one_out_cider(refs),
            "other_wordings": caption_scores(said, others).cider,
            "followed": caption_scores(followed, others).cider,
        }
    return found


def write_card(out: Path, with_cider: bool = False) -> None:
    """Write ``README.md`` of a checkpoint from its ``metrics.json`` (and add CIDEr to that, where asked)."""
    metrics = json.loads((out / "metrics.json").read_text())
    if with_cider:
        metrics["cider"] = cider_scores(out)
        _write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    _write_text(out / "README.md", card(metrics))
