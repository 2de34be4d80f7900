"""The recipe of a scenes VLM: what decides its weights, the losses, and token accuracy on held-out pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .captions import NEEDS
from .data import CLS_GROUPS, DEFAULT_SLOTS, KINDS, SEEN_PAIR_MASK, normalise
from .render import render_packed

if TYPE_CHECKING:
    from .vlm import PackedForward


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
    kind_weights: tuple[float, ...] = (0.3, 0.25, 0.2, 0.25)  # short, narrative, late, question
    slots: tuple[str, ...] = DEFAULT_SLOTS


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


def cls_loss(head: torch.nn.Module, cls: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Bag-of-words loss on the pooled CLS token: binary for shapes, colours, pairs; softmax for the others."""
    total, start = cls.new_zeros(()), 0
    logits = head(cls.float())
    for name, n in CLS_GROUPS:
        out, want = logits[:, start : start + n], target[:, start : start + n]
        start += n
        if name == "pairs":  # held-out pairs are never shown as absent
            seen = _seen_pairs(str(out.device)).expand_as(out)
            total = total + 2 * F.binary_cross_entropy_with_logits(out, want, weight=seen)
        elif name in ("shapes", "colors"):
            total = total + F.binary_cross_entropy_with_logits(out, want)
        else:
            total = total + 0.3 * F.cross_entropy(out, want)
    return total


def response_loss(
    logits: torch.Tensor, labels: torch.Tensor, kind: torch.Tensor, weights: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum over kinds of the mean cross-entropy of their tokens, and those means [4] (0 where there is none)."""
    per_token = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    kinds = kind.flatten()
    means = torch.stack([
        (per_token * (kinds == i)).sum() / (kinds == i).sum().clamp(min=1) for i in range(len(KINDS))
    ])  # fmt: skip
    return sum(w * m for w, m in zip(weights, means, strict=True)), means


def to_device(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """Render a batch of :class:`PackedBatches` and move its tokens: adds ``pixel_values``."""
    pictures = render_packed(_array(batch["objects"]), _array(batch["grounds"]), device)
    out = {k: torch.as_tensor(batch[k]).to(device, non_blocking=True) for k in ("ids", "labels", "need", "kind", "cls")}
    out["ids"], out["labels"] = out["ids"].long(), out["labels"].long()
    return out | {"pixel_values": normalise(pictures)}


def _array(x: Any) -> Any:
    return x.numpy() if isinstance(x, torch.Tensor) else x


@torch.no_grad()
def token_accuracy(forward: PackedForward, batches: list[dict]) -> dict[str, float]:
    """Share of right next tokens under teacher forcing, by kind and by need of caption tokens."""
    hits: dict[str, tuple[int, int]] = {}
    for b in batches:
        logits, _ = forward(b["pixel_values"], b["ids"])
        right = logits.argmax(-1) == b["labels"]
        captions = (b["kind"] >= 0) & (b["kind"] < KINDS.index("question"))
        masks = {k: b["kind"] == i for i, k in enumerate(KINDS)}
        masks |= {f"need_{n}": captions & (b["need"] == i) for i, n in enumerate(NEEDS)}
        # The answer alone: the EOS behind it is always right.
        masks["answer"] = (b["kind"] == KINDS.index("question")) & (b["need"] == NEEDS.index("image"))
        for name, mask in masks.items():
            n, of = hits.get(name, (0, 0))
            hits[name] = (n + int((right & mask).sum()), of + int(mask.sum()))
    return {name: n / of for name, (n, of) in hits.items() if of}
