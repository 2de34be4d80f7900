"""Tiny random models of every supported family, built from their configs, and inputs made by hand (no processor)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMAGE, PAD_ID, START, END, VOCAB = 7, 0, 8, 9, 120
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": PAD_ID, "eos_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 42,
    "patch_size": 14, "projection_dim": 32,
}  # fmt: skip


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _lively(model: Any) -> Any:
    """Weights as large as in a trained model, so that attention is far from uniform and biases are not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.generation_config.pad_token_id = PAD_ID
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Picture:
    """What one picture is: the ids that stand for it, and what the model takes for it."""

    ids: list[int]
    tokens: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """build() -> model; picture(seed) -> Picture; collate(pictures by row) -> inputs beside ids and mask."""

    build: Callable[[], Any]
    picture: Callable[[int], Picture]
    collate: Callable[[list[list[Picture]]], dict[str, Tensor]]

    def inputs(self, rows: Sequence[tuple[Sequence[int], int]]) -> dict[str, Tensor]:
        """A left-padded batch. rows: for every prompt the seeds of its pictures, and how many words follow them."""
        pictures = [[self.picture(seed) for seed in seeds] for seeds, _ in rows]
        ids = []
        for number, (row, (_, words)) in enumerate(zip(pictures, rows, strict=True)):
            text = (torch.arange(words) * (3 + number) % 40 + 20).tolist()
            middle = [token for place, picture in enumerate(row) for token in [*picture.ids, 11 + place]]
            ids.append([1, 15, 16, *middle, *text])
        length = max(len(row) for row in ids)
        out = {
            "input_ids": torch.tensor([[PAD_ID] * (length - len(row)) + row for row in ids]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
        }
        if any(pictures):
            out |= self.collate(pictures)
        return out


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=9,
    )
    return LlavaForConditionalGeneration(config)


def _llava_picture(seed: int) -> Picture:
    return Picture([IMAGE] * 9, 9, {"pixel_values": _noise(seed, 1, 3, 42, 42)})


def _stacked(pictures: list[list[Picture]]) -> dict[str, Tensor]:
    every = [picture for row in pictures for picture in row]
    return {key: torch.cat([picture.tensors[key] for picture in every]) for key in every[0].tensors}


def _next() -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP), image_token_id=IMAGE, image_grid_pinpoints=[[42, 84], [84, 42], [84, 84]],
        text_config=MistralConfig(**TEXT, num_key_value_heads=2, head_dim=16, sliding_window=None),
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config)


# height, width, crops, and rows x columns of the grid that is left when padding has been cut off, by hand
NEXT_SHAPES = ((84, 84, 5, 6, 6), (40, 84, 3, 3, 6), (84, 30, 3, 6, 3), (80, 50, 5, 6, 4))


def _next_picture(seed: int) -> Picture:
    height, width, crops, rows, columns = NEXT_SHAPES[seed % 4]
    tokens = 9 + rows * (columns + 1)
    pixels = torch.zeros(1, 5, 3, 42, 42)  # as the processor does: pictures with fewer crops are padded with zeros
    pixels[:, :crops] = _noise(seed, 1, crops, 3, 42, 42)
    return Picture([IMAGE] * tokens, tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])})


def _qwen() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {**TEXT, "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = Qwen2_5_VLConfig(
        text_config=text, image_token_id=IMAGE, video_token_id=6, vision_start_token_id=START, vision_end_token_id=END,
        vision_config={
            "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "window_size": 56,
            "fullatt_block_indexes": [1, 3], "out_hidden_size": 64,
        },
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


QWEN_GRIDS = ((1, 8, 8), (1, 4, 10), (1, 6, 4), (1, 10, 6))


def _qwen_picture(seed: int) -> Picture:
    grid = QWEN_GRIDS[seed % 4]
    patches = grid[0] * grid[1] * grid[2]
    tensors = {"pixel_values": _noise(seed, patches, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([grid])}
    return Picture([START, *[IMAGE] * (patches // 4), END], patches // 4, tensors)


def _idefics(smol: bool = False) -> Any:
    import transformers as tf

    names = ("SmolVLM", "SmolVLM") if smol else ("Idefics3", "Idefics3")
    vision = getattr(tf, f"{names[0]}VisionConfig")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = getattr(tf, f"{names[0]}Config")(
        vision_config=vision, text_config=tf.LlamaConfig(**TEXT, num_key_value_heads=2), image_token_id=IMAGE,
        scale_factor=2, pad_token_id=PAD_ID,
    )  # fmt: skip
    return getattr(tf, f"{names[1]}ForConditionalGeneration")(config)


def _idefics_picture(seed: int) -> Picture:
    tiles = 2 + seed % 3  # each tile four tokens, text between them
    ids = [token for tile in range(tiles) for token in [START, 30 + tile, *[IMAGE] * 4]] + [END]
    return Picture(ids, 4 * tiles, {"pixel_values": _noise(seed, tiles, 3, 56, 56)})


def _idefics_collate(pictures: list[list[Picture]]) -> dict[str, Tensor]:
    rows = [
        torch.cat([p.tensors["pixel_values"] for p in row]) if row else torch.zeros(0, 3, 56, 56) for row in pictures
    ]
    most = max(len(row) for row in rows)
    return {"pixel_values": torch.stack([torch.cat((row, row.new_zeros(most - len(row), 3, 56, 56))) for row in rows])}


FAMILIES = {
    "llava": Family(_llava, _llava_picture, _stacked),
    "llava-next": Family(_next, _next_picture, _stacked),
    "qwen2.5-vl": Family(_qwen, _qwen_picture, _stacked),
    "idefics3": Family(_idefics, _idefics_picture, _idefics_collate),
    "smolvlm": Family(functools.partial(_idefics, True), _idefics_picture, _idefics_collate),
}


@functools.cache
def model_of(name: str) -> Any:
    """The tiny model of a family, float32, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _lively(FAMILIES[name].build())


def stock_inputs(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stock generate needs beside: Qwen's processor also says which ids are pictures."""
    if name != "qwen2.5-vl":
        return inputs
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}
