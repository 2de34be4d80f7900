"""A batch of prompts as the language model sees it: embeddings, token types, positions, and whose picture is where.

Pure tensor functions. How a family's pictures become tokens is the adapter's part (`models.py`, `families.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .masks import IMG, INS, PAD, SYS


@dataclass
class Prompt:
    """A batch of prompts as the language model sees it.

    embeds: [B, T, D]; types: [B, T] int64 (PAD, SYS, IMG, INS of `masks`);
    position_ids: [B, T] int64, or [B, T, axes] where a family has several axes (M-RoPE: time, height, width); 0 on padding;
    image_index: [B, N] int64, the column of every image token in order, -1 where a row has fewer than N;
    content_key: [B] int64, a number made from the row's own ids and pixels, the same in any batch;
    picture_index: [B, N] int64 or None, the number within its row of the picture that an image token belongs to, -1 where
    absent; vision_flops: [B, 2] int64 or None, FLOPs of vision tower and projector for the row's pictures.
    full_n_image, full_length: [B] int64 or None, what `n_image` and `length` were before a method cut the pictures; picked:
    [B, K] int64 or None, the image tokens (raster order) that it kept, the most important first, -1 past the end.
    """

    embeds: Tensor
    types: Tensor
    position_ids: Tensor
    image_index: Tensor
    content_key: Tensor
    picture_index: Tensor | None = None
    vision_flops: Tensor | None = None
    full_n_image: Tensor | None = None
    full_length: Tensor | None = None
    picked: Tensor | None = None

    @property
    def n_image(self) -> Tensor:
        """[B] int64: image tokens in each row."""
        return (self.types == IMG).sum(-1)

    @property
    def length(self) -> Tensor:
        """[B] int64: prompt tokens in each row, image tokens counted, padding not."""
        return (self.types != PAD).sum(-1)

    @property
    def last_position(self) -> Tensor:
        """[B, 1] or [B, 1, axes] int64: the highest position of each row; the reply goes on from there."""
        highest = self.position_ids.flatten(1).amax(-1)
        return highest.view(-1, *[1] * (self.position_ids.ndim - 1)).expand_as(self.position_ids[:, :1])

    def select(self, index: Tensor) -> Prompt:
        """The rows `index` (beam search), embeddings left out: nothing reads them after the prompt's own pass."""
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and field.name != "embeds":
                chosen[field.name] = value.index_select(0, index.to(value.device))
        return replace(self, **chosen)


def gather_columns(x: Tensor, columns: Tensor) -> Tensor:
    """Columns [B, S] of x [B, T] or [B, T, ..]: [B, S] or [B, S, ..]."""
    trailing = x.shape[2:]
    index = columns.view(*columns.shape, *[1] * len(trailing)).expand(*columns.shape, *trailing)
    return torch.gather(x, 1, index)


def take_entries(cache: Tensor, columns: Tensor) -> Tensor:
    """Columns [B, R] of keys or values [B, heads, S, d]: [B, heads, R, d]."""
    return torch.gather(cache, 2, columns[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3]))


def token_types(input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int) -> Tensor:
    """Type of every prompt token by its position: [B, T] int64 of PAD, SYS, IMG, INS.

    SYS is all before the (first) picture, INS all after it that is not a picture. A row without a picture is all INS.
    """
    image = input_ids == image_token_id
    real = torch.ones_like(image) if attention_mask is None else attention_mask.bool()
    image = image & real
    seen = image.long().cumsum(-1) > 0
    has_image = image.any(-1, keepdim=True)
    types = torch.where(seen | ~has_image, INS, SYS)
    types = torch.where(image, IMG, types)
    return torch.where(real, types, PAD)


def image_columns(types: Tensor) -> Tensor:
    """Columns of the image tokens: [B, N] int64 in order, -1 where a row has fewer than the largest N."""
    image = types == IMG
    n = int(image.sum(-1).max()) if image.numel() else 0
    order = torch.argsort((~image).long(), dim=-1, stable=True)[:, :n]
    return torch.where(torch.gather(image, 1, order), order, -1)


def picture_owners(per_row: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The row that each picture belongs to. per_row: image tokens of every prompt; sizes: tokens of every picture.

    Pictures come in the order of the prompts, as processors make them.

    Raises:
        InputError: placeholders and pictures do not fit, in all or within one prompt.
    """
    if sum(per_row) != sum(sizes):
        raise InputError(
            f"{len(sizes)} picture(s) need {sum(sizes)} image tokens, the prompts hold {sum(per_row)}: give each picture "
            "one <image> placeholder, and each placeholder a picture."
        )
    owners: list[int] = []
    for row, count in enumerate(per_row):
        while count > 0:
            size = sizes[len(owners)]
            if size > count:
                raise InputError(
                    f"Prompt {row} holds {per_row[row]} image tokens, which is no whole number of its pictures (the next "
                    f"has {size}): pass the pictures in the order of the prompts, each with its own placeholder."
                )
            count -= size
            owners.append(row)
    return owners


def picture_numbers(owners: Sequence[int], sizes: Sequence[int], image_index: Tensor) -> Tensor:
    """`Prompt.picture_index` [B, N] from the pictures' rows and sizes; -1 where `image_index` is."""
    out = torch.full_like(image_index, -1)
    if len(owners):
        numbers = torch.tensor(_places(owners), device=out.device)
        out[image_index >= 0] = numbers.repeat_interleave(torch.tensor(list(sizes), device=out.device))
    return out


def _places(owners: Sequence[int]) -> list[int]:
    """The number of each picture within its row."""
    seen: dict[int, int] = {}
    places = []
    for owner in owners:
        places.append(seen.get(owner, 0))
        seen[owner] = places[-1] + 1
    return places


def content_key(
    input_ids: Tensor, types: Tensor, pictures: Tensor | Sequence[Tensor] = (), owners: Sequence[int] = ()
) -> Tensor:
    """[B] int64 made by integer arithmetic from a row's ids and its pictures' pixels: independent of the batch around it.

    pictures: one tensor of pixels for each picture, of any shape; owners: the row that each belongs to.
    """
    real = types != PAD
    n_cols = real.long().cumsum(-1) * real
    key = (input_ids.long() * real * (n_cols * 2654435761 % 1000003)).sum(-1)
    if len(owners):
        if isinstance(pictures, Tensor):  # all of one shape: one pass
            sums = _pixel_sums(pictures.flatten(1))
        else:
            sums = torch.stack([_pixel_sums(picture.reshape(1, -1))[0] for picture in pictures])
        # the same pictures in another order are another prompt: the k-th of a row counts 2 k + 1 times
        weights = 2 * torch.tensor(_places(owners), device=key.device) + 1
        key = key.index_add(0, torch.tensor(list(owners), device=key.device), sums.to(key.device) * weights)
    return key % (2**31 - 1)


def _pixel_sums(flat: Tensor) -> Tensor:
    """[P, values] pixels to [P] int64."""
    values = (flat.float() * 997).round().long()
    weights = torch.arange(values.shape[1], device=values.device) % 8191 + 1
    return (values * weights).sum(-1)


def check_inputs(inputs: Any) -> None:
    """Refuse what is no prepared batch at all, whatever its model. Raises InputError."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise InputError("inputs must hold input_ids [B, T], as prepare_inputs() makes them.")
    if ids.shape[0] == 0:
        raise InputError("inputs hold no prompt: input_ids must have at least one row.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids must be token numbers (int64), got {ids.dtype}.")


def check_batch(input_ids: Tensor, attention_mask: Tensor | None, max_length: int) -> None:
    """Refuse ids and mask that the model would misread, before any work.

    Raises:
        InputError: wrong shapes, right padding, or a prompt longer than the context.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise InputError(
            f"input_ids must be [batch, tokens] with at least one token, got shape {tuple(input_ids.shape)}."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} differ in shape."
        )
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        empty = (~attention_mask.bool().any(-1)).nonzero()[:, 0].tolist()
        if empty:
            raise InputError(f"attention_mask is 0 in all of row {empty[0]}: a prompt needs at least one token that is read.")
        raise InputError("The batch is padded on the right; set processor.tokenizer.padding_side = 'left' to generate.")
    if input_ids.shape[1] > max_length:
        raise InputError(
            f"The prompt has {input_ids.shape[1]} tokens, image tokens counted, "
            f"the model's context {max_length}: shorten the prompt."
        )
