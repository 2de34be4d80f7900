"""An ablation: methods that renumber the tokens they leave, with positions kept instead. Everything else is theirs.

The released code of these methods closes the gaps: what is left of the picture gets positions 0, 1, 2, ... as if it lay
side by side. A model that reads a patch's place from its position loses more by that than by the cut itself.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..errors import InputError
from ..masks import IMG, PAD
from ..methods import CDPruner, DivPrune, Method, PruMerge, PruMergePlus, VisionZip
from ..methods.before import Reduction


def keep_positions(short: Any, found: Reduction | None) -> Any:
    """The reduced prompt with the positions of the unpruned one. `found` is what was left of its pictures, one in each row.

    A row that is no one patch (CLS, merged, extra) stands at the picture's first place if it comes first, else at its last.

    Raises:
        InputError: the prompts do not hold one picture each.
    """
    image, real = short.types == IMG, short.types != PAD
    if found is None or found.patch.shape[0] != short.types.shape[0] or not torch.equal(found.count, image.sum(-1)):
        raise InputError("positions are kept for prompts of one picture each")
    after = real & ~image & (image.long().cumsum(-1) > 0)
    dropped = (short.full_n_image - image.sum(-1))[:, None]
    positions = short.position_ids + torch.where(after, dropped, 0)
    first = torch.where(image, short.position_ids, short.types.shape[1]).amin(-1, keepdim=True)
    nowhere = (short.full_n_image[:, None] - 1).expand_as(found.patch).clone()
    nowhere[:, 0] = 0
    patch = torch.where(found.patch < 0, nowhere, found.patch)
    places = torch.gather(patch, 1, (image.long().cumsum(-1) - 1).clamp(min=0, max=patch.shape[1] - 1))
    return replace(short, position_ids=torch.where(image, first + places, positions))


class KeptPositions:
    """Mixed into a method that cuts before the language model."""

    _found: Any = None

    def reduce(self, view: Any) -> Reduction:
        self._found = super().reduce(view)  # type: ignore[misc]
        return self._found

    def cut(self, *args: Any, **options: Any) -> Any:
        self._found = None
        return keep_positions(super().cut(*args, **options), self._found)  # type: ignore[misc]


def _kept(cls: Any) -> Any:
    return dataclass(type(f"{cls.__name__}Kept", (KeptPositions, cls), {"name": f"{cls.name}, positions kept"}))


KEPT: dict[str, Any] = {cls.name: _kept(cls) for cls in (VisionZip, PruMerge, PruMergePlus, DivPrune, CDPruner)}
RENUMBER = ("sparsevlm", "pyramiddrop", *KEPT)  # keys of the rows that are run both ways
WHOLE = ("sparsevlm", "pyramiddrop", "divprune", "cdpruner")  # of these, all or nearly all rows are tokens as they were


def with_positions(key: str, method: Any) -> Method:
    """The method of that key at the same setting, with positions kept."""
    if hasattr(method, "renumber"):
        return replace(method, renumber=False)
    return KEPT[key](**{field.name: getattr(method, field.name) for field in fields(method)})
