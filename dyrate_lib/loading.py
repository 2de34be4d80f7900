"""Loading VLMs and preparing their inputs: shipped, local, from a hub, or random at published dimensions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import paths
from .checksums import check_sums
from .errors import InputError, ResourceError

SCENES = ("scenes-small", "scenes-base")
# The exact dimensions of the published checkpoints (their config.json files); weights are random.
_LLAVA_DIMS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llava-1.5-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    # for tests: the same classes, small enough for a CPU, 36 image tokens
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 8, "num_attention_heads": 4},
}


def prepare_inputs(
    processor: Any,
    images: list | None,
    prompts: list[str],
    device: str | torch.device | None = None,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """Pictures and full chat prompts to a left-padded batch.

    images: for each prompt a PIL picture (or path, or bytes), a list of several, or None for a text-only prompt; or None
    for none at all.
    Returns input_ids and attention_mask [B, T] int64 and, if there are pictures, what the model's family takes them in:
    pixel_values [pictures, 3, h, w] float32 for LLaVA-1.5 (see the adapters for the others).

    Raises:
        InputError: no processor, or no lists; not an image; placeholders (`<image>`, or the processor's own) and pictures
            that do not match in number, prompt by prompt; a prompt longer than `max_length` tokens.
    """
    from .images import ImageSource, load_image
    from .models import families

    if getattr(processor, "tokenizer", None) is None:
        raise InputError(f"A processor is needed, got {type(processor).__name__}: pass the second of what load_vlm() returned.")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InputError(f"prompts must be a list of texts, got {type(prompts).__name__}: write [prompt] for a single one.")
    if images is not None and (isinstance(images, ImageSource) or not isinstance(images, Iterable)):
        raise InputError(
            f"images must be a list, one entry for each prompt, got {type(images).__name__}: write [picture] for a single one."
        )
    images = list(images) if images is not None else [None] * len(prompts)
    if not prompts:
        raise InputError("No prompts were given: pass at least one.")
    if len(images) != len(prompts):
        raise InputError(
            f"{len(images)} images for {len(prompts)} prompts: pass one for each, None for a text-only prompt."
        )
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError(f"Prompt {i} is no text that can be written as UTF-8: {str(prompt)[:80]!r}")
    token = getattr(processor, "image_token", "<image>")
    rows = [list(image) if isinstance(image, list | tuple) else [] if image is None else [image] for image in images]
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        found, wanted = prompt.count(token), len(row)
        if found != wanted:
            raise InputError(
                f"Prompt {i} holds {found} {token} placeholder(s) but {wanted} picture(s): write {token} once where each "
                "picture belongs (chat_prompt() does), and none in a text-only prompt."
            )
    pictures: list = [[load_image(image) for image in row] for row in rows]
    by_prompt = hasattr(processor, "image_seq_len")  # Idefics3 and SmolVLM; the others take all pictures in one list
    if not by_prompt:
        pictures = [picture for row in pictures for picture in row]
    processor.tokenizer.padding_side = "left"
    batch = processor(images=pictures if any(rows) else None, text=prompts, padding=True, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    if max_length is not None and length > max_length:
        raise InputError(f"The longest prompt has {length} tokens, more than the {max_length} allowed: shorten it.")
    keys = ["input_ids", "attention_mask", *dict.fromkeys(key for family in families() for key in family.inputs)]
    if "image_grid_thw" in batch:
        keys.append("mm_token_type_ids")  # from which stock transformers makes Qwen's positions
    return {key: batch[key].to(device) if device is not None else batch[key] for key in keys if key in batch}


def _device_and_dtype(device: Any, dtype: Any) -> tuple[torch.device, torch.dtype]:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except (RuntimeError, TypeError) as error:  # torch's own words list two dozen kinds
        raise InputError(f"device={device!r} is none that torch knows: pass 'cpu', 'cuda' or 'cuda:1'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "A GPU was asked for (device='cuda') but torch sees none: use device='cpu', or install a CUDA build."
        )
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise InputError(f"dtype={dtype!r} is no precision of weights: pass 'float32', 'bfloat16' or 'float16'.")
    return device, known


def load_vlm(
    name: str | Path, device: Any = None, dtype: Any = None, attn_implementation: str = "sdpa"
) -> tuple[Any, Any]:
    """Load a VLM and its processor: `(model, processor)`, the model in eval mode.

    name: "scenes-small" or "scenes-base" (shipped); a hub id, or a local folder in the hub's layout, of a supported family
        (LLaVA-1.5 as in `llava-hf/llava-1.5-7b-hf`, LLaVA-NeXT, Qwen2.5-VL, Idefics3, SmolVLM);
        "random:llava-1.5-7b", "random:llava-1.5-13b", "random:tiny": the exact dimensions with random weights (seed 0),
        for speed and memory only, never for quality; their processor has the scenes vocabulary.
    device: None takes a GPU where there is one. dtype: None is float32 on a CPU, bfloat16 on a GPU.

    Raises:
        ResourceError: weights, a package that the processor needs, or a GPU missing. InputError: the name, device or dtype is
            unknown; the folder holds a model of another family, or a file that its SHA256SUMS does not fit.
    """
    device, dtype = _device_and_dtype(device, dtype)
    name = str(name)
    if name.startswith("random:"):
        model, processor = _random_vlm(name.removeprefix("random:"), device, dtype, attn_implementation)
    else:
        model, processor = _pretrained_vlm(name, device, dtype, attn_implementation)
    model.eval().requires_grad_(False)
    model.dyrate_name, model.dyrate_processor = name, processor
    return model, processor


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own progress bars: for loads that take moments, or where a bar of ours is shown."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pretrained_vlm(name: str, device: torch.device, dtype: torch.dtype, attn: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from .models import Adapter, families

    source = str(paths.checkpoints() / name) if name in SCENES else name
    looks_local = name in SCENES or name.startswith((".", "/", "~")) or Path(source).exists()
    source = str(Path(source).expanduser()) if looks_local else source
    if name in SCENES and not (Path(source) / "config.json").is_file():
        raise ResourceError(
            f"{name} is not in {paths.checkpoints()}: `dyrate fetch PATH` copies it there from a checkout, a folder "
            "or an archive; or set DYRATE_HOME to a checkout."
        )
    if not looks_local and "/" not in name:  # a hub id has one; without this the hub would be asked for half a minute
        ours = [*SCENES, *(f"random:{kind}" for kind in _LLAVA_DIMS)]
        near = difflib.get_close_matches(name, ours, cutoff=0.4) or ours
        raise InputError(
            f"{name!r} is no folder, and no model of that name is known: did you mean {' or '.join(near)}? A hub id names its "
            "owner, too, as in 'llava-hf/llava-1.5-7b-hf'."
        )
    if looks_local and not (Path(source) / "config.json").is_file():
        raise ResourceError(
            f"No model at {source}: config.json is missing. Pass the folder that save_pretrained wrote, or a hub id."
        )
    if looks_local:
        check_sums(source)
    try:
        # said outright: by default transformers asks at a terminal whether to run code that lies beside the weights
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        known = [kind for family in families() for kind in family.model_types]
        if config.model_type not in known:
            raise InputError(f"{name} is a {config.model_type!r} model; supported are {', '.join(known)}.")
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attn, use_safetensors=True, trust_remote_code=False
        )
        Adapter(model)  # refuses decoders that no adapter knows
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a broken config, or one that brings code
        raise InputError(f"{name} cannot be loaded without running foreign code, or is broken: {error}") from error
    except (OSError, SafetensorError) as error:  # a weight file that was cut off
        raise ResourceError(f"Weights or processor files of {name} could not be loaded: {error}") from error
    except ImportError as error:  # the processors of Qwen2.5-VL and Idefics3 need torchvision
        raise ResourceError(f"The processor of {name} needs a package that is not installed: {error}") from error
    if config.model_type.startswith("llava") and getattr(processor, "patch_size", None) is None:
        # older LLaVA folders leave these to the model's config
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1
    processor.tokenizer.padding_side = "left"
    return model.to(device), processor


def _random_vlm(kind: str, device: torch.device, dtype: torch.dtype, attn: str) -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from .scenes.tokenizer import build_processor

    if kind not in _LLAVA_DIMS:
        raise InputError(f"random:{kind} is unknown; there are {', '.join('random:' + k for k in _LLAVA_DIMS)}.")
    tiny = kind == "tiny"
    vision = (
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=84,
            patch_size=14,
            projection_dim=64,
        )
        if tiny
        else CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        )
    )
    processor = build_processor()
    side = 84 if tiny else 336
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    tokenizer = processor.tokenizer
    vocab = len(tokenizer) if tiny else 32064
    text = LlamaConfig(
        vocab_size=vocab, max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, rms_norm_eps=1e-5, **_LLAVA_DIMS[kind],
    )  # fmt: skip
    settings: dict[str, Any] = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}  # another name in its signature
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=(side // 14) ** 2, vision_feature_layer=-2,
        vision_feature_select_strategy="default", **settings,
    )  # fmt: skip
    with torch.device("meta"):
        needed = sum(p.numel() for p in LlavaForConditionalGeneration(config).parameters()) * dtype.itemsize
    check_memory(f"random:{kind}", needed, device, dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(0)
            model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attn)
            if tiny:  # weights as large as in a trained model, so that attention is far from uniform
                for parameter in model.parameters():
                    parameter.data.add_(torch.randn_like(parameter) * 0.18)
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def check_memory(name: str, needed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse weights that cannot fit, before they are allocated and the system kills the process.

    needed: bytes. Where the free memory cannot be told (no /proc/meminfo), nothing is refused.

    Raises:
        ResourceError: more bytes than are free on the device.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise ResourceError(
            f"{name} in {str(dtype).removeprefix('torch.')} needs {needed / 1e9:.1f} GB for its weights, {free / 1e9:.1f} GB "
            f"are free on {device.type}: use a smaller model, dtype='bfloat16', or a device with more memory."
        )


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device, None where that cannot be told or memory is not used (the meta device)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if device.type == "cpu" and meminfo.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
