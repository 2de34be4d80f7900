"""Going on from a checkpoint whose tokenizer had other words: weights by name, rows of the vocabulary token by token."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .data import SCENES_PER_SEED
from .tokenizer import build_tokenizer

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def described(folder: Path) -> dict[str, Any]:
    """What a recipe records of the checkpoint it starts from.

    Returns:
        name: of the folder. steps, pictures: that it was trained for, over all runs one after another; training goes on behind
        the pictures. sha256: of its weights. legs: where it was itself trained further, each of the runs in turn: steps,
        pictures, sha256 of the weights that it left, and `first`, the number of its first scene (where its record has it).

    Raises:
        InputError: if the folder is no checkpoint of this project with its ``metrics.json``.
    """
    try:
        recipe = json.loads((folder / "metrics.json").read_text())["recipe"]
        before = recipe.get("start") or {"steps": 0, "pictures": 0}
        steps, batch = int(recipe["steps"]), int(recipe["batch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} is no scenes checkpoint to start from: its metrics.json must hold its recipe ({error})"
        ) from error
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("*.safetensors")):
        digest.update(shard.read_bytes())
    own = {"steps": steps, "pictures": steps * batch, "sha256": digest.hexdigest()}
    first = {"first": recipe.get("seed", 0) * SCENES_PER_SEED + before["pictures"]}
    found = {
        "name": folder.resolve().name,
        "steps": before["steps"] + steps,
        "pictures": before["pictures"] + steps * batch,
        "sha256": own["sha256"],
    }
    if not before["steps"]:
        return found
    earlier = before.get("legs") or [{k: before[k] for k in own}]
    return found | {"legs": [*earlier, own | first]}


def token_sources(old: Any, new: Any) -> list[list[int]]:
    """For each token of a tokenizer the tokens of an older one that say the same: itself, or the pieces it was split into."""
    known, words = old.get_vocab(), new.get_vocab()
    names = {number: word for word, number in words.items()}
    decoder = new.backend_tokenizer.decoder
    found = []
    for number in range(len(new)):
        word = names[number]
        if word in known:
            found.append([known[word]])
        else:
            found.append(list(old.backend_tokenizer.encode(decoder.decode([word]), add_special_tokens=False).ids))
    return found


def mapped_rows(rows: torch.Tensor, sources: list[list[int]]) -> torch.Tensor:
    """One row a token: the mean of the rows [V, D] of its sources, [len(sources), D].

    As the logit of a new token is so the mean of its pieces' logits, it is never above them all: at first the model says
    what it said before.
    """
    owner = torch.tensor([i for i, s in enumerate(sources) for _ in s])
    picked = rows[torch.tensor([j for s in sources for j in s])]
    total = torch.zeros(len(sources), rows.shape[1], dtype=rows.dtype).index_add_(0, owner, picked)
    return total / torch.tensor([len(s) for s in sources], dtype=rows.dtype)[:, None]


def load_start(model: Any, folder: Path) -> None:
    """Give a freshly built model (float32, on the CPU, the tokenizer of :func:`build_tokenizer`) a checkpoint's weights.

    Raises:
        InputError: if the folder cannot be read as a checkpoint, or is one of another size.
    """
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    try:
        old = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be read as a checkpoint to start from: {error}") from error
    weights = old.state_dict()
    sources = token_sources(tokenizer, build_tokenizer())
    for name in (EMBEDDING, HEAD):
        weights[name] = mapped_rows(weights[name], sources)
    wanted = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    if wanted != {name: tuple(w.shape) for name, w in weights.items()}:
        raise InputError(f"{folder} holds a model of another size than the one to train: choose its --size")
    model.load_state_dict(weights)
