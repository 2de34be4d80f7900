"""VisionZip: the CLS token, the patches it attends to most, and a few merged tokens for the rest.

Source: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (arXiv 2412.04467), and the
facts of its repository (dvlab-research/VisionZip at 3151f6d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..encoder import cls_attention, complement, contextual_tokens, rank
from ..errors import InputError
from ..layout import gather_columns
from .before import BeforeLLM, EncoderView, Reduction


@dataclass
class VisionZip(BeforeLLM):
    """Keep `dominant` tokens (CLS and dominant - 1 patches, in raster order), then `contextual` merged ones.

    Scores: attention of the CLS row, summed over heads, in the vision layer whose output feeds the projector (22 of 24
    for feature -2). Contextual tokens: of the patches left every (n // contextual)-th; each other one joins the target
    whose key (of that layer, mean over heads) is nearest, and a target becomes itself + the mean of those that joined.
    The text plays no part. Released settings: 54 + 10 (default), 108 + 20, 162 + 30. In the trace CLS and contextual
    tokens count as kept, but only the dominant patches are in `kept_indices`.
    """

    dominant: int = 54
    contextual: int = 10
    name: ClassVar[str] = "visionzip"
    tower: ClassVar[bool] = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        for key, least in (("dominant", 1), ("contextual", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"VisionZip: {key}={value!r} must be a whole number of tokens, at least {least}.")

    def kept_count(self, n_image: int) -> int:
        if self.dominant + self.contextual > n_image:
            raise InputError(
                f"VisionZip: {self.dominant} dominant tokens (CLS is one of them) and {self.contextual} contextual ones are "
                f"more than the {n_image} of a picture, so nothing would be saved: choose fewer."
            )
        return self.dominant + self.contextual

    def zip(self, view: EncoderView) -> tuple[Tensor, Tensor]:
        """Features of the kept tokens before the projector [M, K, C], and patches in order of attention [M, dominant - 1]."""
        adapter, states = view.adapter, view.hidden[view.adapter.vision_feature_index]
        index = adapter.vision_feature_index - 1
        q, k = adapter.vision_qk(index, view.hidden[index])
        picks = rank(cls_attention(q, k, adapter.n_vision_heads).sum(1))[:, : self.dominant - 1]
        cls = torch.zeros(len(picks), 1, dtype=torch.long, device=picks.device)
        chosen = torch.cat((cls, picks.sort(-1).values + 1), dim=1)
        rest = complement(chosen, states.shape[1])
        keys = k.unflatten(-1, (adapter.n_vision_heads, -1)).mean(-2)
        merged = contextual_tokens(gather_columns(states, rest), gather_columns(keys, rest), self.contextual)
        return torch.cat((gather_columns(states, chosen), merged), dim=1), picks

    def reduce(self, view: EncoderView) -> Reduction:
        features, picks = self.zip(view)
        rows = view.adapter.project_features(features)
        patch = torch.full(rows.shape[:2], -1, dtype=torch.long, device=rows.device)
        patch[:, 1 : self.dominant] = picks.sort(-1).values
        return Reduction(rows, torch.full_like(patch[:, 0], rows.shape[1]), patch, picks)
