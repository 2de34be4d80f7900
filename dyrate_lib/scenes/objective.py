"""The recipe of a scenes VLM: what decides its weights, the losses, and token accuracy on held-out pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .captions import NEEDS
from .data import CLS_GROUPS, DEFAULT_SLOTS, KINDS, N_CLS, SEEN_PAIR_MASK, normalise
from .looks import render_looks
from .mixes import BROAD, KIND_WEIGHTS, Mix
from .patch_texts import N_TEXTS, NO_TEXT

if TYPE_CHECKING:
    from .packed_forward import PackedForward


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, besides the device's arithmetic. ``steps`` None: as many as the budget allows."""

    size: str = "small"
    seed: int = 0
    steps: int | None = None
    batch: int = 96
    lr: float = 1e-3
    final_lr: float = 2e-5
    warmup: int = 200
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    cls_weight: float = 0.5
    kind_weights: tuple[float, ...] = KIND_WEIGHTS
    slots: tuple[str, ...] = DEFAULT_SLOTS
    mix: Mix = BROAD
    text_weight: float = 0.0  # of what the patches of signs say, see `Heads`
    # The checkpoint that the weights come from (see `starting.described`), None: from scratch.
    start: dict[str, Any] | None = None


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up (at most a tenth of all steps), then a cosine to ``final_lr``."""
    warmup = max(1, min(recipe.warmup, steps // 10))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    t = min(1.0, (step - warmup) / max(1, steps - warmup))
    return recipe.final_lr + (recipe.lr - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * t))


@lru_cache(maxsize=4)
def _seen_pairs(device: str) -> torch.Tensor:
    return torch.from_numpy(SEEN_PAIR_MASK).float().to(device)


def cls_loss(head: torch.nn.Module, cls: torch.Tensor, target: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Bag-of-words loss on the pooled CLS token: binary for shapes, colours, pairs; softmax for the others.

    Args:
        head: linear, to [B, N_CLS].
        cls: [B, Dv].
        target: float32 [B, N_CLS], see `data.cls_targets`.
        seen: bool [B], the pictures that show what their target says, None: all. The loss is the mean over these, that of the
            words on signs over all.
    """
    total, start = cls.new_zeros(()), 0
    weight = cls.new_ones(len(cls)) if seen is None else seen.float()
    weight = (weight / weight.sum().clamp(min=1))[:, None]
    logits = head(cls.float())
    for name, n in CLS_GROUPS:
        out, want = logits[:, start : start + n], target[:, start : start + n]
        start += n
        if name == "pairs":  # held-out pairs are never shown as absent
            pairs = _seen_pairs(str(out.device)) * weight
            total = total + 2 * F.binary_cross_entropy_with_logits(out, want, weight=pairs, reduction="sum") / n
        elif name == "words":  # few of many, so the mean would hardly count
            total = total + 3 * F.binary_cross_entropy_with_logits(out, want)
        elif name in ("shapes", "colors"):
            total = total + F.binary_cross_entropy_with_logits(out, want, weight=weight, reduction="sum") / n
        else:
            total = total + 0.3 * (F.cross_entropy(out, want, reduction="none") * weight[:, 0]).sum()
    return total


class Heads(torch.nn.Module):
    """What training reads off the vision tower and throws away afterwards.

    cls: linear, the pooled CLS token [.., Dv] to [.., N_CLS]. texts: linear, a patch's normalised features to 60 words and 26
    letters.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls = torch.nn.Linear(width, N_CLS)
        self.texts = torch.nn.Linear(width, sum(N_TEXTS))


def text_loss(head: torch.nn.Module, features: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the word plus that of the letter under each patch, averaged over the patches of signs (0 without any).

    Args:
        head: linear, to [..., 86].
        features: float32 [B, 576, Dv].
        texts: integers [B, 2, 576], see :func:`~dyrate_lib.scenes.patch_texts.patch_texts`.
    """
    logits = head(F.layer_norm(features.float(), features.shape[-1:])).split(N_TEXTS, dim=-1)
    targets = texts.long().unbind(1)
    count = (targets[0] != NO_TEXT).sum().clamp(min=1)
    summed = [
        F.cross_entropy(out.flatten(0, 1), want.flatten(), ignore_index=NO_TEXT, reduction="sum")
        for out, want in zip(logits, targets, strict=True)
    ]
    return sum(summed[1:], summed[0]) / count


def response_loss(
    logits: torch.Tensor, labels: torch.Tensor, kind: torch.Tensor, weights: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum over kinds of the mean cross-entropy of their tokens, and those means [K] (0 where there is none).

    logits [..., V], labels (-100: none) and kind [...]: of all positions, or of those that have a label.
    """
    per_token = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none")
    which = kind.flatten() == torch.arange(len(KINDS), dtype=kind.dtype, device=kind.device)[:, None]
    means = (per_token * which).sum(1) / which.sum(1).clamp(min=1)
    return sum(w * m for w, m in zip(weights, means, strict=True)), means


def to_device(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """Render a batch of :class:`PackedBatches` and move its tokens: adds ``pixel_values``."""
    pictures = render_looks(_array(batch["objects"]), _array(batch["grounds"]), batch["looks"], device)
    names = ("ids", "labels", "need", "kind", "cls", "seen", "texts", "at", "at_labels", "at_kind")
    out = {k: torch.as_tensor(batch[k]).to(device, non_blocking=True) for k in names}
    out |= {k: out[k].long() for k in ("ids", "labels", "at_labels")}
    return out | {"pixel_values": normalise(pictures)}


def _array(x: Any) -> Any:
    return x.numpy() if isinstance(x, torch.Tensor) else x


@torch.no_grad()
def token_accuracy(forward: PackedForward, batches: list[dict]) -> dict[str, float]:
    """Share of right next tokens under teacher forcing: by kind, by need of caption tokens, of questions' answers alone.

    Of the tasks the answers alone are counted: the EOS behind them is always right.
    """
    hits: dict[str, tuple[int, int]] = {}
    for b in batches:
        logits, _ = forward(b["pixel_values"], b["ids"])
        right = logits.argmax(-1) == b["labels"]
        captions, said = (b["kind"] >= 0) & (b["kind"] < KINDS.index("question")), b["need"] == NEEDS.index("image")
        masks = {k: (b["kind"] == i) & (said | (i <= KINDS.index("question"))) for i, k in enumerate(KINDS)}
        masks |= {f"need_{n}": captions & (b["need"] == i) for i, n in enumerate(NEEDS)}
        masks["answer"] = (b["kind"] == KINDS.index("question")) & said
        for name, mask in masks.items():
            n, of = hits.get(name, (0, 0))
            hits[name] = (n + int((right & mask).sum()), of + int(mask.sum()))
    return {name: n / of for name, (n, of) in hits.items() if of}
