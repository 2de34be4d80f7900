"""`generate`: the pruned loop, and the trace of what it kept.

Greedy and sampling, several sequences a prompt, batches of unequal prompts, a length of its own for every sample, stopping
criteria and streaming. Beam search and everything else that transformers offers runs under the context manager instead
(`with method(model): model.generate(...)`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decoder import Runner, Snapshot
from .errors import InputError
from .methods.base import PRUNED, Method
from .methods.none import NoReduction
from .models import Adapter, ModelInfo, Prompt, model_info

if TYPE_CHECKING:
    from .accounting import Flops


@dataclass
class Trace:
    """What was kept and attended to at every step; step 0 is the prefill, step t reads response token t - 1.

    kept: [B, steps] int64, image tokens read at layers >= P. kept_indices: [B, n0] int64, those kept at prefill in
    ranking order, -1 where a sample keeps fewer (with a ranking made once, step t keeps the first kept[b, t] of them).
    attention: [B, steps, H, 4] float32, shares of layer P - 1 (sys, img, ins, res). kept_by_layer: [B, steps, L] int64;
    at step 0 what the prompt's forward pass carried. valid: [B, steps] bool, False once a sample had ended.
    layer: P. n_image, prompt_length: [B] int64. vision_flops: [B, 2] int64 as in `Prompt`, or None.
    """

    kept: Tensor
    kept_indices: Tensor
    attention: Tensor
    kept_by_layer: Tensor
    valid: Tensor
    layer: int
    n_image: Tensor
    prompt_length: Tensor
    reads: list[Tensor] | None = field(default=None, repr=False)
    vision_flops: Tensor | None = field(default=None, repr=False)

    def kept_at(self, sample: int, step: int) -> Tensor:
        """Image tokens (raster order, 0..N-1) that `sample` reads at `step`: [kept] int64, ascending."""
        if self.reads is not None:
            return self.reads[step][sample].nonzero()[:, 0]
        kept = self.kept_indices[sample, : int(self.kept[sample, step])]
        return kept[kept >= 0].sort().values


@dataclass
class GenerationOutput:
    """What `generate` returns. sequences [B, T + steps] (prompt and reply), new_tokens [B, steps], lengths [B] int64
    (reply tokens with EOS), trace, logits [B, steps, vocab] if asked for."""

    sequences: Tensor
    new_tokens: Tensor
    lengths: Tensor
    trace: Trace
    info: ModelInfo = field(repr=False)
    logits: Tensor | None = field(default=None, repr=False)
    processor: Any = field(default=None, repr=False)
    refreshed: bool = False

    @property
    def text(self) -> list[str]:
        """The replies as text, special tokens left out.

        Raises:
            InputError: the model has no processor (load it with load_vlm, or pass processor= to generate).
        """
        if self.processor is None:
            raise InputError(
                "No processor to decode with: load the model by load_vlm(), or pass processor= to generate()."
            )
        rows = [row[:n].tolist() for row, n in zip(self.new_tokens, self.lengths.tolist(), strict=True)]
        return [text.strip() for text in self.processor.batch_decode(rows, skip_special_tokens=True)]

    def sample_flops(self, sample: int, convention: str = "cached") -> Flops:
        """FLOPs of one sample, up to its last valid step (see `accounting.flops` for the conventions)."""
        from .accounting import combine, flops

        steps = int(self.trace.valid[sample].sum())
        kept = self.trace.kept_by_layer[sample, :steps].cpu().numpy()
        length, n_image = int(self.trace.prompt_length[sample]), int(self.trace.n_image[sample])
        cost = self.trace.vision_flops
        vision = None if cost is None else tuple(cost[sample].tolist())
        if self.refreshed and convention == "cached":  # no cache: every step is a prefill of a longer prompt
            passes = (
                flops(self.info, length + t, n_image, kept[t : t + 1], "cached", t == 0, vision=vision)
                for t in range(steps)
            )
            return combine(passes)
        return flops(self.info, length, n_image, kept, convention, vision=vision)

    def flops(self, convention: str = "cached") -> Flops:
        """FLOPs of the whole batch, padding not counted: a float with `.by_part`, `.unpruned` and `.ratio`."""
        from .accounting import combine

        return combine([self.sample_flops(b, convention) for b in range(self.sequences.shape[0])])


class _Recorder:
    """Collects the trace while the loop runs."""

    def __init__(self) -> None:
        self.steps: list[Snapshot] = []

    def step(self, runner: Runner) -> None:
        self.steps.append(runner.snapshot())

    def trace(self, valid: Tensor, layer: int, prompt: Prompt) -> Trace:
        first = self.steps[0]
        ranked = first.ranking[:, : int(first.kept.max())]
        places = torch.arange(ranked.shape[1], device=ranked.device)
        reads = None if first.reads is None else [step.reads for step in self.steps if step.reads is not None]
        return Trace(
            kept=torch.stack([step.kept for step in self.steps], 1),
            kept_indices=torch.where(places < first.kept[:, None], ranked, -1),
            attention=torch.stack([step.shares for step in self.steps], 1),
            kept_by_layer=torch.stack([step.by_layer for step in self.steps], 1), valid=valid, layer=layer,
            n_image=prompt.n_image if prompt.full_n_image is None else prompt.full_n_image,
            prompt_length=prompt.length if prompt.full_length is None else prompt.full_length, reads=reads,
            vision_flops=prompt.vision_flops,
        )  # fmt: skip


def _chooser(
    do_sample: bool, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seed: int | None,
    device: torch.device,
) -> Any:  # fmt: skip
    """A function from ids [B, T] and logits [B, vocab] to the next token [B]; transformers' own processors shape them."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    if not repetition_penalty > 0:
        raise InputError(f"repetition_penalty must be above 0 (1 is none), got {repetition_penalty}.")
    warpers: Any = LogitsProcessorList()
    if repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if not do_sample:
        return lambda ids, logits: warpers(ids, logits.float()).argmax(-1) if warpers else logits.argmax(-1)
    if temperature <= 0 or not 0 < top_p <= 1 or top_k < 0:
        raise InputError(
            f"Sampling needs temperature > 0, 0 < top_p <= 1, top_k >= 0; got {temperature}, {top_p}, {top_k}."
        )
    if temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    generator = torch.Generator(device=device)
    generator.manual_seed(seed) if seed is not None else generator.seed()

    def sample(ids: Tensor, logits: Tensor) -> Tensor:
        probabilities = torch.softmax(warpers(ids, logits.float()), dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return sample


def _stopper(criteria: Any) -> Any:
    """Stopping criteria (one, or several) as a function from ids [B, T] and logits to [B] bool: which rows end here."""
    from transformers import StoppingCriteriaList

    several = StoppingCriteriaList(criteria if isinstance(criteria, list | tuple) else [criteria])
    return lambda ids, logits: several(ids, logits)


@torch.no_grad()
def generate(
    model: Any,
    inputs: Any,
    method: Method | None = None,
    max_new_tokens: int = 64,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    num_return_sequences: int = 1,
    seed: int | None = None,
    forced_tokens: Tensor | None = None,
    eos_token_id: int | list[int] | None = None,
    stopping_criteria: Any = None,
    streamer: Any = None,
    return_logits: bool = False,
    processor: Any = None,
) -> GenerationOutput:
    """Generate with visual tokens pruned by `method` (None: unpruned).

    inputs: input_ids [B, T] (left-padded), attention_mask [B, T] and what the model's family takes pictures in (pixel_values
    and, by family, more), e.g. from `prepare_inputs`. Several pictures in a prompt are ranked together.
    max_new_tokens: steps at most; generation ends when every sample has ended. forced_tokens: [B, steps] int64, follow
    these instead of choosing (then nothing ends early). eos_token_id: None takes the model's own, [] never ends.
    num_return_sequences: sequences drawn for each prompt, one after the other in the output (B grows by this factor).
    repetition_penalty, stopping_criteria (one or a list) and streamer are transformers' own. logits are raw.

    Raises:
        InputError: anything that `prepare_inputs` or the method would refuse, or a prompt and reply longer than the
            model's context; raised before the model runs.
    """
    adapter = Adapter(model)
    method = method if method is not None else NoReduction()
    if not isinstance(method, Method):
        raise InputError(f"method must be a Method such as FastV(), or None; got {type(method).__name__}.")
    if getattr(model, PRUNED, False):
        raise InputError("This model is being pruned by a context: leave it first, or call model.generate inside it.")
    if forced_tokens is not None:
        max_new_tokens = forced_tokens.shape[1]
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if num_return_sequences < 1 or (num_return_sequences > 1 and not (do_sample or forced_tokens is not None)):
        raise InputError(
            f"num_return_sequences={num_return_sequences} needs do_sample=True, or all would be the same; beams run under "
            "the context: with method(model): model.generate(num_beams=...)."
        )
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in inputs.items() if isinstance(value, Tensor)}
    method.prepare(adapter.n_layers, adapter.n_heads, device)
    if inputs["input_ids"].shape[1] + max_new_tokens > adapter.max_length:
        raise InputError(
            f"Prompt ({inputs['input_ids'].shape[1]} tokens) and {max_new_tokens} new tokens exceed the model's context of "
            f"{adapter.max_length}: shorten the prompt or lower max_new_tokens."
        )
    ends = _as_list(adapter.eos_token_ids if eos_token_id is None else eos_token_id) if forced_tokens is None else []
    choose = _chooser(do_sample, temperature, top_k, top_p, repetition_penalty, seed, device)
    stop = None if stopping_criteria is None or forced_tokens is not None else _stopper(stopping_criteria)
    prompt, ids = method.embed(adapter, inputs), inputs["input_ids"]
    if num_return_sequences > 1:
        rows = torch.arange(ids.shape[0], device=device).repeat_interleave(num_return_sequences)
        prompt, ids = replace(prompt.select(rows), embeds=prompt.embeds[rows]), ids[rows]
    recorder = _Recorder()
    runner = method.runner(adapter, prompt, max_new_tokens)

    alive = torch.ones(prompt.types.shape[0], dtype=torch.bool, device=device)
    ending = torch.tensor(ends, device=device, dtype=torch.long)
    tokens, valid, all_logits = [], [], []
    if streamer is not None:
        streamer.put(ids.cpu())
    logits = runner.prefill()
    for step in range(max_new_tokens):
        recorder.step(runner)
        if return_logits:
            all_logits.append(logits)
        token = choose(ids, logits) if forced_tokens is None else forced_tokens[:, step].to(device)
        token = torch.where(alive, token, adapter.pad_token_id)
        tokens.append(token)
        valid.append(alive)
        ids = torch.cat((ids, token[:, None]), dim=1)
        if streamer is not None:
            streamer.put(token.cpu())
        if ends:
            alive = alive & ~torch.isin(token, ending)
        if stop is not None:
            alive = alive & ~stop(ids, logits)
        if (ends or stop is not None) and not bool(alive.any()):
            break
        if step + 1 < max_new_tokens:
            logits = runner.decode(token)
    if streamer is not None:
        streamer.end()
    valid_steps = torch.stack(valid, 1)
    return GenerationOutput(
        sequences=ids, new_tokens=torch.stack(tokens, 1), lengths=valid_steps.sum(-1),
        trace=recorder.trace(valid_steps, runner.layer, prompt), info=model_info(model),
        logits=torch.stack(all_logits, 1) if return_logits else None,
        processor=processor if processor is not None else getattr(model, "dyrate_processor", None),
        refreshed=method.refresh,
    )  # fmt: skip


def _as_list(value: int | list[int]) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]


__all__ = ["GenerationOutput", "Trace", "generate"]
