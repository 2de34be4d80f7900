"""The loop of `generate` on an engine: the same request, the same output as `generation._reference`.

The twin of that loop by design: what differs is that the device chooses and counts, so the host waits once for a prompt and then
only now and then, to see whether all samples have ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import Unsupported
from ..generation import GenerationOutput, Trace
from ..layout import Prompt
from ..methods.staged import Staged
from ..request import Request
from .batch import elaborate, take_in
from .choice import Choice
from .policy import check_method
from .state import MOST_ENDS, sent

if TYPE_CHECKING:
    from .runner import Engine, Run
    from .staged import StagedRun

CHECK_EVERY = 8  # steps between looks at whether all samples have ended


def run(engine: Engine, request: Request) -> GenerationOutput:
    """Generate on an engine of the request's model.

    Raises:
        Unsupported: the graph cannot hold the method or a setting. ResourceError: the batch cannot fit. InputError: as
            `generate`, of what only the pictures tell.
    """
    # buffers outlive the call, so they must be no inference tensors, even if the caller is in inference mode
    with torch.inference_mode(False), torch.no_grad():
        return _run(engine, request)


def _run(engine: Engine, request: Request) -> GenerationOutput:
    method, streamer, stop = request.method, request.streamer, request.stop
    check_method(method)
    if len(request.ends) > MOST_ENDS:
        raise Unsupported(
            f"The graph engine watches for up to {MOST_ENDS} end tokens, got {len(request.ends)}. Use engine='reference'."
        )
    inputs = request.inputs
    if 0 < request.layer < engine.adapter.n_layers and not isinstance(method, Staged):
        if bool((inputs["input_ids"][:, -1] == engine.adapter.image_token_id).any()):
            raise Unsupported(
                "A prompt ends with its picture, whose last token's row then starts the reply whether it is kept or not: the "
                "graph engine carries no such row. Use engine='reference', or put text behind the picture."
            )
    if elaborate(engine.adapter, method, request.copies):  # else the host lays the batch out
        inputs = {key: value.to(engine.device) for key, value in inputs.items()}
    columns = engine.columns(*inputs["input_ids"].shape)
    # first of all the vision tower: what the host does from here on is done while the device is at work
    batch = take_in(engine.adapter, method, inputs, engine.see, request.copies, columns)
    ids = inputs["input_ids"]
    ids = sent(ids if request.copies == 1 else ids.repeat_interleave(request.copies, dim=0), engine.device)
    forced = None if request.forced is None else sent(request.forced, engine.device)
    choice = Choice(engine.device, ids, request.ends, engine.adapter.pad_token_id, request.sampling, forced)
    engine.mark("intake")
    current = engine.start(method, request.layer, batch, request.steps, choice)
    engine.mark("start")
    all_logits: list[Tensor] = []
    if streamer is not None:
        streamer.put(ids.cpu())
    current.prefill()
    state = current.state
    engine.mark("prefill")
    passes, may_end = 1, bool(request.ends) or stop is not None
    while True:
        if request.return_logits:
            all_logits.append(state.logits.clone())
        if streamer is not None:
            streamer.put(state.token.cpu())
        if stop is not None:
            so_far = torch.cat((ids, state.seen_token[:passes].T), dim=1)
            state.alive.logical_and_(~stop(so_far, state.logits))
        if passes == request.steps:
            break
        look = stop is not None or streamer is not None or passes % CHECK_EVERY == 0
        if look and may_end and not bool(state.alive.any()):
            break
        current.decode()
        engine.mark("step")
        passes += 1
    engine.mark("decode")
    if streamer is not None:
        streamer.end()
    valid = state.seen_alive[:passes].T.clone()
    used = int(valid.any(0).sum()) if may_end else passes
    new = state.seen_token[:used].T.clone()
    return GenerationOutput(
        sequences=torch.cat((ids, new), dim=1), new_tokens=new, lengths=valid[:, :used].sum(-1),
        trace=trace(current, batch.prompt, valid[:, :used], request.layer), info=engine.info,
        logits=torch.stack(all_logits[:used], 1) if request.return_logits else None, processor=request.processor,
    )  # fmt: skip


def trace(current: Run | StagedRun, prompt: Prompt, valid: Tensor, layer: int) -> Trace:
    """What was kept and attended to, copied from the buffers; valid [B, steps] bool; layer: the method's P."""
    state, steps = current.state, valid.shape[1]
    kept = state.seen_kept[:steps].T.clone()
    ranking = state.ranking if prompt.picked is None else prompt.picked
    ranked = ranking[:, : int(kept[:, 0].max())].clone()
    places = torch.arange(ranked.shape[1], device=ranked.device)
    return Trace(
        kept=kept, kept_indices=torch.where(places < kept[:, :1], ranked, -1),
        attention=state.seen_shares[:steps].transpose(0, 1).clone(), kept_by_layer=current.by_layer(steps), valid=valid,
        layer=layer,
        n_image=(state.n_image if prompt.full_n_image is None else prompt.full_n_image).clone(),
        prompt_length=(state.lengths if prompt.full_length is None else prompt.full_length).clone(),
        reads=None if state.seen_reads is None else list(state.seen_reads[:steps].clone()),
        vision_flops=None if prompt.vision_flops is None else sent(prompt.vision_flops, kept.device),
    )  # fmt: skip
