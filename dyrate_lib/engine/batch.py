"""A batch as the engine reads it: every prompt flush left, so that the causal mask alone keeps padding out of sight.

Padding then stands behind a prompt's last token, where no real token looks, and the caches have no holes: lengths say it all.
The layers from P on get their rows in the prompt's order (so the causal mask serves there too) and each row knows the
entry of the cache that it goes to: image tokens by rank, text behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Prompt, gather_columns, image_columns, token_types
from ..masks import IMG, PAD
from ..methods.base import Method
from ..methods.staged import Staged
from ..models import Adapter
from .cache import rounded

NUMBERS = ("ids", "types", "positions", "image_index", "lengths", "n_image", "last", "places")


@dataclass
class Batch:
    """B prompts of up to T tokens, N image tokens; all int64, on whatever device they were made.

    types [B, T], PAD behind the end; positions [B, T] or [B, T, axes]; image_index [B, N], columns of the image tokens, -1
    absent; lengths, n_image [B]; last [B, 1] or [B, 1, axes], the highest position; order [B, T], the column of the padded
    prompt that each comes from. Either ids [B, T] and places [pictures' tokens], where these go among the B T rows, or
    embeds [B, T', D], those of the padded prompt. features [pictures' tokens, D]: what the vision tower makes of the pictures.
    prompt: the trace's part of the prompt.
    """

    types: Tensor
    positions: Tensor
    image_index: Tensor
    lengths: Tensor
    n_image: Tensor
    last: Tensor
    order: Tensor
    prompt: Prompt
    ids: Tensor
    places: Tensor
    longest_text: int
    embeds: Tensor | None = None
    features: Tensor | None = None

    @classmethod
    def of(cls, prompt: Prompt, ids: Tensor | None = None, multiple: int = 1) -> Batch:
        """From a prompt padded on the left (or anywhere), with its embeddings or its ids [B, T'].

        multiple: T becomes a whole number of it, by padding.
        """
        real, image = prompt.types != PAD, prompt.types == IMG
        lengths, n_image = real.sum(-1), image.sum(-1)
        longest, text = torch.stack((lengths.max(), (lengths - n_image).max())).tolist()
        order = torch.argsort((~real).long(), dim=-1, stable=True)[:, :longest]
        order = F.pad(order, (0, rounded(longest, multiple) - longest))
        moved = real.long().cumsum(-1) - 1  # where each column goes
        columns = prompt.image_index
        columns = torch.where(columns < 0, -1, torch.gather(moved, 1, columns.clamp(min=0)))
        behind = torch.arange(order.shape[1], device=order.device) >= lengths[:, None]
        types = gather_columns(prompt.types, order).masked_fill(behind, PAD)
        none = lengths[:0]
        return cls(
            types=types, positions=gather_columns(prompt.position_ids, order), image_index=columns, lengths=lengths,
            n_image=n_image, last=prompt.last_position, order=order, prompt=prompt,
            ids=none if ids is None else gather_columns(ids, order),
            places=none if ids is None else (types == IMG).flatten().nonzero()[:, 0], longest_text=int(text),
            embeds=prompt.embeds if ids is None else None,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.types.shape[0], self.types.shape[1]

    def packed(self) -> Tensor:
        """All numbers that the device needs, in the order of `NUMBERS`, as one int64 vector."""
        return torch.cat([getattr(self, name).flatten() for name in NUMBERS])


def elaborate(adapter: Adapter, method: Method, copies: int) -> bool:
    """Whether a batch needs the method's and the family's own way from inputs to embeddings."""
    plain = type(method).embed is Method.embed and type(method).order is Method.order
    return not (plain and type(adapter) is Adapter and copies == 1) or isinstance(method, Staged)


def take_in(
    adapter: Adapter, method: Method, inputs: Mapping[str, Any], see: Callable[[Tensor], Tensor], copies: int = 1,
    multiple: int = 1,
) -> Batch:  # fmt: skip
    """A batch from a model's inputs; every row `copies` times; columns in a whole number of `multiple`.

    see: from pixel values to the vision tower's tokens [pictures' tokens, D]; called as soon as the inputs are checked, so that
    the device is at work while the host lays out the rest.

    Where the family is LLaVA-1.5's and the method leaves pictures and their order alone, ids are laid out by the host and the
    vision tower is left to `see` (`Batch.ids`); otherwise the method's own `embed` does it all (`Batch.embeds`).

    Raises:
        InputError: as `Adapter.check`.
    """
    if elaborate(adapter, method, copies):
        prompt = method.embed(adapter, inputs)
        if copies > 1:
            rows = torch.arange(prompt.types.shape[0], device=prompt.types.device).repeat_interleave(copies)
            prompt = replace(prompt.select(rows), embeds=prompt.embeds[rows])
        return Batch.of(prompt, None, multiple)
    here = {key: value.cpu() if key in ("input_ids", "attention_mask") else value for key, value in inputs.items()}
    owners = adapter.check(here)
    features = see(inputs["pixel_values"]) if owners else None
    ids = here["input_ids"]
    types = token_types(ids, here.get("attention_mask"), adapter.image_token_id)
    cost = [[0, 0] for _ in range(ids.shape[0])]
    for owner, parts in zip(owners, adapter.picture_flops(inputs) if owners else []):
        cost[owner] = [so_far + part for so_far, part in zip(cost[owner], parts)]
    none = ids.new_zeros(ids.shape[0])
    prompt = Prompt(
        embeds=none, types=types, position_ids=adapter.positions(types, here), image_index=image_columns(types),
        content_key=none, vision_flops=torch.tensor(cost),
    )  # fmt: skip
    return replace(Batch.of(prompt, ids, multiple), features=features)


def tail_rows(
    types: Tensor, image_index: Tensor, ranking: Tensor, kept: Tensor, slots: int, rows: int
) -> tuple[Tensor, Tensor]:
    """What a layer from P on receives: the kept image tokens and the text, in the prompt's order, flush left.

    types [B, T]; image_index, ranking [B, N]; kept [B]; slots: entries of the cache before the text; rows: how many to give,
    at least the most that a sample has. Returns columns [B, rows] int64 (into T) and dest [B, rows] int32: the entry of the
    cache that each goes to (rank, or slots + number of the text token), -1 for padding.
    """
    batch, length = types.shape
    text = (types != IMG) & (types != PAD)
    entry = torch.where(text, slots + text.long().cumsum(-1) - 1, -1)
    n = ranking.shape[1]
    if n:
        places = torch.arange(n, device=types.device).expand_as(ranking)
        rank = torch.zeros_like(ranking).scatter(1, ranking, places)
        rank = torch.where((rank < kept[:, None]) & (image_index >= 0), rank, -1)
        # absent image tokens write beyond the end, where it is cut off
        wide = torch.cat((entry, entry.new_full((batch, 1), -1)), dim=1)
        wide = wide.scatter(1, torch.where(image_index >= 0, image_index, length), rank)
        entry = wide[:, :length]
    columns = torch.argsort((entry < 0).long(), dim=-1, stable=True)[:, :rows]
    return columns, torch.gather(entry, 1, columns).int()


def last_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """The last real row of each sample: x [B, T, D], lengths [B] to [B, D]."""
    index = (lengths - 1).long().view(-1, 1, 1).expand(-1, 1, x.shape[-1])
    return torch.gather(x, 1, index)[:, 0]
