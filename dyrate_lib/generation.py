"""`generate`: the pruned loop, and the trace of what it kept.

Greedy and sampling, several sequences a prompt, batches of unequal prompts, a length of its own for every sample, stopping
criteria and streaming. Beam search and everything else that transformers offers runs under the context manager instead
(`with method(model): model.generate(...)`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decoder import Runner, Snapshot
from .errors import InputError, Unsupported
from .methods.base import Method
from .models import ModelInfo, Prompt
from .request import Request, Sampling, check_request

if TYPE_CHECKING:
    from .accounting import Flops
    from .engine import Engine

log = logging.getLogger("dyrate_lib.engine")
ENGINES = ("auto", "graph", "reference")
_said: set[str] = set()  # reasons that the log has been told


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
    scores_all: bool = False

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
        """FLOPs of one sample, up to its last valid step (see `accounting.flops` for the conventions).

        Of the model alone: DyRate's predictor is not among them. It takes 2 * 4 H * K + K a step for H heads and K rates
        (`RatePredictor.flops()`; steps: `trace.valid.sum(1)`), in `accounting.flops(..., n_rates=K)` the part "predictor",
        its K additions left out.
        """
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
        return flops(self.info, length, n_image, kept, convention, vision=vision, scores_all=self.scores_all)

    def flops(self, convention: str = "cached") -> Flops:
        """FLOPs of the whole batch, padding not counted: a float with `.by_part`, `.unpruned` and `.ratio`.

        DyRate's predictor is left out, see `sample_flops`.
        """
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


def _chooser(sampling: Sampling, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from ids [B, T] and logits [B, vocab] to the next token [B]."""
    processors, generator = sampling.processors(), sampling.generator(device)

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        scores = processors(ids, logits.float()) if processors else logits
        if generator is None:
            return scores.argmax(-1)
        return torch.multinomial(torch.softmax(scores.float(), dim=-1), 1, generator=generator)[:, 0]

    return choose


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
    engine: str | Engine | None = None,
) -> GenerationOutput:
    """Generate with visual tokens pruned by `method` (None: unpruned).

    inputs: input_ids [B, T] (left-padded), attention_mask [B, T] and what the model's family takes pictures in (pixel_values
    and, by family, more), e.g. from `prepare_inputs`. Several pictures in a prompt are ranked together.
    max_new_tokens: steps at most; generation ends when every sample has ended. forced_tokens: [B, steps] int64, follow
    these instead of choosing (then nothing ends early). eos_token_id: None takes the model's own, [] never ends.
    num_return_sequences: sequences drawn for each prompt, one after the other in the output (B grows by this factor).
    repetition_penalty, stopping_criteria (one or a list) and streamer are transformers' own. logits are raw.

    engine: "reference", the loop in plain sight; "graph", the same at a GPU's pace (`dyrate_lib.engine`): Triton kernels in
    captured CUDA graphs, in float32 the same tokens; "auto", the graph where it can run, otherwise the reference, which the log
    is told once; None, as "auto" without a word. What the graph engine needs stays with the model for the next call (fused
    weights without a second copy, caches, graphs) until `dyrate_lib.engine.release(model)`. An `Engine` is used as it is.

    Raises:
        InputError: anything that `prepare_inputs` or the method would refuse, a prompt and reply longer than the model's
            context, or (with "graph") a model, method or setting that the graph engine does not run; raised before the
            model runs.
        ResourceError: the batch does not fit the GPU's memory; says how many samples would (graph engine).
    """
    if isinstance(engine, str) and engine not in ENGINES:
        raise InputError(f"engine={engine!r} is not known; choose one of {', '.join(ENGINES)}.")
    request = check_request(
        model, inputs, method, max_new_tokens, num_return_sequences=num_return_sequences, forced_tokens=forced_tokens,
        eos_token_id=eos_token_id, stopping_criteria=stopping_criteria, streamer=streamer, return_logits=return_logits,
        processor=processor, sampling={
            "do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p,
            "repetition_penalty": repetition_penalty, "seed": seed,
        },
    )  # fmt: skip
    if engine == "reference":
        return _reference(request)
    from .engine import loop, select  # not before it is needed: the library itself does without

    try:
        return loop.run(select.engine_for(model, engine), request)
    except Unsupported as error:  # raised before anything has been generated
        if engine not in (None, "auto"):
            raise
        if engine == "auto":
            _say_once(str(error))
    return _reference(request)


def _say_once(why: str) -> None:
    if why not in _said:
        _said.add(why)
        log.warning("engine='auto' takes the reference loop: %s", why)


def _reference(request: Request) -> GenerationOutput:
    """The loop in plain sight: any device, precision and method."""
    adapter, method, device, streamer = request.adapter, request.method, request.device, request.streamer
    inputs = {key: value.to(device) for key, value in request.inputs.items()}
    choose = _chooser(request.sampling, device)
    prompt, prompt_ids = method.embed(adapter, inputs), inputs["input_ids"]
    if request.copies > 1:
        rows = torch.arange(prompt_ids.shape[0], device=device).repeat_interleave(request.copies)
        prompt, prompt_ids = replace(prompt.select(rows), embeds=prompt.embeds[rows]), prompt_ids[rows]
    length = prompt_ids.shape[1]
    room = torch.nn.functional.pad(prompt_ids, (0, request.steps))
    ids = room[:, :length]
    recorder = _Recorder()
    runner = method.runner(adapter, prompt, request.steps)

    alive = torch.ones(prompt.types.shape[0], dtype=torch.bool, device=device)
    ending = torch.tensor(request.ends, device=device, dtype=torch.long)
    tokens, valid, all_logits = [], [], []
    if streamer is not None:
        streamer.put(ids.cpu())
    logits = runner.prefill()
    for step in range(request.steps):
        recorder.step(runner)
        if request.return_logits:
            all_logits.append(logits)
        token = choose(ids, logits) if request.forced is None else request.forced[:, step].to(device)
        token = torch.where(alive, token, adapter.pad_token_id)
        tokens.append(token)
        valid.append(alive)
        room[:, length + step] = token
        ids = room[:, : length + step + 1]
        if streamer is not None:
            streamer.put(token.cpu())
        if request.ends:
            alive = alive & ~torch.isin(token, ending)
        if request.stop is not None:
            alive = alive & ~request.stop(ids, logits)
        if (request.ends or request.stop is not None) and not bool(alive.any()):
            break
        if step + 1 < request.steps:
            logits = runner.decode(token)
    if streamer is not None:
        streamer.end()
    valid_steps = torch.stack(valid, 1)
    return GenerationOutput(
        sequences=ids.contiguous(), new_tokens=torch.stack(tokens, 1), lengths=valid_steps.sum(-1),
        trace=recorder.trace(valid_steps, runner.layer, prompt), info=adapter.info(),
        logits=torch.stack(all_logits, 1) if request.return_logits else None, processor=request.processor,
        refreshed=method.refresh, scores_all=method.scores_all,
    )  # fmt: skip


__all__ = ["ENGINES", "GenerationOutput", "Trace", "generate"]
