"""What training a predictor on a frozen model holds in memory at its peak: weights, activations, logits.

Counted from dimensions alone, so that a batch that does not fit is known before weights are loaded:

    plan = training_memory(llava_dimensions("7b"), batch=8, checkpoint=True)
    plan.total / 2**30, largest_batch(llava_dimensions("7b"), 24 * 10**9, checkpoint=True)

The formulas follow `teacher_forcing.masked_logits`: layers below P keep nothing; weights are frozen, so that a linear layer
keeps no input; attention with masks keeps its exponentials, in float32, of all rows by all columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, ResourceError
from .loading import free_memory
from .models import ModelInfo

FLOAT = 4  # bytes of float32, in which attention with masks and norms are computed whatever the weights are
TEXT_TOKENS = 64  # of a prompt, besides the picture
MARGIN = 0.9  # of the free memory: fragments, and what is counted a little short
CONTEXT = 5 * 10**8  # bytes that CUDA, its libraries and the allocator's slack take on a card


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak, which is where the backward pass begins.

    weights: the frozen model's. saved: activations of all layers from P on (or, checkpointed, their inputs and one layer's).
    working: what attention's backward pass makes besides. head: the last norm and the logits of the response.
    prompt: hidden states, masks and pictures of the batch.
    """

    weights: int
    saved: int
    working: int
    head: int
    prompt: int

    @property
    def activations(self) -> int:
        """All but the weights."""
        return self.saved + self.working + self.head + self.prompt

    @property
    def total(self) -> int:
        return self.weights + self.activations


def parameter_count(info: ModelInfo) -> int:
    """Parameters of a LLaVA-1.5 of these dimensions: tower, projector, decoder, embeddings and head."""
    d, heads = info.hidden, info.head_dim
    attention = 2 * d * heads * (info.n_heads + info.n_kv_heads)
    decoder = info.n_layers * (attention + 3 * d * info.mlp + 2 * d) + d + 2 * info.vocab * d
    v = info.vision_hidden
    layer = 4 * (v * v + v) + 2 * v * info.vision_mlp + info.vision_mlp + v + 4 * v
    tower = info.vision_layers * layer + 3 * info.patch**2 * v + v + info.vision_tokens * v + 4 * v
    projector = info.feature_dim * info.projector_hidden + info.projector_hidden + info.projector_hidden * d + d
    return decoder + tower + projector


def training_memory(
    info: ModelInfo, batch: int, *, prompt_length: int | None = None, response: int = 64, layer: int = 3, bytes_each: int = 2,
    checkpoint: bool = False,
) -> TrainingMemory:  # fmt: skip
    """The plan for one step of `train_predictor`.

    batch: pictures a step. prompt_length: tokens with the picture's (default: 64 besides). response: tokens of the longest.
    layer: P. bytes_each: of a weight, 2 for bfloat16. checkpoint: layers are computed again in the backward pass instead of
    being kept, as `teacher_forcing.masked_logits` does where they do not fit.

    Raises:
        InputError: a number out of range, or a family whose pictures have no fixed number of tokens.
    """
    if not info.n_image_tokens:
        raise InputError(f"{info.name}: the tokens of a picture depend on the picture, so there is no plan for a batch")
    prompt = info.n_image_tokens + TEXT_TOKENS if prompt_length is None else prompt_length
    if (
        batch < 1
        or response < 1
        or prompt < info.n_image_tokens
        or not 1 <= layer < info.n_layers
        or bytes_each not in (2, 4, 8)
    ):
        raise InputError(
            f"no such training: batch {batch}, prompt of {prompt}, response of {response}, layer {layer} of {info.n_layers}, "
            f"{bytes_each} bytes a number"
        )
    rows, d, width = prompt + response, info.hidden, info.n_heads * info.head_dim
    maps = batch * info.n_heads * rows * rows * FLOAT
    attention = maps + 4 * batch * rows * width * FLOAT + batch * info.n_heads * rows * FLOAT
    # a norm keeps its input in float32: a copy, unless that is what the stream is in
    norms = 2 * batch * rows * d * FLOAT
    mlp = 3 * batch * rows * info.mlp * bytes_each
    one, stream, layers = attention + norms + mlp, batch * rows * d * bytes_each, info.n_layers - layer
    # half-precision streams lie beside the norms' copies while the next layer is computed
    saved = layers * stream + one if checkpoint else layers * one
    working = 2 * maps
    logits = batch * response * info.vocab
    head = logits * (bytes_each + 2 * FLOAT) + batch * response * d * FLOAT
    masks = 4 * batch * rows * rows * FLOAT + 3 * batch * (response + 1) * rows * FLOAT
    pictures = batch * 3 * info.image_size**2 * FLOAT
    return TrainingMemory(parameter_count(info) * bytes_each, saved, working, head, 3 * stream + masks + pictures)


def computed_again(info: ModelInfo, x: Tensor, mask: Tensor, layer: int, response: int) -> bool:
    """Whether layers' activations have to be computed again in the backward pass, for want of room on x's device.

    x: [B, T + R, D], what the layers from P = `layer` on receive; mask: [B, T + R, T + R].

    Raises:
        ResourceError: not even then do they fit; says how many samples would.
    """
    free, batch = room(x.device), x.shape[0]
    if free is None or not info.n_image_tokens:
        return False
    options: dict[str, Any] = {
        "prompt_length": x.shape[1] - response, "response": response, "layer": layer, "bytes_each": x.element_size(),
    }  # fmt: skip
    if training_memory(info, batch, **options).activations < MARGIN * free:
        return False
    needed = training_memory(info, batch, checkpoint=True, **options).activations
    if needed < MARGIN * free:
        return True
    each = training_memory(info, 1, checkpoint=True, **options).activations
    raise ResourceError(
        f"a batch of {batch} needs {needed / 1e9:.1f} GB for activations beside the model's weights, {free / 1e9:.1f} GB are "
        f"free on {x.device.type}: about {int(MARGIN * free // each)} samples fit; take a smaller batch_size"
    )


def room(device: torch.device) -> int | None:
    """Bytes that new tensors may take: what the device has free, and what torch holds there without using it."""
    free = free_memory(device)
    if free is not None and device.type == "cuda":
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free


def largest_batch(info: ModelInfo, room: int, **options: Any) -> int:
    """The most pictures a step that fit in `room` bytes, CUDA's own share taken off; 0 where not one does.

    options: as `training_memory` takes them.
    """
    fits = 0
    while training_memory(info, fits + 1, **options).total + CONTEXT <= room:
        fits += 1
    return fits
