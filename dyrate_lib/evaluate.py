"""Predictions over a data set: a method in, one small plain record per picture out.

What comes back is plain JSON: text, tokens, the tokens kept at each step, FLOPs ratios. `prepared` makes what goes in.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .accounting import flops
from .errors import InputError
from .generation import GenerationOutput, generate
from .methods import Method, NoReduction
from .models import FEATURES, Adapter, model_info
from .predictor import RatePredictor
from .prepared import batches, clear_cache, features, pictures

if TYPE_CHECKING:
    from .datasets import CaptionDataset

CONVENTIONS = ("paper", "paper-prefill", "cached")
ENGINE = "reference"  # the study's records are the plain loop's on every device, so that no kernel of ours stands in them

__all__ = [
    "CONVENTIONS", "ENGINE", "MethodFor", "batches", "beam_records", "clear_cache", "describe", "features", "output_records",
    "pictures", "predict", "predictor_hash",
]  # fmt: skip

MethodFor = Callable[[list[int]], Method]


def describe(method: Method | None) -> dict[str, Any]:
    """A method as JSON, to put into a record's configuration: its name and fields; of a predictor the hash of its weights."""
    if method is None:
        method = NoReduction()
    if not isinstance(method, Method):
        raise InputError(f"method must be a Method such as FastV(), or None; got {type(method).__name__}.")
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if not f.name.startswith("_")}  # type: ignore[arg-type]
    if isinstance(fields.get("predictor"), RatePredictor):
        fields["predictor"] = predictor_hash(fields["predictor"])
    return {"method": method.name, **{key: _plain(value) for key, value in fields.items()}}


def predictor_hash(predictor: Any) -> str:
    """16 hex digits from a predictor's weights, layer and inputs; not from its metadata."""
    kind = "" if predictor.inputs == "shares" else f"/{predictor.inputs}"
    digest = hashlib.sha256(f"{predictor.n_heads}/{predictor.n_rates}/{predictor.layer}{kind}".encode())
    for name, value in sorted(predictor.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def predict(
    model: Any,
    processor: Any,
    dataset: CaptionDataset,
    method: Method | MethodFor | None = None,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    decoding: Mapping[str, Any] | None = None,
    indices: Sequence[int] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Replies to the items of a data set under a method.

    Args:
        method: a Method, None (unpruned), or a function from a batch's indices to a Method, for one that differs by picture.
        decoding: None is greedy. {"num_beams": k, ..} is stock `generate` under the method's context manager.
            {"do_sample": True, "top_p", "top_k", "temperature", "seed"} samples in our loop; the draw of a batch depends
            on the seed and on the batch's first index, so it holds for one batch size and device.
        indices: which items; None is all.

    Returns:
        One dict a picture, in order, of JSON values: id, text, tokens (the reply's ids with EOS), steps (forward passes),
        kept (image tokens read at layers >= P, a number a step), prompt_length and n_image (tokens), flops (ratio to the
        unpruned model over the same steps, by convention; "cached-llm" is `cached` without vision tower, projector and
        head) and unpruned (FLOPs by convention). Under beams kept is the mean over the picture's beams and FLOPs are
        those of one beam.

    Raises:
        InputError: unknown decoding settings, a method that does not fit; before the model runs.
    """
    decoding = _checked_decoding(decoding)
    beams = int(decoding.get("num_beams", 1))
    count = len(dataset) if indices is None else len(indices)
    loader = batches(model, processor, dataset, indices, max(1, batch_size // beams))
    records: list[dict[str, Any]] = []
    from tqdm import tqdm

    with tqdm(total=count, desc="predict", unit="picture", disable=not progress) as bar:
        for some, inputs in loader:
            now = method(some) if callable(method) and not isinstance(method, Method) else method
            ids = [dataset[index].id for index in some]
            if beams > 1:
                records += beam_records(model, processor, inputs, now, max_new_tokens, decoding, ids)
            else:
                if now is None or type(now).embed is Method.embed:
                    found = features(model, processor, dataset, some, inputs)
                    inputs = inputs if found is None else {**inputs, FEATURES: found}
                records += _ours(model, processor, inputs, now, max_new_tokens, decoding, ids, some[0])
            bar.update(len(some))
    return records


def _checked_decoding(decoding: Mapping[str, Any] | None) -> dict[str, Any]:
    settings = dict(decoding or {})
    known = {"num_beams", "length_penalty", "do_sample", "top_p", "top_k", "temperature", "seed"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise InputError(f"unknown decoding settings {unknown}: there are {', '.join(sorted(known))}")
    if settings.get("num_beams", 1) < 1:
        raise InputError(f"num_beams must be at least 1, not {settings['num_beams']}")
    if settings.get("num_beams", 1) > 1 and settings.get("do_sample"):
        raise InputError("beams that sample are not supported: choose num_beams or do_sample")
    if settings.get("do_sample") and settings.get("seed") is None:
        raise InputError("sampling needs a seed, so that its record can be made again")
    return settings


def _ours(
    model: Any, processor: Any, inputs: dict[str, Tensor], method: Method | None, max_new_tokens: int,
    decoding: dict[str, Any], ids: list[str], first: int,
) -> list[dict[str, Any]]:  # fmt: skip
    options = {key: value for key, value in decoding.items() if key in ("do_sample", "top_p", "top_k", "temperature")}
    if decoding.get("do_sample"):
        options["seed"] = int(decoding["seed"]) * 1_000_003 + first
    out = generate(model, inputs, method, max_new_tokens, processor=processor, engine=ENGINE, **options)
    return output_records(out, ids)


def output_records(out: GenerationOutput, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The records (see `predict`) of one finished `generate`, one a sample."""
    trace = out.trace
    for name in ("kept", "kept_by_layer", "valid", "n_image", "prompt_length"):  # one transfer, not one a sample
        setattr(trace, name, getattr(trace, name).cpu())
    texts, tokens, lengths = out.text, out.new_tokens.tolist(), out.lengths.tolist()
    seen: dict[tuple, tuple[dict, dict]] = {}
    records = []
    for b, name in enumerate(ids):
        steps = int(trace.valid[b].sum())
        length, n_image = int(trace.prompt_length[b]), int(trace.n_image[b])
        key = (length, n_image, steps, trace.kept_by_layer[b, :steps].numpy().tobytes())
        if key not in seen:
            seen[key] = _ratios({convention: out.sample_flops(b, convention) for convention in CONVENTIONS})
        ratios, unpruned = seen[key]
        records.append(
            {
                "id": name, "text": texts[b], "tokens": tokens[b][: lengths[b]], "steps": steps,
                "kept": trace.kept[b, :steps].tolist(), "prompt_length": length, "n_image": n_image,
                "flops": dict(ratios), "unpruned": dict(unpruned),
            }
        )  # fmt: skip
    return records


def _ratios(counts: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    ratios = {convention: round(count.ratio, 7) for convention, count in counts.items()}
    ratios["cached-llm"] = round(counts["cached"].part_ratio("prefill", "decode"), 7)
    return ratios, {convention: float(count.unpruned) for convention, count in counts.items()}


def beam_records(
    model: Any, processor: Any, inputs: dict[str, Tensor], method: Method | None, max_new_tokens: int,
    decoding: dict[str, Any], ids: list[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """The records (see `predict`) of one batch by beam search: stock `generate` under the method's context manager."""
    method = method if method is not None else NoReduction()
    adapter, beams = Adapter(model), int(decoding["num_beams"])
    options = {"length_penalty": float(decoding.get("length_penalty", 1.0))}
    with method(model) as pruning, torch.no_grad():
        sequences = model.generate(
            **inputs, num_beams=beams, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=adapter.eos_token_ids,
            pad_token_id=adapter.pad_token_id, **options,
        )  # fmt: skip
        kept = [step.cpu().double().view(len(ids), beams).mean(1) for step in pruning.kept]
    n_image = (inputs["input_ids"] == adapter.image_token_id).sum(-1).tolist()
    lengths = inputs["attention_mask"].sum(-1).tolist()
    info, first = model_info(model), method.resolve_layer(adapter.n_layers)
    records = []
    for b, name in enumerate(ids):
        tokens = _until_end(sequences[b, inputs["input_ids"].shape[1] :].tolist(), adapter.eos_token_ids)
        steps = len(tokens)
        # without hooks (nothing pruned) there is no trace; a hypothesis may be one token longer than the passes recorded
        by_step = np.array([float(step[b]) for step in kept[:steps]] or [n_image[b]], dtype=np.float64)
        by_step = np.concatenate([by_step, np.repeat(by_step[-1:], steps - len(by_step))])
        by_layer = np.full((steps, adapter.n_layers), float(n_image[b]))
        for layer in range(first, adapter.n_layers):
            by_layer[:, layer] = method.at_layer(layer, torch.tensor(by_step), torch.tensor([n_image[b]]))
        if method.reversible:  # the prompt's pass carries every token, whatever is read
            by_layer[0] = n_image[b]
        counts = {convention: flops(info, lengths[b], n_image[b], by_layer, convention) for convention in CONVENTIONS}
        ratios, unpruned = _ratios(counts)
        records.append(
            {
                "id": name, "text": processor.decode(tokens, skip_special_tokens=True).strip(), "tokens": tokens,
                "steps": steps, "kept": by_step.round(2).tolist(), "prompt_length": lengths[b], "n_image": n_image[b],
                "flops": ratios, "unpruned": unpruned,
            }
        )  # fmt: skip
    return records


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """A reply up to and with its first end token."""
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens
