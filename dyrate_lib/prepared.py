"""Pictures and prompts of a data set as a model takes them, and what is kept of them from one method to the next.

Pictures are rendered or decoded, and processed, once per process and kept on the model's device, so that a table of many
methods pays for them once. So is what the vision tower makes of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .models import Adapter, ModelInfo, model_info
from .prompts import IMAGE_TOKEN, chat_prompt

if TYPE_CHECKING:
    from .datasets import CaptionDataset, Item

CACHE_BYTES = {"cuda": 3 * 2**30, "cpu": 2**29}  # of a process: several may share a card
CACHE_SHARE = 0.1  # of a card's memory at most: a small one has to hold weights and activations besides
FEATURE_BYTES = {"cuda": 2**30, "cpu": 2**28}  # of a model; a thousand pictures of a scenes model take half a GB
_RENDER_BATCH = 64
_pictures: dict[tuple, Tensor] = {}
# of each model, by what the features follow from beside the weights: (the weights they were made with, features)
_features: weakref.WeakKeyDictionary[Any, dict[tuple, tuple[tuple, Tensor]]] = weakref.WeakKeyDictionary()


def clear_cache() -> None:
    """Forget all processed pictures and kept features (and give their memory back)."""
    _pictures.clear()
    _features.clear()


@torch.no_grad()
def features(
    model: Any, processor: Any, dataset: CaptionDataset, indices: Sequence[int], inputs: Mapping[str, Any]
) -> Tensor | None:
    """What tower and projector make of a batch's pictures, [image tokens, D]: kept for the next method over this batch.

    A small model's tower takes a good part of a short reply's time, and a table asks for the same pictures under each method.
    Kept by batch, so that the numbers are those of a run without. Weights that were replaced or changed in place since are
    noticed by torch's counts of changes, writes through `.data` are not. None where nothing is kept: on devices other than
    CPUs and GPUs, and for tensors made in inference mode, which count no changes.
    """
    parameters = list(model.parameters())
    room = FEATURE_BYTES.get(parameters[0].device.type, 0)
    if parameters[0].device.type == "cuda":
        room = min(room, int(CACHE_SHARE * torch.cuda.get_device_properties(parameters[0].device).total_memory))
    if not room or any(p.is_inference() for p in parameters):
        return None
    weights = tuple((p.data_ptr(), p._version) for p in parameters)
    places = tuple(_place(dataset, dataset[index]) for index in indices)
    key = (parameters[0].device, _signature(processor), inputs["pixel_values"].dtype, torch.get_num_threads(), places)
    known = _features.setdefault(model, {})
    if key not in known or known[key][0] != weights:
        adapter = Adapter(model)
        made = adapter.joined_features(inputs, adapter.core.get_input_embeddings().weight.dtype)
        known.pop(key, None)
        if sum(kept.nbytes for _, kept in known.values()) + made.nbytes > room:
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
    # one item of each picture: the prompts of a task share theirs
    missing = [index for index in {keys[i]: i for i in items}.values() if keys[index] not in _pictures]
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
    """What makes a picture: a scene's split and number, and its look (families share pictures), or the folder and id."""
    if "scene" not in item.meta:
        return (dataset.spec, item.id)
    look = item.meta.get("look")
    return ("scenes", item.meta["scene"].id, None if look is None or look.plain else look)


def _signature(processor: Any) -> str:
    settings = processor.image_processor.to_dict()
    return repr(sorted((key, str(value)) for key, value in settings.items() if key != "image_processor_type"))


def _process(processor: Any, items: list[Item], device: torch.device) -> Tensor:
    if all("scene" in item.meta for item in items) and _is_clip_336(processor.image_processor):
        from .scenes.data import normalise

        return normalise(_render(items, device))
    made = processor.image_processor([item.image for item in items], return_tensors="pt")["pixel_values"]
    return made.to(device=device, dtype=torch.float32)


def _render(items: list[Item], device: torch.device) -> Tensor:
    """Scenes with their looks: float32 [B, 3, 336, 336] in 0..1."""
    from .scenes import render_batch

    scenes, looks = [item.meta["scene"] for item in items], [item.meta.get("look") for item in items]
    if all(look is None or look.plain for look in looks):
        return render_batch(scenes, device)
    from .scenes.looks import render_looks
    from .scenes.render import pack_scenes
    from .scenes.tasks import PLAIN

    return render_looks(*pack_scenes(scenes), [look or PLAIN for look in looks], device)


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
