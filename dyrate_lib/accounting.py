"""Tokens, FLOPs and bytes: one count for every method, so that none is flattered.

Two conventions, always named. `paper` is FastV's formula (Chen et al. 2024, eq. 5), summed over the layers of a forward
pass that is re-run for every new token; `paper-prefill` is its first pass alone. `cached` is what a decoder with a KV
cache computes: the prompt once, then one row a token, with LLaMA's three MLP matrices and grouped-query heads, and with
vision tower, projector and output head as parts of their own. `cached` counts what torch's FlopCounterMode counts: two
FLOPs per multiply-add of matrix products and convolutions, attention not halved for causality. So it can be checked
against a real run. Element-wise work (norms, softmax, activations, sorting) is left out by both.

All counts are for one sample. `kept` may be a NumPy array or a torch tensor; with a tensor that requires grad the
totals stay differentiable, which is what predictor training needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError

if TYPE_CHECKING:
    from .models import ModelInfo

CONVENTIONS = ("cached", "paper", "paper-prefill")


class Flops(float):
    """A FLOP count that knows its parts.

    A plain float (total FLOPs of one sample) with `by_part` (name -> FLOPs), `unpruned_by_part` (the same for the model
    that keeps every image token), `unpruned` (their sum) and `ratio` (total / unpruned, 1.0 when both are zero).
    """

    by_part: dict[str, float]
    unpruned_by_part: dict[str, float]

    def __new__(cls, by_part: dict[str, float], unpruned_by_part: dict[str, float]) -> Flops:
        value = super().__new__(cls, sum(by_part.values()))
        value.by_part = dict(by_part)
        value.unpruned_by_part = dict(unpruned_by_part)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return Flops, (self.by_part, self.unpruned_by_part)

    @property
    def unpruned(self) -> float:
        """FLOPs of the same run with every image token kept."""
        return float(sum(self.unpruned_by_part.values()))

    @property
    def ratio(self) -> float:
        """This count over the unpruned one."""
        return float(self) / self.unpruned if self.unpruned else 1.0

    def part_ratio(self, *parts: str) -> float:
        """The ratio over some parts only, e.g. `part_ratio("prefill", "decode")` for the language model alone."""
        unknown = [part for part in parts if part not in self.by_part]
        if unknown:
            raise InputError(f"no part named {', '.join(unknown)}; there are {', '.join(self.by_part)}")
        full = sum(self.unpruned_by_part[part] for part in parts)
        return sum(self.by_part[part] for part in parts) / full if full else 1.0


def combine(counts: Iterable[Flops]) -> Flops:
    """The sum of several samples' counts, parts and all. Raises InputError for none."""
    counts = list(counts)
    if not counts:
        raise InputError("combine needs at least one FLOP count")
    names = list(dict.fromkeys(name for count in counts for name in count.by_part))
    return Flops(
        {name: sum(count.by_part.get(name, 0.0) for count in counts) for name in names},
        {name: sum(count.unpruned_by_part.get(name, 0.0) for count in counts) for name in names},
    )


@dataclass(frozen=True)
class LayerTokens:
    """How many tokens each layer works on, for one sample.

    prefill: [L] rows at each layer's input in the prefill pass.
    kv_read: [steps, L] keys that a query row of that step reads in that layer, itself included (row 0: the prefill,
        whose rows are all counted as reading every row, as FlopCounterMode does).
    """

    prefill: Any
    kv_read: Any


def paper_layer_flops(n: Any, d: int, m: int) -> Any:
    """FastV's FLOPs of one layer on `n` tokens: 4nd^2 + 2n^2d + 2ndm (`d` hidden width, `m` MLP width).

    `n` may be a number, an array or a tensor; the result has its shape.
    """
    return 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m


def token_counts(info: ModelInfo, prompt_length: int, n_image: int, kept_by_layer: Any) -> LayerTokens:
    """Tokens at the inputs of all layers, from how many image tokens each layer has at each step.

    Args:
        info: the model's dimensions; only `n_layers` is used.
        prompt_length: tokens in the unpruned prompt, image tokens included, padding excluded.
        n_image: image tokens in the unpruned prompt.
        kept_by_layer: [steps, L] image tokens at layer l in forward pass t (0 = prefill, which yields the first new
            token); `n_image` in layers that prune nothing. Array or tensor, integer or not.

    Raises:
        InputError: shapes or numbers that no run can have.
    """
    kept = _checked(info, prompt_length, n_image, kept_by_layer)
    text = prompt_length - n_image
    step: Any = np.arange(kept.shape[0])[:, None]
    if not isinstance(kept, np.ndarray):
        import torch

        step = torch.arange(kept.shape[0], device=kept.device)[:, None]
    kv_read = kept + (text + step)
    return LayerTokens(prefill=kv_read[0], kv_read=kv_read)


def flops(
    info: ModelInfo,
    prompt_length: int,
    n_image: int,
    kept_by_layer: Any,
    convention: str = "cached",
    includes_vision: bool = True,
    n_rates: int = 0,
    vision: tuple[int, int] | None = None,
    scores_all: bool = False,
) -> Flops:
    """FLOPs of one sample's generation, with the unpruned count beside it.

    Args:
        info, prompt_length, n_image, kept_by_layer: as in `token_counts`; `steps` forward passes give `steps` tokens.
        convention: "cached", "paper" or "paper-prefill".
        includes_vision: whether `cached` counts vision tower and projector (`paper` never does).
        vision: FLOPs of tower and projector for this prompt's pictures (a row of `Prompt.vision_flops`); None takes them
            from `info`, which only families with pictures of one size allow.
        n_rates: rates of a DyRate predictor that runs once a step; adds the part "predictor" to the pruned count.
        scores_all: a decode step's query is multiplied with every image token's key, read or not (`Method.scores_all`): in
            `cached` "decode" then has 2 * heads * head_dim more for each token that a layer does not read.

    Returns:
        Flops; parts of `cached` are vision, projector, prefill, decode, head and, with `n_rates`, predictor; the only
        part of `paper` is llm (and predictor).

    Raises:
        InputError: unknown convention, or counts that no run can have.
    """
    kept = _checked(info, prompt_length, n_image, kept_by_layer)
    if not isinstance(kept, np.ndarray):
        kept = kept.detach().cpu().numpy()
    full = np.full_like(kept, n_image)
    pruned = flop_parts(info, prompt_length, n_image, kept, convention, includes_vision, vision)
    unpruned = flop_parts(info, prompt_length, n_image, full, convention, includes_vision, vision)
    if scores_all and convention == "cached":
        pruned["decode"] += 2 * info.n_heads * info.head_dim * (full - kept)[1:].sum()
    if n_rates:
        passes = 1 if convention == "paper-prefill" else kept.shape[0]
        pruned["predictor"] = 2.0 * 4 * info.n_heads * n_rates * passes
        unpruned["predictor"] = 0.0
    return Flops({k: float(v) for k, v in pruned.items()}, {k: float(v) for k, v in unpruned.items()})


def flop_parts(
    info: ModelInfo,
    prompt_length: int,
    n_image: int,
    kept_by_layer: Any,
    convention: str = "cached",
    includes_vision: bool = True,
    vision: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The parts behind `flops`, with its arguments and errors; differentiable if `kept_by_layer` is a float tensor."""
    if convention not in CONVENTIONS:
        raise InputError(f"unknown FLOPs convention {convention!r}; known: {', '.join(CONVENTIONS)}")
    counts = token_counts(info, prompt_length, n_image, kept_by_layer)
    if convention == "paper-prefill":
        return {"llm": paper_layer_flops(counts.prefill, info.hidden, info.mlp).sum()}
    if convention == "paper":
        return {"llm": paper_layer_flops(counts.kv_read, info.hidden, info.mlp).sum()}
    parts: dict[str, Any] = {}
    if includes_vision:
        parts = vision_flops(info, n_image) if vision is None else {"vision": vision[0], "projector": vision[1]}
    steps = counts.kv_read.shape[0]
    row, attend = _row_flops(info), 4 * info.n_heads * info.head_dim
    # the rotary angles are an outer product of positions and frequencies, made once a forward pass: head_dim a row
    parts["prefill"] = (counts.prefill * row + attend * counts.prefill**2).sum() + info.head_dim * counts.prefill[0]
    parts["decode"] = attend * counts.kv_read[1:].sum() + (steps - 1) * (info.n_layers * row + info.head_dim)
    parts["head"] = 2 * info.hidden * info.vocab * steps
    return parts


def vision_flops(info: ModelInfo, n_image: int) -> dict[str, int]:
    """FLOPs of vision tower and projector for the pictures behind `n_image` image tokens.

    The tower runs all its layers, also those after the layer whose output is used, because transformers does.
    Returns {"vision": .., "projector": ..}; zero for a prompt without a picture.

    Raises:
        InputError: in this family a picture's tokens and cost depend on the picture (`Prompt.vision_flops` has them).
    """
    if n_image and not info.n_image_tokens:
        raise InputError(
            f"What the pictures of {info.name} cost depends on their size: pass vision=prompt.vision_flops of the prompt, or "
            "count the language model alone (includes_vision=False)."
        )
    pictures = -(-n_image // info.n_image_tokens) if n_image else 0
    d, rows = info.vision_hidden, info.vision_tokens
    patches = (info.image_size // info.patch) ** 2
    convolution = 2 * patches * d * 3 * info.patch**2
    layer = encoder_flops(d, info.vision_mlp, 2, [rows])
    projector = 2 * info.n_image_tokens * info.projector_hidden * (info.feature_dim + info.hidden)
    return {
        "vision": pictures * (convolution + info.vision_layers * layer),
        "projector": pictures * projector,
    }


def encoder_flops(width: int, mlp: int, matrices: int, lengths: Iterable[int]) -> int:
    """FLOPs of one bidirectional encoder layer over sequences (windows) of these lengths, `matrices` in its MLP."""
    lengths = list(lengths)
    return 2 * sum(lengths) * (4 * width**2 + matrices * width * mlp) + 4 * width * sum(n**2 for n in lengths)


def kv_bytes(info: ModelInfo, tokens_by_layer: Any, dtype_bytes: int = 2) -> int:
    """Bytes of keys and values held (or read by one step) for `tokens_by_layer`: one number for all layers, or [L]."""
    tokens = np.asarray(tokens_by_layer, dtype=np.int64)
    if tokens.ndim > 1 or (tokens.ndim == 1 and tokens.shape[0] != info.n_layers):
        raise InputError(f"tokens_by_layer must be one number or {info.n_layers} numbers, not shape {tokens.shape}")
    if (tokens < 0).any() or dtype_bytes < 1:
        raise InputError("token counts must not be negative, and a number takes at least one byte")
    total = int(np.broadcast_to(tokens, (info.n_layers,)).sum())
    return 2 * total * info.n_kv_heads * info.head_dim * dtype_bytes


def llm_parameters(info: ModelInfo) -> dict[str, int]:
    """Weights of the language model's matrices by part: embedding, layers, head (norm vectors are left out)."""
    return {
        "embedding": info.vocab * info.hidden,
        "layers": info.n_layers * (_row_flops(info) // 2),
        "head": info.vocab * info.hidden,
    }


def decode_traffic(
    info: ModelInfo, prompt_length: int, n_image: int, kept_by_layer: Any, dtype_bytes: int = 2, batch: int = 1
) -> np.ndarray:
    """Bytes that each decode step must read from memory: the weights once, and the keys and values of every sample.

    Returns [steps - 1] int64, for forward passes 1.. (every sample of the batch as this one). At 16 bits and batch 1
    weights dominate, which bounds what dropping image tokens can do for decode latency.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    counts = token_counts(info, prompt_length, n_image, kept_by_layer)
    parameters = llm_parameters(info)
    weights = (parameters["layers"] + parameters["head"]) * dtype_bytes
    cache = [batch * kv_bytes(info, np.asarray(row), dtype_bytes) for row in counts.kv_read[1:]]
    return weights + np.asarray(cache, dtype=np.int64)


def _row_flops(info: ModelInfo) -> int:
    """FLOPs of one row through one layer's matrices: q, k, v, o and the three of the gated MLP."""
    query, key = info.n_heads * info.head_dim, info.n_kv_heads * info.head_dim
    return 2 * info.hidden * (2 * query + 2 * key + 3 * info.mlp)


def _checked(info: ModelInfo, prompt_length: int, n_image: int, kept_by_layer: Any) -> Any:
    """`kept_by_layer` as an array or tensor of a workable type, or an InputError that says what is wrong with it."""
    if not 0 <= n_image <= prompt_length or prompt_length < 1:
        raise InputError(f"a prompt of {prompt_length} tokens cannot hold {n_image} image tokens")
    if hasattr(kept_by_layer, "detach"):
        kept = kept_by_layer
        if not kept.is_floating_point():
            kept = kept.long()
    else:
        kept = np.asarray(kept_by_layer)
        kept = kept.astype(np.int64 if kept.dtype.kind in "iub" else np.float64)
    if kept.ndim != 2 or kept.shape[0] < 1 or kept.shape[1] != info.n_layers:
        raise InputError(f"kept_by_layer must be [steps, {info.n_layers}] with steps >= 1, not {tuple(kept.shape)}")
    if not (kept >= 0).all() or not (kept <= n_image).all():  # written so that NaN fails too
        raise InputError(f"kept_by_layer must lie between 0 and the {n_image} image tokens of the prompt")
    return kept


def flop_steps(
    info: ModelInfo, prompt_length: int, n_image: int, kept_by_layer: Any, convention: str = "cached"
) -> np.ndarray:
    """FLOPs of each forward pass apart, [steps] float64; their sum is `flops` (vision and projector are in step 0).

    Arguments and errors as there. A step's entry depends on that step's row of `kept_by_layer` only.
    """
    counts = token_counts(info, prompt_length, n_image, kept_by_layer)
    if convention != "cached":
        per_step = np.asarray(paper_layer_flops(counts.kv_read, info.hidden, info.mlp), dtype=np.float64).sum(-1)
        if convention == "paper-prefill":
            per_step[1:] = 0.0
        elif convention != "paper":
            raise InputError(f"unknown FLOPs convention {convention!r}; known: {', '.join(CONVENTIONS)}")
        return per_step
    kept = np.asarray(kept_by_layer)
    first = flop_parts(info, prompt_length, n_image, kept[:1], "cached")
    decode = 4 * info.n_heads * info.head_dim * np.asarray(counts.kv_read[1:], dtype=np.float64).sum(-1)
    decode = decode + info.n_layers * _row_flops(info) + info.head_dim + 2 * info.hidden * info.vocab
    return np.concatenate(([float(sum(first.values()))], decode))
