"""An ablation: methods that renumber the tokens they leave, with positions kept instead. Everything else is theirs.

The released code of these methods closes the gaps: what is left of the picture gets positions 0, 1, 2, ... as if it lay
side by side. The study's own models read a patch's place from its position too, so the difference is worth a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..masks import IMG, PAD
from ..methods import CDPruner, DivPrune, Method


def keep_positions(short: Any) -> Any:
    """A reduced prompt whose image rows are picked tokens, one picture a row, with the positions of the unpruned prompt."""
    image, real = short.types == IMG, short.types != PAD
    if not image.any():
        return short
    if int((image.sum(-1) - (short.picked >= 0).sum(-1)).abs().max()):
        raise InputError("positions can be kept where every image row is a token of the picture, of one picture a prompt")
    after = real & ~image & (image.long().cumsum(-1) > 0)
    dropped = (short.full_n_image - image.sum(-1))[:, None]
    positions = short.position_ids + torch.where(after, dropped, 0)
    first = torch.where(image, short.position_ids, short.types.shape[1]).amin(-1, keepdim=True)
    patches = torch.where(short.picked >= 0, short.picked, short.types.shape[1] * 1000).sort(-1).values
    places = torch.gather(patches, 1, (image.long().cumsum(-1) - 1).clamp(min=0))
    return replace(short, position_ids=torch.where(image, first + places, positions))


@dataclass
class DivPruneKept(DivPrune):
    """DivPrune with the positions of the unpruned prompt."""

    name: ClassVar[str] = "divprune, positions kept"

    def cut(self, adapter: Any, prompt: Any, ids: Tensor, seen: list) -> Any:
        return keep_positions(super().cut(adapter, prompt, ids, seen))


@dataclass
class CDPrunerKept(CDPruner):
    """CDPruner with the positions of the unpruned prompt."""

    name: ClassVar[str] = "cdpruner, positions kept"

    def cut(self, adapter: Any, prompt: Any, ids: Tensor, seen: list) -> Any:
        return keep_positions(super().cut(adapter, prompt, ids, seen))


KEPT: dict[str, type[Method]] = {"divprune": DivPruneKept, "cdpruner": CDPrunerKept}
RENUMBER = ("sparsevlm", "pyramiddrop", *KEPT)  # keys of the rows that are run both ways


def with_positions(key: str, method: Any) -> Method:
    """The method of that key at the same setting, with positions kept."""
    if hasattr(method, "renumber"):
        return replace(method, renumber=False)
    return KEPT[key](**{field.name: getattr(method, field.name) for field in fields(method)})
