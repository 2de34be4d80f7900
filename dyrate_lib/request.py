"""One call of `generate`, checked: what the reference loop and the graph engine both start from, so that they refuse alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, check_whole
from .layout import check_inputs
from .methods.base import PRUNED, Method
from .methods.none import NoReduction
from .models import Adapter


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedy by default. The settings are transformers' own.

    Raises:
        InputError: a setting out of its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_whole("seed", self.seed)
        if not self.repetition_penalty > 0:
            raise InputError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}.")
        if self.do_sample and not (self.temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise InputError(
                f"Sampling needs temperature > 0, 0 < top_p <= 1, top_k >= 0; got {self.temperature}, {self.top_p}, "
                f"{self.top_k}."
            )

    @property
    def penalised(self) -> bool:
        """Whether the choice depends on the tokens said so far."""
        return self.repetition_penalty != 1.0

    def processors(self) -> Any:
        """A `LogitsProcessorList`, perhaps empty: from ids [B, T] and logits [B, vocab] float32 to scores [B, vocab]."""
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        found: Any = LogitsProcessorList()
        if self.penalised:
            found.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.do_sample and self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.do_sample and self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.do_sample and self.top_p < 1:
            found.append(TopPLogitsWarper(float(self.top_p)))
        return found

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What draws on `device`, seeded (by chance where no seed is given); None if nothing is drawn."""
        if not self.do_sample:
            return None
        made = torch.Generator(device=device)
        if self.seed is None:
            made.seed()
        else:
            made.manual_seed(self.seed)
        return made


@dataclass
class Request:
    """What `generate` was asked for, checked against the model.

    inputs: the tensors among the caller's, where the caller left them. layer: P, from `Method.prepare`. steps: tokens at most.
    copies: sequences for each prompt. ends: end-of-sequence tokens, empty where nothing ends. forced: [B copies, steps] int64 or
    None. stop: from ids [B, T] and logits [B, vocab] to [B] bool, which rows end here, or None.
    """

    adapter: Adapter
    method: Method
    inputs: dict[str, Tensor]
    layer: int
    steps: int
    copies: int
    sampling: Sampling
    ends: list[int]
    forced: Tensor | None
    stop: Callable[[Tensor, Tensor], Tensor] | None
    streamer: Any
    return_logits: bool
    processor: Any

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.adapter.model.parameters()).device


def check_request(
    model: Any, inputs: Mapping[str, Any], method: Method | None, max_new_tokens: int, *, sampling: Mapping[str, Any],
    num_return_sequences: int = 1, forced_tokens: Tensor | None = None, eos_token_id: int | list[int] | None = None,
    stopping_criteria: Any = None, streamer: Any = None, return_logits: bool = False, processor: Any = None,
) -> Request:  # fmt: skip
    """The arguments of `generate` as a `Request`; sampling: those of `Sampling`. The model does not run.

    Raises:
        InputError: an argument, the method's settings, or a length that does not fit the model.
    """
    adapter = Adapter(model)
    method = method if method is not None else NoReduction()
    if not isinstance(method, Method):
        raise InputError(f"method must be a Method such as FastV(), or None; got {type(method).__name__}.")
    if getattr(model, PRUNED, False):
        raise InputError("This model is being pruned by a context: leave it first, or call model.generate inside it.")
    check_inputs(inputs)
    found = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    (rows, length), vocabulary = found["input_ids"].shape, adapter.core.get_input_embeddings().weight.shape[0]
    if found["input_ids"].device.type == "cpu":  # elsewhere a look at them would make the host wait
        _check_tokens("input_ids", found["input_ids"], vocabulary)
    num_return_sequences = check_whole("num_return_sequences", num_return_sequences, 1)
    if forced_tokens is not None:
        shape = list(forced_tokens.shape) if isinstance(forced_tokens, Tensor) else type(forced_tokens).__name__
        if not isinstance(forced_tokens, Tensor) or len(shape) != 2 or shape[0] != rows * num_return_sequences or not shape[1]:
            raise InputError(
                f"forced_tokens must be [B, steps] with B = {rows * num_return_sequences}, one row for each sequence, and at "
                f"least one step; got {shape}."
            )
        _check_tokens("forced_tokens", forced_tokens, vocabulary)
        max_new_tokens = forced_tokens.shape[1]
    max_new_tokens = check_whole("max_new_tokens", max_new_tokens, 1)
    drawn = bool(sampling.get("do_sample")) or forced_tokens is not None
    if num_return_sequences > 1 and not drawn:
        raise InputError(
            f"num_return_sequences={num_return_sequences} needs do_sample=True, or all would be the same; beams run under "
            "the context: with method(model): model.generate(num_beams=...)."
        )
    layer = method.prepare(adapter.n_layers, adapter.n_heads, next(model.parameters()).device)
    method.check_rows(rows * num_return_sequences)
    if length + max_new_tokens > adapter.max_length:
        raise InputError(
            f"Prompt ({length} tokens) and {max_new_tokens} new tokens exceed the model's context of {adapter.max_length}: "
            "shorten the prompt or lower max_new_tokens."
        )
    ends = adapter.eos_token_ids if eos_token_id is None else _end_tokens(eos_token_id, vocabulary)
    free = forced_tokens is None
    return Request(
        adapter=adapter, method=method, inputs=found, layer=layer, steps=max_new_tokens, copies=num_return_sequences,
        sampling=Sampling(**sampling), ends=ends if free else [], forced=forced_tokens,
        stop=_stopper(stopping_criteria) if free and stopping_criteria is not None else None, streamer=streamer,
        return_logits=return_logits,
        processor=processor if processor is not None else getattr(model, "dyrate_processor", None),
    )  # fmt: skip


def _check_tokens(name: str, tokens: Tensor, vocabulary: int) -> None:
    """Refuse `tokens`, called `name`, that are no numbers of a vocabulary of that size. The host waits where they are on a GPU.

    Raises:
        InputError: another dtype than int64 or int32, or a number out of range.
    """
    if tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{name} must be token numbers (int64), got {tokens.dtype}.")
    if not tokens.numel():
        return
    least, most = torch.stack(tokens.aminmax()).tolist()
    if least < 0 or most >= vocabulary:
        raise InputError(
            f"{name} holds token {least if least < 0 else most}, the model knows 0 to {vocabulary - 1}: use its own processor."
        )


def _end_tokens(given: Any, vocabulary: int) -> list[int]:
    """`eos_token_id` as a list. Raises InputError."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    ends = [check_whole("eos_token_id", end, 0) for end in (given if several else [given])]
    beyond = [end for end in ends if end >= vocabulary]
    if beyond:
        raise InputError(
            f"eos_token_id={beyond[0]} is no token of this model, which knows 0 to {vocabulary - 1}: leave it out to take the "
            "model's own, or pass [] to end never."
        )
    return ends


def _stopper(criteria: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Stopping criteria (one, or several) as one function."""
    from transformers import StoppingCriteriaList

    several = StoppingCriteriaList(criteria if isinstance(criteria, list | tuple) else [criteria])
    return lambda ids, logits: several(ids, logits)
