"""A study whose records of controls are made up: what each predictor is worth is planted, so that the numbers must find it.

Replies are references, so their needs are known. Quality is a picture's own, plus noise, less what saving FLOPs costs, plus what
is planted for the method.
"""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any

import numpy as np

from dyrate_lib.datasets import open_dataset
from dyrate_lib.evaluate import describe, predictor_hash
from dyrate_lib.experiments import controls_training, equal_cost, generality, open_study
from dyrate_lib.methods import DyRate, MergeRate, RatePath, RelookRate
from dyrate_lib.scenes import image_need, reply_needs
from dyrate_lib.scenes.captions import split_words

FAMILY = {"short": "short", "narrative": "narrative", "late": "late"}
SLOPE = 400.0  # CIDEr a unit of the FLOPs ratio, on the made-up curve of constant rates


class MadeUp:
    """Answers a study's calls for records. gains: CIDEr above a constant rate of the same cost, by what is done (see `kind`)."""

    def __init__(self, study: Any, gains: dict[str, float], costs: dict[str, float], spread: float = 20.0) -> None:
        self.study, self.gains, self.costs, self.spread = study, gains, costs, spread
        self.recipes: dict[str, dict[str, Any]] = {}  # of predictors, by hash
        self.made: dict[Any, dict[str, Any]] = {}
        study.captions, study.per_picture, study.record, study.scores = self.captions, self.per_picture, self.record, self.scores

    def captions(self, key: str, role: str, method: Any = None, n: int | None = None, **_: Any) -> dict[str, Any]:
        return self._replies(key, role, self.kind(method), json.dumps(describe(method), sort_keys=True), n, method)

    def per_picture(self, key: str, role: str, factory: Any, config: Any, n: int | None = None) -> dict[str, Any]:
        return self._replies(key, role, config["method"], json.dumps(dict(config), sort_keys=True), n, factory)

    def kind(self, method: Any) -> str:
        """A name for `gains`: original, constant, step, a method of ours, or what the predictor is fed with and how it drops."""
        if isinstance(method, RatePath):
            return "constant" if len(method.rates) == 1 else "step"
        if isinstance(method, RelookRate):
            return "relook"
        if isinstance(method, MergeRate):
            return "merge" if method.weigh and method.spread else "merge in part"
        if not isinstance(method, DyRate):
            return "original"
        if method.reversible:
            return "reranked" if method.rank == "step" else "reversible"
        recipe = self.recipes[predictor_hash(method.predictor)]
        return "lagrangian" if recipe["constraint"] == "lagrangian" else recipe["inputs"]

    def _replies(self, key: str, role: str, kind: str, told: str, n: int | None, method: Any) -> dict[str, Any]:
        place = (self.study.seed, key, role, told, n)
        if place not in self.made:
            self.made[place] = self._made(key, role, kind, told, n, method)
        return self.made[place]

    def _made(self, key: str, role: str, kind: str, told: str, n: int | None, method: Any) -> dict[str, Any]:
        dataset, info = self.study.dataset(role, n), self.study.info(key)
        whole, rows = {"original": 1.0}.get(kind), []
        seed = int(hashlib.sha256(f"{key} {role} {told}".encode()).hexdigest()[:8], 16)
        random = np.random.default_rng(seed)
        easy = np.random.default_rng(7).normal(0, 100, len(dataset))  # how hard a picture is, whatever is done
        quality = 800 + easy + random.normal(0, self.spread, len(dataset))
        for i, item in enumerate(dataset):
            words = split_words(item.references[0])
            steps = len(words) + 1
            if whole:
                course = [0.0]
            elif kind == "oracle":
                course = method([i]).rates[0]
            elif kind in ("constant", "step"):
                course = list(method.rates)
            else:
                need = np.nan_to_num(image_need(reply_needs(words, FAMILY.get(item.meta["family"], "short"))))
                course = np.maximum.accumulate(0.72 + 0.2 * (1 - need) * np.linspace(0.2, 1, steps)).tolist()
            kept = [576 - int(np.floor(course[min(t, len(course) - 1)] * 576 + 1e-9)) for t in range(steps)]
            cost = 1.0 if whole else self.costs.get(kind) or equal_cost.course_cost(info, [(620, 576, steps)], [course], 2)
            if kind == "oracle":
                kept = np.minimum.accumulate(kept).tolist()
            rows.append(
                {"id": item.id, "text": item.references[0], "tokens": list(range(steps)), "steps": steps, "kept": kept,
                 "prompt_length": 620, "n_image": 576, "flops": {"paper": cost, "cached": 0.5 + cost / 2}}
            )  # fmt: skip
        cost = float(np.mean([row["flops"]["paper"] for row in rows]))
        if not whole:
            quality = quality - SLOPE * (1 - cost) + self.gains.get(kind, 0.0)
        return {"payload": rows, "config": {}, "quality": quality, "provenance": {}}

    def scores(self, record: Any, role: str) -> Any:
        return SimpleNamespace(per_image_cider=record["quality"])

    def record(self, name: str, config: Any, fn: Any, *, models: Any = (), **_: Any) -> dict[str, Any]:
        if name in ("training", "controls/training"):
            return self._trained(config, models)
        if name == "controls/named":
            return {"payload": self._named(config["data"], self.recipes[config["predictor"]])}
        if name == "schedules":
            reached = np.random.default_rng(len(str(config))).normal(0.335, 0.01, 40)
            return {"payload": [{"flops": {"paper": float(x)}} for x in reached]}
        if name == "controls/scenes":  # no picture is rendered
            random = np.random.default_rng(1)
            seen = [(int(random.integers(1, 10)), float(random.random())) for _ in range(config["n"])]
            return {"payload": [{"id": str(i), "objects": a, "clutter": b} for i, (a, b) in enumerate(seen)]}
        place = f"{name} {config}"
        if place not in self.made:
            self.made[place] = {"payload": fn()}
        return self.made[place]

    def _trained(self, config: Any, models: Any) -> dict[str, Any]:
        fed = config.get("inputs", "shares")
        named = [self.study.model_name(key) for key in models]
        told = {"inputs": fed, "constraint": "penalty", "n_rates": 20, **config, "models": named}
        random = np.random.default_rng(len(json.dumps(told, sort_keys=True)) + 1000 * config["seed"])
        width = {"step": 64, "none": 0, "hidden": 8, "oracle": 6}.get(fed, 24)
        n = told["n_rates"]
        weight = random.normal(0, 0.1, (n, width))
        if fed == "step":  # rises over steps
            weight = 5.0 * (np.arange(n)[:, None] == np.clip(n // 2 + np.arange(64) // 10, 0, n - 1))
        if fed == "oracle":  # little where the image is needed, much where not
            weight = 5.0 * (np.arange(n)[:, None] == np.array([18, 14, 18, 14, 18, 14])[None] * n // 20)
        steps = np.arange(200)
        wave = 0.05 * np.exp(-steps / 60) * np.cos(steps / 12 + config["seed"]) + 0.002 * (told["constraint"] == "penalty")
        history = [
            {"step": int(t), "loss": 1.0, "ce": 1.0, "flops_ratio": config["target"] + float(w), "hard_ratio": config["target"],
             "tau": 1.0, **({"mu": 5 - 5 * float(np.exp(-t / 50))} if told["constraint"] == "lagrangian" else {})}
            for t, w in zip(steps, wave, strict=True)
        ]  # fmt: skip
        bias = random.normal(0, 0.01, n).tolist()
        payload: dict[str, Any] = {"history": history, "weight": weight.tolist(), "bias": bias, "n_heads": 6}
        if fed == "foreign":
            import base64

            shares = random.random((2, 4, 6, 4)).astype(np.float16)
            payload |= {"bank": base64.b64encode(shares.tobytes()).decode(), "bank_shape": [2, 4, 6, 4], "bank_keys": ["1", "-5"]}
        record = {"payload": payload, "config": told, "provenance": {}}
        self.recipes[predictor_hash(controls_training.predictor(record))] = told
        return record

    def _named(self, data: dict[str, Any], recipe: dict[str, Any]) -> list[list[int]]:
        """High rates where the image is not needed, with some noise that is not the step's."""
        dataset = open_dataset(data["name"], data["n"], data["seed"])
        random, top = np.random.default_rng(recipe["seed"]), recipe["n_rates"] - 1
        out = []
        for item in dataset:
            need = np.nan_to_num(image_need(reply_needs(item.references[0], item.meta["family"])))
            out.append(np.clip(top - 0.5 * top * need - random.integers(0, 3, need.size), 0, top).astype(int).tolist())
        return out


def made_up(
    out: str, gains: dict[str, float], costs: dict[str, float] | None = None, n: int = 40, seed: int = 0, spread: float = 20.0,
    **scale: Any,
) -> Any:  # fmt: skip
    """A study of both shipped models whose records are made up (nothing is loaded), at full scale but for n and `scale`."""
    import dataclasses

    study = open_study("controls", scale="full", records="fresh", out=out, seed=seed, progress=False)
    study.scale = dataclasses.replace(study.scale, **{"n_controls": n, "bootstrap": 200, "control_steps": 100, **scale})
    MadeUp(study, gains, costs or {}, spread)
    elsewhere = generality.place(study, generality.CONDITIONS["other scenes"])  # remembered, as another study
    MadeUp(elsewhere, gains, costs or {}, spread)
    return study
