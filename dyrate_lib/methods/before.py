"""Methods that cut before the language model: fewer rows stand for a picture, and the model itself runs unpruned.

A method says what is left of each picture (`reduce`); this base puts it in the prompt's place of the picture, in our own
loop (`embed`, `runner`) as under stock `generate` (`hooks_before.StockReduction`). Positions are renumbered without gaps
and decode goes on from there, as the released code of all these methods does; with several position axes (M-RoPE), where
a number is a place in the picture, kept tokens keep theirs. Text-only prompts pass through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..layout import gather_columns, image_columns
from ..masks import IMG, INS, PAD
from .base import Method

if TYPE_CHECKING:
    from ..hooks_before import StockReduction
    from ..models import Adapter, Prompt


@dataclass(frozen=True)
class EncoderView:
    """What a method sees of M pictures (or crops of pictures) of N tokens each.

    embeds: [M, N, D], the tokens as the language model would read them; hidden: the vision tower's hidden states, each
    [M, N + 1, C] with CLS first, entry 0 the input of vision layer 0 (none at all if the method has `tower` False);
    instruction, instruction_ids: M times [W, D] and [W], the text after the prompt's first picture (with the chat
    template's words after the question), the same for every picture of a prompt; picture: M numbers of pictures within
    the batch's n_pictures (a picture of several crops stands several times); adapter: for vision layers and projector.
    """

    embeds: Tensor
    hidden: tuple[Tensor, ...]
    instruction: list[Tensor]
    instruction_ids: list[Tensor]
    picture: list[int]
    n_pictures: int
    adapter: Adapter

    @property
    def features(self) -> Tensor:
        """[M, N, C]: the patches of the vision layer that feeds the projector, CLS left out."""
        return self.hidden[self.adapter.vision_feature_index][:, 1:]


@dataclass(frozen=True)
class Reduction:
    """What is left of M pictures. Rows past a picture's count are padding.

    rows: [M, K, D] embeddings, in the order the language model reads them; count: [M] int64; patch: [M, K] int64, the
    picture token (raster order) that each row is or grew from, -1 for none; ranking: [M, R] int64, tokens picked, the
    most important first, -1 past the end.
    """

    rows: Tensor
    count: Tensor
    patch: Tensor
    ranking: Tensor

    @classmethod
    def picked(cls, view: EncoderView, picks: Tensor) -> Reduction:
        """Tokens picks [M, K] (in order of importance) as they are, in raster order."""
        patch = picks.sort(-1).values
        count = torch.full_like(picks[:, 0], picks.shape[1])
        return cls(gather_columns(view.embeds, patch), count, patch, picks)


class BeforeLLM(Method):
    """Base of the methods that cut before the language model. Subclasses define `reduce` and `kept_count`.

    tower: whether `reduce` reads the vision tower, which must then be a CLIP with a CLS token. Pictures of several crops
    (LLaVA-NeXT) are then reduced crop by crop, and their row separators, which belong to whole rasters, left out;
    otherwise the picture's tokens are taken together, separators and all.
    """

    layer = 0  # the first layer already sees kept tokens only
    tower: bool = False

    def reduce(self, view: EncoderView) -> Reduction:
        """What is left of each picture."""
        raise InputError(f"{type(self).__name__} does not say what is left of a picture: define reduce().")

    def kept_count(self, n_image: int) -> int | None:
        """Rows that a picture of `n_image` tokens leaves, or None where that depends on the picture.

        Raises:
            InputError: the settings ask for more than there is.
        """
        raise InputError(f"{type(self).__name__} does not say how many rows it keeps: define kept_count().")

    def plan(self, n_image: int, n_layers: int, steps: int = 1) -> np.ndarray:
        """See `Method.plan`; for one picture seen whole, the same at every layer and step."""
        if n_image < 0 or steps < 1:
            raise InputError(f"a plan needs n_image >= 0 and steps >= 1, not {n_image} and {steps}")
        count = self.kept_count(n_image) if n_image else 0
        if count is None:
            raise InputError(
                f"{type(self).__name__}: how many tokens stay depends on the picture, so there is no plan to foretell: "
                "give a ratio, or count them in the trace of a run."
            )
        return np.full((steps, n_layers), count, dtype=np.int64)

    def resolve_layer(self, n_layers: int) -> int:
        return 0

    def check(self, adapter: Adapter, inputs: Mapping[str, Any] | None = None) -> None:
        """Refuse a model, or a batch's pictures, that the method does not fit, before any work. Raises InputError."""
        if self.tower:
            adapter.check_clip(type(self).__name__)
            self.kept_count(adapter.clip_patches)
        elif inputs is not None and inputs.get("pixel_values") is not None:
            for n in set(adapter.picture_sizes(inputs)):
                self.kept_count(n)

    def embed(self, adapter: Adapter, inputs: Any) -> Prompt:
        """Encode the pictures, cut, and put what is left in place. `Prompt.full_length` is what it was before."""
        self.check(adapter, inputs)
        seen: list[list[Tensor]] = []
        handles = watch_tower(adapter, seen) if self.tower else []
        try:
            prompt = adapter.embed(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return self.cut(adapter, prompt, inputs, seen)

    def cut(
        self, adapter: Adapter, prompt: Prompt, inputs: Mapping[str, Any], seen: list[list[Tensor]]
    ) -> Prompt:
        """The prompt [B, T] of `inputs` with its pictures reduced. seen: hidden states of the tower's runs, in order."""
        pictures, ids = _pictures(prompt), inputs["input_ids"]
        hidden: tuple[Tensor, ...] = ()
        crops = [1] * len(pictures)
        if self.tower and pictures:
            hidden = tuple(torch.cat(states) for states in zip(*seen, strict=True))
            crops = adapter.picture_crops(inputs)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (_, columns) in enumerate(pictures):
            groups.setdefault((columns.shape[0], crops[index]), []).append(index)
        starts = np.cumsum([0, *crops])
        left: list[list[Reduction]] = [[] for _ in pictures]
        for (_, n_crops), members in groups.items():
            rows = torch.tensor([pictures[i][0] for i in members], device=ids.device)
            embeds = torch.stack([prompt.embeds[pictures[i][0], pictures[i][1]] for i in members])
            states = hidden
            if hidden:
                which = torch.tensor([c for i in members for c in range(starts[i], starts[i + 1])], device=ids.device)
                states = tuple(state[which.to(state.device)] for state in hidden)
                if n_crops > 1:
                    rows = rows.repeat_interleave(n_crops)
                    patches = states[adapter.vision_feature_index][:, 1:]
                    embeds = adapter.project_features(patches).to(prompt.embeds.dtype)
            told = [prompt.types[row] == INS for row in rows.tolist()]
            view = EncoderView(
                embeds, states,
                [prompt.embeds[row, text] for row, text in zip(rows.tolist(), told, strict=True)],
                [ids[row, text] for row, text in zip(rows.tolist(), told, strict=True)],
                [index for index in members for _ in range(n_crops)], len(pictures), adapter,
            )  # fmt: skip
            found = self.reduce(view)
            for place, index in enumerate(members):
                for crop in range(place * n_crops, (place + 1) * n_crops):
                    left[index].append(_one(found, crop, (crop - place * n_crops) * embeds.shape[1]))
        return _splice(prompt, pictures, left)

    def runner(self, adapter: Adapter, prompt: Prompt, capacity: int) -> ReducedRunner:
        return ReducedRunner(adapter, prompt, capacity)

    def __call__(self, model: Any) -> StockReduction:
        """A context manager under which stock `model.generate` reads reduced pictures."""
        from ..hooks_before import StockReduction

        return StockReduction(model, self)


class ReducedRunner:
    """The unpruned decoder on a prompt that was cut before; its trace tells which tokens stayed (see `Runner`)."""

    layer = 0

    def __init__(self, adapter: Adapter, prompt: Prompt, capacity: int) -> None:
        from ..decoder import PrunedDecoder

        self.prompt, self.inner = prompt, PrunedDecoder(adapter, prompt, None, capacity)

    def prefill(self) -> Tensor:
        return self.inner.prefill()

    def decode(self, token: Tensor) -> Tensor:
        return self.inner.decode(token)

    def kv_lengths(self) -> list[int]:
        return self.inner.kv_lengths()

    def snapshot(self) -> Any:
        found = self.inner.snapshot()
        return found if self.prompt.picked is None else replace(found, ranking=self.prompt.picked)


def watch_tower(adapter: Adapter, seen: list[list[Tensor]]) -> list[Any]:
    """Hooks (to be removed) that add the hidden states of each run of the vision tower to `seen`.

    On the layers themselves: what the tower returns of its states differs between releases of transformers.
    """

    def begin(module: Any, args: tuple, kwargs: dict) -> None:
        seen.append([args[0] if args else kwargs["hidden_states"]])

    def note(module: Any, args: tuple, output: Any) -> None:
        seen[-1].append(output[0] if isinstance(output, tuple) else output)

    layers = adapter.vision_layers
    first = layers[0].register_forward_pre_hook(begin, with_kwargs=True)
    return [first, *(layer.register_forward_hook(note) for layer in layers)]


def _pictures(prompt: Prompt) -> list[tuple[int, Tensor]]:
    """Row and columns [n] of every picture of the batch, in order."""
    found = []
    for row in range(prompt.types.shape[0]):
        columns = prompt.image_index[row]
        numbers = prompt.picture_index[row] if prompt.picture_index is not None else torch.where(columns < 0, -1, 0)
        for picture in range(int(numbers.max()) + 1 if numbers.numel() else 0):
            found.append((row, columns[numbers == picture]))
    return found


def _one(found: Reduction, index: int, offset: int) -> Reduction:
    """Picture `index` of a reduction without padding; its tokens counted from `offset`."""
    n = int(found.count[index])
    patch, ranking = found.patch[index, :n], found.ranking[index]
    ranking = ranking[ranking >= 0]
    return Reduction(
        found.rows[index, :n], found.count[index], torch.where(patch < 0, -1, patch + offset), ranking + offset
    )


def _splice(prompt: Prompt, pictures: list[tuple[int, Tensor]], left: list[list[Reduction]]) -> Prompt:
    """Put what is left of each picture where the picture was, and pad on the left again."""
    if not pictures:
        none = prompt.types[:, :0]
        return replace(prompt, full_n_image=prompt.n_image, full_length=prompt.length, picked=none)
    rows = []
    for row in range(prompt.types.shape[0]):
        mine = [(columns, found) for (owner, columns), found in zip(pictures, left, strict=True) if owner == row]
        rows.append(_splice_row(prompt, row, mine))
    length = max(row[0].shape[0] for row in rows)
    types = torch.stack([_pad_left(row[1], length, PAD) for row in rows])
    if prompt.position_ids.ndim > 2:
        position_ids = torch.stack([_pad_left(row[2], length, 0) for row in rows])
    else:
        position_ids = ((types != PAD).long().cumsum(-1) - 1).clamp(min=0)
    n = int((types == IMG).sum(-1).max())
    return replace(
        prompt,
        embeds=torch.stack([_pad_left(row[0], length, 0) for row in rows]),
        types=types, position_ids=position_ids, image_index=image_columns(types),
        picture_index=torch.stack([_pad_right(row[3], n) for row in rows]),
        full_n_image=prompt.n_image, full_length=prompt.length,
        picked=torch.stack([_pad_right(row[4], n) for row in rows]),
    )  # fmt: skip


def _splice_row(prompt: Prompt, row: int, mine: list[tuple[Tensor, list[Reduction]]]) -> list[Tensor]:
    """One row without padding: embeds, types, positions (kept ones, for M-RoPE), picture numbers, tokens picked."""
    none, axes = prompt.types.new_zeros(0), prompt.position_ids.ndim > 2
    out: list[list[Tensor]] = [[], [], [], [none], [none]]
    cursor, offset = int((prompt.types[row] == PAD).sum()), 0
    for number, (columns, found) in enumerate(mine):
        _add_text(out, prompt, row, slice(cursor, int(columns[0])))
        for part in found:
            positions = prompt.position_ids[row, columns[part.patch]] if axes else part.patch
            numbers, picked = torch.full_like(part.patch, number), part.ranking + offset
            news = (part.rows.to(prompt.embeds.dtype), torch.full_like(part.patch, IMG), positions, numbers, picked)
            for pieces, new in zip(out, news, strict=True):
                pieces.append(new)
        cursor, offset = int(columns[-1]) + 1, offset + columns.shape[0]
    _add_text(out, prompt, row, slice(cursor, None))
    return [torch.cat(pieces) for pieces in out]


def _add_text(out: list[list[Tensor]], prompt: Prompt, row: int, part: slice) -> None:
    for pieces, whole in zip(out, (prompt.embeds, prompt.types, prompt.position_ids), strict=False):
        pieces.append(whole[row, part])


def _pad_left(x: Tensor, length: int, value: int) -> Tensor:
    return torch.cat((x.new_full((length - x.shape[0], *x.shape[1:]), value), x))


def _pad_right(x: Tensor, length: int) -> Tensor:
    return torch.cat((x, x.new_full((length - x.shape[0],), -1)))
