"""The families beside LLaVA-1.5, one adapter each: where their parts are, and what a picture of theirs is.

Only what differs from `models.Adapter` is here. Facts are those of the model classes in transformers; sizes are counted
before the vision tower runs, so that a batch that does not fit is refused before any work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .accounting import encoder_flops
from .errors import InputError
from .masks import IMG, PAD
from .models import Adapter


class LlavaNextAdapter(Adapter):
    """LLaVA-NeXT (1.6): a picture is an overview and up to four (or more) crops of the tower's size, "anyres".

    The crops' patches form one grid; the rows and columns that only padding made are cut off, and each row ends with an
    `image_newline` token. Newlines stand at image placeholders and are image tokens here: they are ranked and dropped
    like the others. inputs: pixel_values [pictures, crops, 3, h, w] (pictures with fewer crops padded) or
    [all crops, 3, h, w]; image_sizes [pictures, 2], height and width in pixels.
    """

    classes = ("LlavaNextForConditionalGeneration",)
    model_types = ("llava_next",)
    inputs = needed = ("pixel_values", "image_sizes")

    def vision_dimensions(self) -> dict[str, int]:
        return {**super().vision_dimensions(), "n_image_tokens": 0}

    def picture_sizes(self, inputs: Mapping[str, Any]) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        side, overview = vision.image_size // vision.patch_size, super().vision_dimensions()["n_image_tokens"]
        sizes = []
        for size in self._image_sizes(inputs):
            rows, columns = get_anyres_image_grid_shape(size, pinpoints, vision.image_size)
            grid = unpad_image(torch.empty(1, rows * side, columns * side, device="meta"), size)
            sizes.append(overview + grid.shape[1] * (grid.shape[2] + 1))
        return sizes

    def picture_pixels(self, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        pixels, crops = inputs["pixel_values"], self.picture_crops(inputs)
        if pixels.ndim == 5:
            return [picture[:n] for picture, n in zip(pixels, crops, strict=True)]
        return list(pixels.split(crops))

    def picture_features(self, inputs: Mapping[str, Any], dtype: torch.dtype) -> Sequence[Tensor]:
        return self.core.get_image_features(
            pixel_values=inputs["pixel_values"].to(dtype),
            image_sizes=inputs["image_sizes"],
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            return_dict=True,
        ).pooler_output

    def picture_flops(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        dims = super().vision_dimensions()
        d, rows = dims["vision_hidden"], dims["vision_tokens"]
        tower = 2 * self.clip_patches * d * 3 * dims["patch"] ** 2
        tower += dims["vision_layers"] * encoder_flops(d, dims["vision_mlp"], 2, [rows])
        hidden = self.text_config.hidden_size
        projector = 2 * dims["n_image_tokens"] * hidden * (dims["feature_dim"] + hidden)
        return [(n * tower, n * projector) for n in self.picture_crops(inputs)]

    def check(self, inputs: Mapping[str, Any]) -> list[int]:
        owners, pixels = super().check(inputs), inputs.get("pixel_values")
        if pixels is not None:
            crops = self.picture_crops(inputs)
            fits = pixels.shape[0] == len(crops) and pixels.shape[1] >= max(crops) if pixels.ndim == 5 else False
            if not fits and not (pixels.ndim == 4 and pixels.shape[0] == sum(crops)):
                raise InputError(
                    f"image_sizes ask for {crops} crops, pixel_values have shape {tuple(pixels.shape)}: pass both as the "
                    "processor returned them."
                )
        return owners

    def repeat_pictures(self, inputs: Mapping[str, Any], times: int) -> dict[str, Tensor]:
        if inputs["pixel_values"].ndim == 4:  # crop after crop: first one row a picture, padded
            inputs = {**inputs, "pixel_values": pad_sequence(list(self.picture_pixels(inputs)), batch_first=True)}
        return super().repeat_pictures(inputs, times)

    def _image_sizes(self, inputs: Mapping[str, Any]) -> list[list[int]]:
        return torch.as_tensor(inputs["image_sizes"]).tolist()

    def picture_crops(self, inputs: Mapping[str, Any]) -> list[int]:
        """Crops of every picture, the overview included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side, pinpoints = self.config.vision_config.image_size, self.config.image_grid_pinpoints
        return [image_size_to_num_patches(size, pinpoints, side) for size in self._image_sizes(inputs)]


class Qwen25VLAdapter(Adapter):
    """Qwen2.5-VL: pictures of any size, a tower with window attention and no CLS, positions with three axes (M-RoPE).

    The positions of image tokens count time, height and width; text goes on from the highest of the three. Positions are
    always those that ids and grids imply; stock transformers falls back to one axis if `mm_token_type_ids` is not passed.
    inputs: pixel_values [patches of all pictures, values]; image_grid_thw [pictures, 3] in patches. No videos.
    """

    classes = ("Qwen2_5_VLForConditionalGeneration",)
    model_types = ("qwen2_5_vl",)
    inputs = needed = ("pixel_values", "image_grid_thw")
    pictures_in_rows = False
    tower = "visual"

    def vision_dimensions(self) -> dict[str, int]:
        vision = self.config.vision_config
        merged = vision.hidden_size * vision.spatial_merge_size**2
        return {
            "n_image_tokens": 0, "vision_layers": vision.depth, "vision_hidden": vision.hidden_size,
            "vision_mlp": vision.intermediate_size, "vision_heads": vision.num_heads, "vision_tokens": 0,
            "patch": vision.patch_size, "image_size": 0, "projector_hidden": merged, "feature_dim": merged,
        }  # fmt: skip

    def picture_sizes(self, inputs: Mapping[str, Any]) -> list[int]:
        merge = self.config.vision_config.spatial_merge_size**2
        return [math.prod(grid) // merge for grid in inputs["image_grid_thw"].tolist()]

    def picture_pixels(self, inputs: Mapping[str, Any]) -> Sequence[Tensor]:
        return inputs["pixel_values"].split([math.prod(grid) for grid in inputs["image_grid_thw"].tolist()])

    def picture_features(self, inputs: Mapping[str, Any], dtype: torch.dtype) -> Sequence[Tensor]:
        pixels = inputs["pixel_values"].to(dtype)
        return self.core.get_image_features(pixels, image_grid_thw=inputs["image_grid_thw"]).pooler_output

    def picture_flops(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        vision = self.config.vision_config
        d, merge, patch = vision.hidden_size, vision.spatial_merge_size, vision.patch_size
        window = vision.window_size // merge // patch  # side of a window in merged tokens
        out = []
        for frames, height, width in inputs["image_grid_thw"].tolist():
            rows, columns = _chunks(height // merge, window), _chunks(width // merge, window)
            windows = [row * column * merge**2 for row in rows for column in columns] * frames
            full = len([index for index in vision.fullatt_block_indexes if index < vision.depth])
            tower = 2 * frames * height * width * d * vision.in_channels * vision.temporal_patch_size * patch**2
            tower += full * encoder_flops(d, vision.intermediate_size, 3, [height * width] * frames)
            tower += (vision.depth - full) * encoder_flops(d, vision.intermediate_size, 3, windows)
            merged, tokens = d * merge**2, frames * height * width // merge**2
            out.append((tower, 2 * tokens * merged * (merged + vision.out_hidden_size)))
        return out

    def check(self, inputs: Mapping[str, Any]) -> list[int]:
        if inputs.get("pixel_values_videos") is not None:
            raise InputError("Videos are not supported: pass pictures only.")
        owners, pixels = super().check(inputs), inputs.get("pixel_values")
        if pixels is not None:
            patches = int(inputs["image_grid_thw"].prod(-1).sum())
            if pixels.shape[0] != patches:
                raise InputError(f"image_grid_thw asks for {patches} patches, pixel_values hold {pixels.shape[0]}.")
            image = inputs["input_ids"] == self.image_token_id
            starts = int(image[:, 0].sum() + (image[:, 1:] & ~image[:, :-1]).sum())
            if starts != len(owners):
                raise InputError(
                    f"{len(owners)} pictures stand in {starts} runs of image tokens: text or <|vision_end|> must part them, "
                    "or their positions cannot be told."
                )
        return owners

    def positions(self, types: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if inputs.get("pixel_values") is None:
            return super().positions(types, inputs)[..., None].repeat(1, 1, 3)
        found, _ = self.core.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=(types == IMG).int(), image_grid_thw=inputs["image_grid_thw"],
            attention_mask=(types != PAD).long(),
        )  # fmt: skip
        return found.permute(1, 2, 0).contiguous()

    def stock_positions(self, position_ids: Tensor, types: Tensor) -> Tensor:
        if position_ids.ndim == 2:
            return position_ids[..., None].expand(*types.shape, 3)
        return position_ids[-3:].permute(1, 2, 0).expand(*types.shape, 3)  # of four, the first is a count for packing

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """As the base; positions without axes (renumbered ones) count on all three alike."""
        if position_ids.ndim == 2:
            position_ids = position_ids[..., None].expand(*position_ids.shape, 3)
        return super().rotary(position_ids.permute(2, 0, 1), like)


class Idefics3Adapter(Adapter):
    """Idefics3 and SmolVLM: a picture is tiles and an overview, each an equal run of image tokens with text between runs.

    Chosen for its differences: the decoder is LLaMA's under another name, the tower is SigLIP (no CLS), four patches are
    merged into a token, and pictures come per prompt. A "picture" in the sense of this library is one tile: which tiles
    belong together is written in the text only. inputs: pixel_values [B, tiles, 3, h, w], absent tiles all zero;
    pixel_attention_mask [B, tiles, h, w] or absent.
    """

    classes = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    model_types = ("idefics3", "smolvlm")
    inputs = ("pixel_values", "pixel_attention_mask")
    pictures_in_rows = False
    decoder = "text_model"
    tower = "vision_model"

    def vision_dimensions(self) -> dict[str, int]:
        vision, merge = self.config.vision_config, self.config.scale_factor**2
        return {
            "n_image_tokens": 0, "vision_layers": vision.num_hidden_layers, "vision_hidden": vision.hidden_size,
            "vision_mlp": vision.intermediate_size, "vision_heads": vision.num_attention_heads,
            "vision_tokens": (vision.image_size // vision.patch_size) ** 2, "patch": vision.patch_size,
            "image_size": vision.image_size, "projector_hidden": 0, "feature_dim": vision.hidden_size * merge,
        }  # fmt: skip

    def picture_sizes(self, inputs: Mapping[str, Any]) -> list[int]:
        return [self._patches(inputs) // self.config.scale_factor**2] * len(self.picture_pixels(inputs))

    def picture_pixels(self, inputs: Mapping[str, Any]) -> Tensor:
        tiles = inputs["pixel_values"]
        if tiles.ndim != 5:
            raise InputError(f"pixel_values must be [batch, tiles, 3, height, width], got shape {tuple(tiles.shape)}.")
        tiles = tiles.flatten(0, 1)
        return tiles[(tiles != 0).flatten(1).any(-1)]

    def picture_features(self, inputs: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        pixels, mask = inputs["pixel_values"].to(dtype), inputs.get("pixel_attention_mask")
        return self.core.get_image_features(pixels, pixel_attention_mask=mask, return_dict=True).pooler_output

    def picture_flops(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        dims, patches = self.vision_dimensions(), self._patches(inputs)
        d, features = dims["vision_hidden"], dims["feature_dim"]
        tower = 2 * patches * d * 3 * dims["patch"] ** 2
        tower += dims["vision_layers"] * encoder_flops(d, dims["vision_mlp"], 2, [patches])
        connector = 2 * (patches // self.config.scale_factor**2) * features * self.text_config.hidden_size
        return [(tower, connector)] * len(self.picture_pixels(inputs))

    def _patches(self, inputs: Mapping[str, Any]) -> int:
        """Patches of one tile."""
        patch, (height, width) = self.config.vision_config.patch_size, inputs["pixel_values"].shape[-2:]
        return (height // patch) * (width // patch)


def _chunks(length: int, size: int) -> list[int]:
    """`length` in pieces of `size`, the last one shorter."""
    return [min(size, length - start) for start in range(0, length, size)]


FAMILIES: tuple[type[Adapter], ...] = (Adapter, LlavaNextAdapter, Qwen25VLAdapter, Idefics3Adapter)
