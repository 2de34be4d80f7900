"""Notebook 04: timing contenders in turns. A contender is one loop (graph, reference, stock, static) under one method.

One run of n tokens tells the time of its first token and of tokens on the way, by events on the device that nothing waits for;
the wall clock runs from the call until all work is done, what the host does included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine, eager_engine, engine_of
from ..errors import InputError
from ..generation import generate
from ..methods import Method
from ..models import model_info
from .efficiency_course import TEXT_TOKENS

SYSTEM_TOKENS = 35  # of the prompt's text, before the picture; LLaVA-1.5's system prompt has about as many
HOST_MARKS = {
    "intake": "intake",
    "decode": "queued",
}  # an engine's marks at which the host's time is taken, and its names here
KINDS = ("graph", "reference", "stock", "static")
Sample = dict[str, Any]


def latency_inputs(model: Any, processor: Any, batch: int, pictures: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """A prompt of `TEXT_TOKENS` text tokens around its pictures, random words and pixels, on the model's device."""
    info, parameter = model_info(model), next(model.parameters())
    tokenizer, image = processor.tokenizer, int(model.config.image_token_id)
    special = {*tokenizer.all_special_ids, image}
    words = [i for i in range(min(len(tokenizer), info.vocab)) if i not in special]
    random = np.random.default_rng(seed)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else words[0]
    text = [int(i) for i in random.choice(words, TEXT_TOKENS - 1)]
    tokens = [image] * (info.n_image_tokens * pictures)
    ids = [start, *text[: SYSTEM_TOKENS - 1], *tokens, *text[SYSTEM_TOKENS - 1 :]]
    rows = torch.tensor([ids] * batch)
    shape = (batch * pictures, 3, info.image_size, info.image_size)
    pixels = torch.as_tensor(random.standard_normal(shape, dtype=np.float32)).to(parameter.dtype)
    made = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "pixel_values": pixels}
    return {name: value.to(parameter.device) for name, value in made.items()}


class Clock:
    """Notes when parts of a run are through: an event on the device where there is one, and the host's own time."""

    def __init__(self, device: torch.device, at: Sequence[int]) -> None:
        self.cuda, self.device, self.at = device.type == "cuda", device, set(at) | {1}

    def begin(self) -> None:
        """The run is about to be called; the device is idle."""
        self.tokens = 0
        self.notes: dict[int | str, tuple[Any, float]] = {}
        if self.cuda:
            torch.cuda.synchronize(self.device)
        self.start = self._now()

    def _now(self) -> tuple[Any, float]:
        event = None
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event, time.perf_counter()

    def token(self) -> None:
        """One more token has been queued (of each sample)."""
        self.tokens += 1
        if self.tokens in self.at:
            self.notes[self.tokens] = self._now()

    def mark(self, what: str) -> None:
        """What an `Engine` calls."""
        if what in ("prefill", "step"):
            self.token()
        elif what in HOST_MARKS:
            self.notes[what] = (None, time.perf_counter())

    def end(self) -> Sample:
        """Wait for the device. ms: {tokens: since the call}; wall_ms; host_ms: {intake, queued}, the host's; tokens told of."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        wall = time.perf_counter()
        first, begin = self.start
        ms = {
            str(n): first.elapsed_time(event) if self.cuda else 1000 * (at - begin)
            for n, (event, at) in self.notes.items()
            if isinstance(n, int)
        }
        host = {name: 1000 * (self.notes[what][1] - begin) for what, name in HOST_MARKS.items() if what in self.notes}
        return {"ms": ms, "wall_ms": 1000 * (wall - begin), "host_ms": host, "tokens": self.tokens}


def engine_for(model: Any) -> Engine:
    """The model's engine, kept with it: captured graphs on a GPU, the same loop as it is elsewhere."""
    if next(model.parameters()).device.type == "cuda":
        return engine_of(model)
    if "_dyrate_engine" not in vars(model):
        vars(model)["_dyrate_engine"] = eager_engine(model)
    return vars(model)["_dyrate_engine"]


def make_run(kind: str, model: Any, inputs: Mapping[str, Tensor], method: Method | None) -> Callable[[int, Clock], Any]:
    """`run(n, clock)` of a loop: greedy, exactly n tokens.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"no loop {kind!r}: there are {', '.join(KINDS)}")
    if kind == "graph":
        engine, asked = engine_for(model), dict(inputs)
        for name in ("input_ids", "attention_mask"):  # as a tokenizer gives them
            asked[name] = asked[name].cpu()

        def on_engine(n: int, clock: Clock) -> Any:
            engine.mark = clock.mark
            return generate(model, asked, method, n, engine=engine, eos_token_id=[])

        return on_engine
    if kind == "reference":

        def plainly(n: int, clock: Clock) -> Any:
            hook = model.lm_head.register_forward_hook(lambda *_: clock.token())
            try:
                return generate(model, inputs, method, n, engine="reference", eos_token_id=[])
            finally:
                hook.remove()

        return plainly
    extra = {"cache_implementation": "static"} if kind == "static" else {}
    going = torch.zeros(inputs["input_ids"].shape[0], dtype=torch.bool, device=inputs["input_ids"].device)

    def by_stock(n: int, clock: Clock) -> Any:
        from transformers import StoppingCriteriaList

        def look(*_: Any, **__: Any) -> Tensor:
            clock.token()
            return going

        with nullcontext() if method is None or method.name == "none" else method(model):
            out = model.generate(
                **inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([look]), **extra,
            )  # fmt: skip
        made = out.shape[1] - inputs["input_ids"].shape[1]
        if made != n:
            raise InputError(f"the model made {made} tokens where {n} were to be timed")
        return out

    return by_stock
