"""Notebook 04: where greedy replies in bfloat16 first differ: the graph engine against the reference loop, beside stock kernels.

Two correct implementations round differently, and a reply goes its own way from the first close call on. What stock attention
by two kernels (SDPA, eager) does to the same replies is the measure of how soon that may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import release
from ..evaluate import batches
from ..generation import generate
from ..loading import load_vlm, quietly
from ..methods import FastV, Method, NoReduction
from ..models import Adapter
from .context import Study
from .efficiency_cells import Cell, courses, subjects, timed_model
from .efficiency_clock import engine_for, latency_inputs
from .efficiency_course import Replay
from .efficiency_rounds import clear

PICTURES = {"full": (200, 64), "smoke": (2, 8)}  # pictures, tokens of a reply at most
RANDOM_PROMPTS, RANDOM_TOKENS = 8, 32
BATCH = 50


def until_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """Replies [B, n] with -1 behind the first end token: what pads a reply there is the longest of its batch's doing."""
    found = tokens.cpu().clone()
    over = torch.isin(found, torch.tensor(list(ends), dtype=found.dtype)).int().cumsum(-1).roll(1, -1).bool()
    over[:, 0] = False
    found[over] = -1
    return found


def first_difference(a: Tensor, b: Tensor, ends: Sequence[int] = ()) -> list[int]:
    """First column where the rows of two replies [B, n], [B, m] differ before both have ended; -1 where they do not.

    ends: end tokens; with none, every token counts (the shorter is padded).
    """
    a, b = until_end(a, ends), until_end(b, ends)
    wide = max(a.shape[1], b.shape[1])
    a, b = (torch.nn.functional.pad(x, (0, wide - x.shape[1]), value=-1) for x in (a, b))
    differ = a != b
    return torch.where(differ.any(-1), differ.long().argmax(-1), -1).tolist()


def agreement(study: Study, cell: Cell, deadline: float, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """payload {real: {pair: [first difference a reply]}, random: the same on random weights (at full scale), n, tokens}."""
    n, tokens = PICTURES[study.scale.name]
    out: dict[str, Any] = {"real": {}, "random": {}, "n": n, "tokens": tokens}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quietly():  # a CPU's bfloat16 is slow and nobody's concern
        model, processor = load_vlm(study.model_name("small"), device=device)
    methods: dict[str, Method] = {
        "original": NoReduction(),
        "fastv-2": FastV(2, 0.5),
        "dyrate": study.method("dyrate", "small"),
    }
    data = study.dataset("coco", n)
    for _, inputs in batches(model, processor, data, range(len(data)), min(BATCH, len(data))):
        for pair, first in compare(model, inputs, methods, out["tokens"], processor).items():
            out["real"].setdefault(pair, []).extend(first)
    release(model)
    del model
    if study.scale.name == "full":
        model, processor = timed_model(study, next(s for s in subjects(study) if s.key == cell.model))
        methods["dyrate"] = Replay(kept=courses(study, cell))
        inputs = latency_inputs(model, processor, RANDOM_PROMPTS)
        out["random"] = compare(model, inputs, methods, RANDOM_TOKENS, None)
        out["random_tokens"] = RANDOM_TOKENS
    return out


def compare(
    model: Any, inputs: Mapping[str, Tensor], methods: Mapping[str, Method], n: int, processor: Any
) -> dict[str, list[int]]:
    """First differences of replies of up to n tokens: graph against reference by method, stock SDPA against eager and others.

    processor: None for random weights, whose replies never end.
    """
    engine = engine_for(model)
    ends = [] if processor is None else list(Adapter(model).eos_token_ids)
    found: dict[str, list[int]] = {}
    for name, method in methods.items():
        ours = generate(model, inputs, method, n, eos_token_id=ends, engine="reference").new_tokens
        fast = generate(model, inputs, method, n, eos_token_id=ends, engine=engine).new_tokens
        found[f"graph, reference: {name}"] = first_difference(fast, ours, ends)
        if name == "original":
            unpruned = (fast, ours)
    length = inputs["input_ids"].shape[1]
    stock = {}
    before = model.config._attn_implementation
    try:
        for kind in ("sdpa", "eager"):
            model.set_attn_implementation(kind)
            options: dict[str, Any] = {"max_new_tokens": n, "do_sample": False, "num_beams": 1}
            if processor is None:
                options |= {"min_new_tokens": n, "eos_token_id": None, "pad_token_id": 0}
            with torch.inference_mode():
                stock[kind] = model.generate(**inputs, **options)[:, length:]
    finally:
        model.set_attn_implementation(before)
    found["stock SDPA, stock eager: original"] = first_difference(stock["sdpa"], stock["eager"], ends)
    found["graph, stock SDPA: original"] = first_difference(unpruned[0], stock["sdpa"], ends)
    found["reference, stock SDPA: original"] = first_difference(unpruned[1], stock["sdpa"], ends)
    clear(engine, next(model.parameters()).device)
    return found
