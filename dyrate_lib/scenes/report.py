"""Notebook 00's view of the VLMs: how they were trained, and what they score on held-out pictures."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .. import paths
from ..plotting import BLACK, FAMILY_COLORS, GREEN, WIDTH_PAGE
from .questions import QUESTION_KINDS
from .score import split_references

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..experiments import Study

TARGET = 0.9  # of what one reference scores against the others: the aim set for unpruned captions of `short`
SMOKE_STEPS, SMOKE_BATCH = 10, 1
SIZE_OF = {"scenes-small": "small", "scenes-base": "base"}
KIND_COLORS = {**FAMILY_COLORS, "question": GREEN}
Record = dict[str, Any]


def shipped(study: Study) -> list[str]:
    """Model keys of the study that are the project's own scenes VLMs."""
    return [k for k in study.keys if Path(study.model_name(k)).name in SIZE_OF]


def _folder(study: Study, key: str) -> Path:
    return paths.checkpoints() / Path(study.model_name(key)).name


def card_numbers(study: Study, key: str) -> dict[str, Any]:
    """`metrics.json` of a shipped checkpoint. Raises ResourceError if it is missing."""
    from ..errors import ResourceError

    file = _folder(study, key) / "metrics.json"
    if not file.is_file():
        raise ResourceError(f"{file} is missing: get a full checkout, or train anew (python -m dyrate_lib.scenes.train)")
    return json.loads(file.read_text(encoding="utf-8"))


def sizes_table(study: Study) -> pd.DataFrame:
    """Layers, widths, parameters and bytes of the shipped models."""
    from .vlm import SIZES

    rows = []
    for key in shipped(study):
        s, numbers = SIZES[SIZE_OF[Path(study.model_name(key)).name]], card_numbers(study, key)
        weights = sum(p.stat().st_size for p in _folder(study, key).glob("*.safetensors"))
        rows.append({
            "model": s.name,
            "role": {"small": "7B", "base": "13B"}[key],
            "vision tower": f"{s.vision_layers} layers x {s.vision_width}, MLP {s.vision_mlp}",
            "language model": f"{s.layers} layers x {s.width}, MLP {s.mlp}, {s.width // 32} heads",
            "image tokens": 576,
            "parameters, M": numbers["parameters"] / 1e6,
            "weights, MB": weights / 1e6,
        })  # fmt: skip
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------- training


def trains_anew(study: Study, seconds: float) -> bool:
    """Whether this study trains: at smoke scale always (a few steps, as a proof), at full scale with fresh records.

    `seconds` of 0 at full scale asks for the shipped training log instead.
    """
    return study.scale.name == "smoke" or (study.records == "fresh" and seconds > 0)


def training(study: Study, seconds: float = 530.0) -> dict[str, Record]:
    """Training record by model key: made anew where :func:`trains_anew` says so; otherwise read from the checkpoint.

    At smoke scale the smaller model alone takes a few steps. At full scale training takes `seconds` a size on a GPU,
    with its evaluation; the checkpoint is left in `<out>/checkpoints`. Later notebooks go on with the shipped weights.

    Raises:
        ResourceError: full scale and fresh records without a GPU.
    """
    keys = shipped(study)[:1] if study.scale.name == "smoke" else shipped(study)
    return {key: _training(study, key, seconds) for key in keys}


def _training(study: Study, key: str, seconds: float) -> Record:
    if not trains_anew(study, seconds):
        numbers = card_numbers(study, key)
        log = (_folder(study, key) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        made = {**numbers["provenance"], "seconds": numbers["train_seconds"], "dtype": "bfloat16"}
        return {"payload": {**numbers, "history": [json.loads(line) for line in log]}, "provenance": made}
    size = SIZE_OF[Path(study.model_name(key)).name]
    if study.scale.name == "smoke":
        config = {"size": size, "steps": SMOKE_STEPS, "batch": SMOKE_BATCH}
        return study.record("00_scenes_vlm/training", config, lambda: _few_steps(size), about={"dtype": "float32"})
    out = study.out / "checkpoints" / f"scenes-{size}"
    return study.record(
        "00_scenes_vlm/training", {"size": size, "budget_seconds": seconds}, lambda: _full_training(size, out, seconds),
        about={"dtype": "bfloat16"},
    )  # fmt: skip


def _few_steps(size: str) -> dict[str, Any]:
    from .train import Recipe, train

    recipe = Recipe(size=size, steps=SMOKE_STEPS, batch=SMOKE_BATCH, slots=("short",))
    found = train(recipe, device="cpu", log_every=1, validate_every=10**9, say=lambda _: None)
    return {"history": found.history, "steps": found.steps, "ms_per_step": found.ms_per_step}


def _full_training(size: str, out: Path, seconds: float) -> dict[str, Any]:
    import torch

    from ..errors import ResourceError
    from .train import main

    if not torch.cuda.is_available():
        raise ResourceError("training at full scale needs a GPU: use scale='smoke', or records='committed'")
    started = time.monotonic()
    main(["--size", size, "--out", str(out), "--budget-seconds", str(seconds)])
    numbers = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    log = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {**numbers, "history": [json.loads(line) for line in log], "wall_seconds": round(time.monotonic() - started, 1)}


def draw_training(records: dict[str, Record], labels: dict[str, str]) -> Figure:
    """Loss by kind of response over the steps, one panel a size."""
    fig, axes = plt.subplots(1, max(1, len(records)), figsize=(WIDTH_PAGE, 2.2), sharey=True, squeeze=False)
    for ax, (key, record) in zip(axes[0], records.items(), strict=False):
        history = record["payload"]["history"]
        steps = [line["step"] for line in history]
        for kind, color in KIND_COLORS.items():
            values = [line[kind] for line in history]
            if any(values):
                ax.plot(steps, values, color=color, label=kind)
        ax.plot(steps, [line["cls"] for line in history], color=BLACK, ls=":", label="CLS token", lw=0.9)
        ax.set(title=labels[key], xlabel="step", yscale="log")
    axes[0][0].set_ylabel("cross-entropy, nats a token")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    return fig


def training_table(records: dict[str, Record], labels: dict[str, str]) -> pd.DataFrame:
    """Steps, time and first and last losses."""
    rows = []
    for key, record in records.items():
        history = record["payload"]["history"]
        first, last = history[0], history[-1]
        row = {"model": labels[key], "steps": last["step"], "seconds": last["seconds"], "ms a step": last["ms_per_step"]}
        for kind in KIND_COLORS:
            row[f"{kind}, first"], row[f"{kind}, last"] = first[kind] or None, last[kind] or None
        rows.append(row)
    return pd.DataFrame(rows)


def training_line(records: dict[str, Record]) -> str:
    """Whether the loss of short captions fell, by numbers."""
    parts = []
    for key, record in records.items():
        history = record["payload"]["history"]
        first, last = history[0]["short"], history[-1]["short"]
        fell = "falls" if last < first else "does not fall"
        parts.append(f"{key}: loss on short captions {fell} from {first:.3f} to {last:.3f} in {history[-1]['step']} steps")
    return "; ".join(parts) if parts else "no scenes model among the models of this run, so nothing is trained here"


def accuracy_table(records: dict[str, Record], labels: dict[str, str]) -> pd.DataFrame:
    """Right next tokens on `val` pictures (teacher forcing), %, at the last validation of the training."""
    names = {"need_image": "needs image", "need_response": "needs response", "need_none": "needs neither"}
    rows = []
    for key, record in records.items():
        scores: dict[str, float] = next((h["val"] for h in reversed(record["payload"]["history"]) if "val" in h), {})
        shown = {names.get(k, k): 100 * v for k, v in scores.items() if k != "question"}
        rows.append({"model": labels[key], **shown})
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------------------------------- scores


def replies(study: Study) -> dict[tuple[str, str], Record]:
    """Unpruned greedy replies of every model to every set: the same records as notebook 03's first rows."""
    return {(key, role): study.captions(key, role) for key in study.keys for role in (*study.roles, "questions")}


def _against_others(study: Study, record: Record, role: str) -> dict[str, list[float]]:
    """CIDEr per picture of replies, and of the references they follow, against the other references; kept in the store."""
    from ..metrics import caption_scores
    from ..store import get_or_run

    said = {entry["id"]: entry["text"] for entry in record["payload"]}
    dataset = study.dataset(role, len(said))

    def fn() -> dict[str, Any]:
        followed, others = split_references(said, dataset.references())
        found = {"reply": caption_scores(said, others), "followed": caption_scores(followed, others)}
        return {k: [round(v, 6) for v in s.per_image_cider.tolist()] for k, s in found.items()}

    digest = hashlib.sha256(json.dumps(sorted(said.items())).encode()).hexdigest()
    config = {"predictions": digest, "data": dataset.identity, "references": "without the wording followed"}
    return get_or_run("scores", config, fn, store=study.scores_store)["payload"]


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def caption_table(study: Study, records: dict[tuple[str, str], Record]) -> pd.DataFrame:
    """CIDEr of each model and set with its interval, beside what references score.

    Columns: CIDEr with its interval; one reference (leave one out); ratio of the two; then the replies and the references
    whose wording they follow, scored alike against the other wordings, and the ratio of these (`like for like`).
    """
    from ..experiments import ROLE_LABELS

    rows = []
    for (key, role), record in records.items():
        if role == "questions":
            continue
        scores, one = study.scores(record, role), study.reference_scores(role, len(record["payload"]))
        low, high = scores.interval(study.scale.bootstrap)
        alike = {k: float(np.mean(v)) for k, v in _against_others(study, record, role).items()}
        rows.append({
            "model": study.label(key), "set": ROLE_LABELS[role] if study.on_scenes else study.data.partition(":")[0],
            "n": len(scores.ids), "CIDEr": scores.cider, "interval": f"{low:.1f} to {high:.1f}",
            "one reference": one.cider, "ratio": _ratio(scores.cider, one.cider),
            "reply, other wordings": alike["reply"], "reference followed, likewise": alike["followed"],
            "like for like": _ratio(alike["reply"], alike["followed"]), "role": role, "key": key,
        })  # fmt: skip
    return pd.DataFrame(rows)


def question_table(study: Study, records: dict[tuple[str, str], Record]) -> pd.DataFrame:
    """Exact match by kind of question, %, with bootstrap intervals over questions."""
    from ..metrics import exact_match
    from ..stats import bootstrap_interval

    rows = []
    for (key, role), record in records.items():
        if role != "questions":
            continue
        said = {entry["id"]: entry["text"] for entry in record["payload"]}
        dataset = study.dataset(role, len(said))
        right = exact_match(said, dataset.references())
        kinds = {item.id: item.meta["kind"] for item in dataset}
        for kind in ("all", *QUESTION_KINDS):
            values = [100.0 * r for i, r in right.items() if kind in ("all", kinds[i])]
            if values:
                low, high = bootstrap_interval(values, study.scale.bootstrap)
                given = [item.references[0] for item in dataset if item.id in right and kind == item.meta["kind"]]
                rows.append({"model": study.label(key), "kind": kind, "n": len(values), "right %": float(np.mean(values)),
                             "low": low, "high": high, "guessing %": _guessing(kind, given)})  # fmt: skip
    return pd.DataFrame(rows)


def _guessing(kind: str, answers: list[str]) -> float | None:
    """What guessing scores, %: one of two for existence and relation, else always the most frequent answer."""
    if kind in ("existence", "relation"):
        return 50.0
    return 100.0 * max(map(answers.count, answers)) / len(answers) if answers else None


def guessing_line(table: pd.DataFrame) -> str:
    """Which kinds of question are not answered better than by guessing."""
    asked = table[table.kind != "all"].to_dict("records")
    weak = [f"{row['kind']} ({row['model']})" for row in asked if row["low"] <= row["guessing %"]]
    if not weak:
        return "Questions: every kind is answered better than by guessing"
    return "Questions not answered better than by guessing: " + ", ".join(weak)


def target_line(study: Study, table: pd.DataFrame) -> str:
    """The stable verdict on the aim for unpruned captions."""
    parts = []
    for row in table[table.role == "coco"].to_dict("records"):
        ratios = [float("nan") if row[k] is None else row[k] for k in ("ratio", "like for like")]
        met = "meets" if min(ratios) >= TARGET else "misses"
        parts.append(f"{row['key']} {met} it: {100 * ratios[0]:.0f} %, like for like {100 * ratios[1]:.0f} % (n = {row['n']})")
    aim = f"aim {100 * TARGET:.0f} % of one reference's CIDEr against the others"
    return f"Unpruned captions of held-out pictures, {aim}: " + "; ".join(parts)
