"""Predictions over a data set: a method in, one small plain record per picture out.

Pictures are rendered or decoded, and processed, once per process and kept on the model's device, so that a table of many
methods pays for them once. What comes back is plain JSON: text, tokens, the tokens kept at each step, FLOPs ratios.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .accounting import flops
from .errors import InputError
from .generation import GenerationOutput, generate
from .methods import DyRate, Method, NoReduction
from .models import FEATURES, Adapter, ModelInfo, model_info
from .prompts import IMAGE_TOKEN, chat_prompt

if TYPE_CHECKING:
    from .datasets import CaptionDataset, Item

CONVENTIONS = ("paper", "paper-prefill", "cached")
ENGINE = "reference"  # the study's records are the plain loop's on every device, so that no kernel of ours stands in them
CACHE_BYTES = {"cuda": 12 * 2**30, "cpu": 2**29}
CACHE_SHARE = 0.1  # of a card's memory at most: a small one has to hold weights and activations besides
_RENDER_BATCH = 64
_pictures: dict[tuple, Tensor] = {}
FEATURE_BYTES = 2**28
_features: weakref.WeakKeyDictionary[Any, dict[tuple, tuple[tuple, Tensor]]] = weakref.WeakKeyDictionary()

MethodFor = Callable[[list[int]], Method]


def describe(method: Method | None) -> dict[str, Any]:
    """A method as JSON, to put into a record's configuration: its name and fields; of a predictor the hash of its weights."""
    if method is None:
        method = NoReduction()
    if not isinstance(method, Method):
        raise InputError(f"method must be a Method such as FastV(), or None; got {type(method).__name__}.")
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if not f.name.startswith("_")}  # type: ignore[arg-type]
    if isinstance(method, DyRate):
        fields["predictor"] = predictor_hash(method.predictor)
    return {"method": method.name, **{key: _plain(value) for key, value in fields.items()}}


def predictor_hash(predictor: Any) -> str:
    """16 hex digits from a predictor's weights and layer; not from its metadata."""
    digest = hashlib.sha256(f"{predictor.n_heads}/{predictor.n_rates}/{predictor.layer}".encode())
    for name, value in sorted(predictor.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


# -------------------------------------------------------------------------------------------------------- pictures


def clear_cache() -> None:
    """Forget all processed pictures (and give their memory back)."""
    _pictures.clear()
    _features.clear()


@torch.no_grad()
def features(
    model: Any, processor: Any, dataset: CaptionDataset, indices: Sequence[int], inputs: Mapping[str, Any]
) -> Tensor | None:
    """What tower and projector make of a batch's pictures, [image tokens, D]: on a CPU kept for the next method over this batch.

    A small model's tower takes a good part of a short reply's time, and a table asks for the same pictures under each method.
    Kept by batch, so that the numbers are those of a run without; weights that were changed since are noticed. None where
    nothing is kept: on other devices, and for tensors made in inference mode, which count no changes.
    """
    parameters = list(model.parameters())
    if parameters[0].device.type != "cpu" or any(p.is_inference() for p in parameters):
        return None
    weights = tuple((p.data_ptr(), p._version) for p in parameters)
    places = tuple(_place(dataset, dataset[index]) for index in indices)
    key = (_signature(processor), inputs["pixel_values"].dtype, torch.get_num_threads(), places)
    known = _features.setdefault(model, {})
    if key not in known or known[key][0] != weights:
        adapter = Adapter(model)
        made = adapter.joined_features(inputs, adapter.core.get_input_embeddings().weight.dtype)
        known.pop(key, None)
        if sum(kept.nbytes for _, kept in known.values()) + made.nbytes > FEATURE_BYTES:
            known.clear()
        known[key] = (weights, made)
    return known[key][1]


def pictures(processor: Any, dataset: CaptionDataset, indices: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Pixel values of some items of a data set, as the processor makes them: [B, 3, h, w] float32 on `device`.

    Each picture is made once per process and device, as long as the cache has room (`CACHE_BYTES`). Scenes are rendered
    on the device itself; the result equals that of the PIL picture through the processor to float rounding.
    """
    device = torch.device(device)
    space = (str(device), _signature(processor))
    items = {index: dataset[index] for index in indices}
    keys = {index: (*space, _place(dataset, item)) for index, item in items.items()}
    missing = [index for index in items if keys[index] not in _pictures]
    held = sum(value.numel() * value.element_size() for value in _pictures.values() if value.device.type == device.type)
    fresh: dict[tuple, Tensor] = {}
    for start in range(0, len(missing), _RENDER_BATCH):
        some = missing[start : start + _RENDER_BATCH]
        made = _process(processor, [items[index] for index in some], device)
        fresh.update((keys[index], picture) for index, picture in zip(some, made.unbind(0), strict=True))
    size = sum(value.numel() * value.element_size() for value in fresh.values())
    if held + size <= _cache_room(device):
        # clones: a view would keep its whole batch alive
        _pictures.update({key: value.clone() for key, value in fresh.items()})
    return torch.stack([fresh[keys[i]] if keys[i] in fresh else _pictures[keys[i]] for i in indices])


def _cache_room(device: torch.device) -> int:
    """Bytes that processed pictures may take on a device."""
    room = CACHE_BYTES.get(device.type, 0)
    if device.type != "cuda":
        return room
    return min(room, int(CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory))


def _place(dataset: CaptionDataset, item: Item) -> tuple:
    """What makes a picture: a scene's split and number (all caption families share pictures), or the folder and id."""
    return ("scenes", item.id) if "scene" in item.meta else (dataset.spec, item.id)


def _signature(processor: Any) -> str:
    settings = processor.image_processor.to_dict()
    return repr(sorted((key, str(value)) for key, value in settings.items() if key != "image_processor_type"))


def _process(processor: Any, items: list[Item], device: torch.device) -> Tensor:
    if all("scene" in item.meta for item in items) and _is_clip_336(processor.image_processor):
        from .scenes import render_batch
        from .scenes.data import normalise

        return normalise(render_batch([item.meta["scene"] for item in items], device))
    made = processor.image_processor([item.image for item in items], return_tensors="pt")["pixel_values"]
    return made.to(device=device, dtype=torch.float32)


def _is_clip_336(image_processor: Any) -> bool:
    from .scenes.tokenizer import CLIP_MEAN, CLIP_STD

    settings = image_processor.to_dict()
    size, crop = dict(settings.get("size") or {}), dict(settings.get("crop_size") or {})
    return (
        size.get("shortest_edge") == 336
        and (crop.get("height"), crop.get("width")) == (336, 336)
        and np.allclose(settings.get("image_mean"), CLIP_MEAN)
        and np.allclose(settings.get("image_std"), CLIP_STD)
    )


def tokenised(processor: Any, info: ModelInfo, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Full chat strings, each with one `<image>`, as a left-padded batch: input_ids and attention_mask [B, T] int64.

    The same ids as `prepare_inputs` gives with pictures, made without them.
    """
    token = getattr(processor, "image_token", IMAGE_TOKEN)
    for prompt in prompts:
        if prompt.count(token) != 1:
            raise InputError(f"the prompt {prompt!r} holds {prompt.count(token)} {token} placeholders, one is needed")
    processor.tokenizer.padding_side = "left"
    texts = [prompt.replace(token, token * info.n_image_tokens) for prompt in prompts]
    batch = processor.tokenizer(texts, padding=True, return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def batches(
    model: Any, processor: Any, dataset: CaptionDataset, indices: Sequence[int] | None = None, batch_size: int = 16
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of prepared inputs on the model's device: (indices, {input_ids, attention_mask, pixel_values}).

    Raises:
        InputError: no indices, one out of range, a batch size below 1; raised before the first batch.
    """
    chosen = list(range(len(dataset))) if indices is None else [int(index) for index in indices]
    if not chosen or batch_size < 1:
        raise InputError(f"there is nothing to batch: {len(chosen)} items, batch size {batch_size}")
    wrong = [index for index in chosen if not 0 <= index < len(dataset)]
    if wrong:
        raise InputError(f"item {wrong[0]} of a data set of {len(dataset)}")
    return _batches(model, processor, dataset, chosen, batch_size)


def _batches(model: Any, processor: Any, dataset: CaptionDataset, chosen: list[int], batch_size: int) -> Iterator:
    parameter, info = next(model.parameters()), model_info(model)
    for start in range(0, len(chosen), batch_size):
        some = chosen[start : start + batch_size]
        inputs = tokenised(processor, info, [chat_prompt(dataset[index].prompt) for index in some])
        inputs = {key: value.to(parameter.device) for key, value in inputs.items()}
        inputs["pixel_values"] = pictures(processor, dataset, some, parameter.device).to(parameter.dtype)
        yield some, inputs


# ----------------------------------------------------------------------------------------------------- predictions


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
            cap = method.caps(layer, torch.tensor([n_image[b]]))
            by_layer[:, layer] = by_step if cap is None else np.minimum(by_step, float(cap[0]))
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
