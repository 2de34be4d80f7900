"""Predictors of the controls: notebook 02's training with one thing changed (what is read, how the budget is held, the variant).

The paper's own predictor is notebook 02's record itself wherever the settings are the same, so that nothing is trained twice.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ..predictor import RatePredictor
from ..training import train_predictor
from ..training_budget import ETA
from . import training_runs
from .context import Record, Study
from .training_runs import BUDGET, LAYER, N_RATES, training_set


@dataclass(frozen=True)
class Recipe:
    """What one predictor is trained with; the defaults are the paper's predictor as notebook 02 trains it.

    inputs, constraint, reversible: as in `train_predictor`. target: FLOPs ratio in the paper's convention. layer: P.
    """

    inputs: str = "shares"
    target: float = BUDGET
    seed: int = 0
    constraint: str = "penalty"
    reversible: bool = False
    layer: int = LAYER
    n_rates: int = N_RATES

    @property
    def in_notebook_02(self) -> bool:
        """Whether notebook 02 trains this kind at its targets."""
        return self == Recipe(target=self.target, seed=self.seed)

    def __str__(self) -> str:
        known = asdict(Recipe())
        return ",".join(f"{name}={value}" for name, value in asdict(self).items() if value != known[name]) or "paper"


def train(study: Study, key: str, recipe: Recipe = Recipe()) -> Record:
    """One trained predictor; payload {history, weight, bias, n_heads}, of "foreign" also {bank, bank_keys}.

    Data, steps, batch and loss are notebook 02's. bank: base64 of float16 [M, S, n_heads, 4], as numbers it would take ten times
    the room.
    """
    scale = study.scale
    if recipe.in_notebook_02 and recipe.target in scale.targets and scale.control_steps == scale.train_steps:
        return training_runs.train(study, key, recipe.target, recipe.seed)
    data = training_set(study)
    settings = {**asdict(recipe), "steps": scale.control_steps, "batch_size": scale.train_batch,
                "max_new_tokens": scale.max_new_tokens}  # fmt: skip
    config = {**settings, "data": data.identity, **training_runs._defaults()}
    if recipe.constraint == "lagrangian":
        config["eta"] = ETA

    def fn() -> dict[str, Any]:
        model, processor = study.model(key)
        result = train_predictor(model, processor, data, progress=False, **settings)
        found = result.predictor
        history = [{name: round(float(value), 6) for name, value in row.items()} for row in result.history]
        payload = {"history": history, "weight": found.linear.weight, "bias": found.linear.bias, "n_heads": found.n_heads}
        if found.inputs == "foreign":
            shares = found.bank.half().cpu().numpy()
            payload |= {"bank": base64.b64encode(shares.tobytes()).decode(), "bank_shape": shares.shape}
            payload["bank_keys"] = [str(number) for number in found.bank_keys.tolist()]  # 64 bits: more than a JSON number holds
        return payload

    return study.record("controls/training", config, fn, models=(key,), together=True)


def predictor(record: Record) -> RatePredictor:
    """The predictor that a record of `train` holds."""
    payload, config = record["payload"], record["config"]
    if "inputs" not in config:
        return training_runs.as_predictor(record)
    weight = torch.tensor(payload["weight"], dtype=torch.float32).view(config["n_rates"], -1)
    hidden = weight.shape[1] if config["inputs"] == "hidden" else None
    made = RatePredictor(
        payload["n_heads"], config["n_rates"], config["layer"], {"model": config["models"][0], **_about(config)},
        inputs=config["inputs"], hidden=hidden,
    )  # fmt: skip
    state = {"linear.weight": weight, "linear.bias": torch.tensor(payload["bias"])}
    if made.inputs == "foreign":
        shares = np.frombuffer(base64.b64decode(payload["bank"]), dtype=np.float16).reshape(payload["bank_shape"])
        keys = torch.tensor([int(number) for number in payload["bank_keys"]], dtype=torch.long)
        made.bank, made.bank_keys = torch.from_numpy(shares.copy()), keys
        state |= {"bank": made.bank, "bank_keys": made.bank_keys}
    made.load_state_dict(state)
    return made.eval().requires_grad_(False)


def _about(config: dict[str, Any]) -> dict[str, Any]:
    told = ("target", "seed", "steps", "batch_size", "constraint", "reversible", *training_runs.SETTINGS)
    return {name: config[name] for name in told}


def seeds(study: Study, inputs: str = "shares") -> tuple[int, ...]:
    """The training seeds of a control; of the hidden state, which no claim reads, the first only."""
    return study.scale.control_seeds[: 1 if inputs == "hidden" else None]


def recipes(study: Study, base: Recipe = Recipe()) -> list[Recipe]:
    """A recipe with each of its seeds."""
    return [replace(base, seed=seed) for seed in seeds(study, base.inputs)]
