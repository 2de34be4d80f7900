"""Do heads look at the object they name? Attention over image tokens at the words of an object, against its pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..prompts import chat_prompt
from .captions import LISTED, PROMPTS, annotated_reference, spell
from .render import object_masks, render
from .world import SIZE, Scene

COVERED = 0.1  # a patch belongs to an object that shows on at least this share of it


@dataclass(frozen=True)
class ObjectAttention:
    """Attention of every head at the words of every listed object.

    inside: float32 [objects, layers, heads], share of the row's attention to the image that lies on the patches of the
    object being named. others: the same rows' mean share on a patch set of another listed object (NaN where there is
    none), scaled to the named object's area. area: [objects], share of all patches that are the object's. image:
    [objects, layers, heads], share of the row's whole attention that goes to the image. maps: [objects, layers, heads,
    side, side] for the first `n_maps` pictures only. scene, words: [objects], which picture and what was said.
    """

    inside: np.ndarray
    others: np.ndarray
    area: np.ndarray
    image: np.ndarray
    maps: np.ndarray
    scene: list[int]
    words: list[str]


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention maps can be read in eager mode only; the model's own implementation comes back afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def patch_shares(scene: Scene, side: int) -> torch.Tensor:
    """How much of each image token's patch an object covers: float32 [objects, side, side] in 0..1, drawing order."""
    return F.adaptive_avg_pool2d(object_masks(scene)[:, None], (side, side))[:, 0]


def naming_rows(scene: Scene, family: str, wording: int) -> list[list[int]]:
    """For each listed object, the positions in the caption of the words that name it (size, colour, shape)."""
    words = annotated_reference(scene, family, wording)
    # Objects come in the order of `salient`, each as 'a SIZE COLOR SHAPE'; the ground's words are no sizes.
    sizes = [i for i, (w, need) in enumerate(words) if need == "image" and w in ("large", "small")]
    return [[i, i + 1, i + 2] for i in sizes][: LISTED[family]]


@torch.no_grad()
def object_attention(
    model: Any, processor: Any, scenes: Sequence[Scene], family: str = "narrative", wording: int = 0, n_maps: int = 1
) -> ObjectAttention:
    """Teacher-force one reference of every scene and read all heads' attention at the words that name its objects.

    Args:
        model, processor: a scenes VLM (each word one token), as `load_vlm` gives them.
        scenes: pictures.
        family, wording: which reference.
        n_maps: for how many pictures whole maps are kept.

    Raises:
        InputError: the processor splits a word of the caption, so that rows and words do not match.
    """
    from ..loading import prepare_inputs

    image_id = model.config.image_token_id
    found: dict[str, list] = {k: [] for k in ("inside", "others", "area", "image", "maps", "scene", "words")}
    with _eager(model):
        for number, scene in enumerate(scenes):
            words = annotated_reference(scene, family, wording)
            reply = processor.tokenizer(" " + spell(words), add_special_tokens=False, return_tensors="pt").input_ids
            if reply.shape[1] != len(words):
                raise InputError("the tokenizer does not give one token a word: only scenes models can be probed")
            inputs = prepare_inputs(processor, [render(scene)], [chat_prompt(PROMPTS[family])])
            prompt = inputs["input_ids"].shape[1]
            ids = torch.cat([inputs["input_ids"], reply], dim=1).to(model.device)
            out = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=inputs["pixel_values"].to(model.device, model.dtype),
                output_attentions=True,
            )
            columns = (ids[0] == image_id).nonzero()[:, 0]
            side = int(len(columns) ** 0.5)
            rows = naming_rows(scene, family, wording)
            # The row that says a word is the one before it.
            flat = torch.tensor([[prompt - 1 + i for i in r] for r in rows], device=ids.device)
            maps = torch.stack([a[0][:, flat][..., columns].mean(2) for a in out.attentions]).float().cpu()
            maps = maps.permute(2, 0, 1, 3)  # [objects, layers, heads, image tokens]
            total = maps.sum(-1)
            drawn = [scene.objects.index(o) for o in scene.salient(len(rows))]
            belongs = (patch_shares(scene, side).flatten(1)[drawn] >= COVERED).float()
            on = torch.einsum("nlhi,mi->nmlh", maps, belongs) / total[:, None].clamp(min=1e-12)
            area = belongs.mean(1)
            for n in range(len(rows)):
                rest = [m for m in range(len(rows)) if m != n and area[m] > 0]
                if area[n] == 0:
                    continue  # wholly hidden under others
                scaled = on[n, rest] * (area[n] / area[rest])[:, None, None]
                others = scaled.mean(0) if rest else torch.full_like(on[n, n], float("nan"))
                found["inside"].append(on[n, n].numpy())
                found["others"].append(others.numpy())
                found["area"].append(float(area[n]))
                found["image"].append(total[n].numpy())
                found["scene"].append(number)
                found["words"].append(" ".join(words[i][0] for i in rows[n]))
                if number < n_maps:
                    found["maps"].append(maps[n].unflatten(-1, (side, side)).numpy())
    arrays = {k: np.array(v, dtype=np.float32) for k, v in found.items() if k not in ("scene", "words")}
    return ObjectAttention(**arrays, scene=found["scene"], words=found["words"])


def summarise(found: ObjectAttention, n_shown: int = 3) -> dict:
    """What a record keeps: head means, the best head judged on objects it was not chosen by, and its maps.

    Returns:
        enrichment [layers][heads]: mean share on the named object over mean area share; image [layers][heads]; best:
        layer and head chosen on every other object by their share on the named object minus that on other named ones;
        inside, others, area: per object of the remaining half, for the best head; maps: of the best head for the first
        picture's objects, float [objects][side][side]; words of these.
    """
    chosen, judged = slice(0, None, 2), slice(1, None, 2)
    if len(found.inside) < 2:
        judged = chosen
    gap = np.nan_to_num(found.inside[chosen] - np.nan_to_num(found.others[chosen], nan=0.0))
    layer, head = np.unravel_index(int(gap.mean(0).argmax()), gap.shape[1:])

    def plain(values: np.ndarray, digits: int) -> list:
        return values.astype(np.float64).round(digits).tolist()

    return {
        "enrichment": plain(found.inside.mean(0) / found.area.mean(), 3),
        "image": plain(found.image.mean(0), 4),
        "best": [int(layer), int(head)],
        "inside": plain(found.inside[judged, layer, head], 4),
        "others": [None if np.isnan(v) else round(float(v), 4) for v in found.others[judged, layer, head]],
        "area": plain(found.area[judged], 4),
        "objects": len(found.inside),
        "maps": plain(found.maps[:n_shown, layer, head], 5),
        "words": [w for w, s in zip(found.words, found.scene, strict=True) if s == 0][:n_shown],
    }


def upsample(grid: np.ndarray) -> np.ndarray:
    """An attention map [side, side] stretched to the picture's 336 x 336 px (nearest)."""
    factor = SIZE // len(grid)
    return np.kron(np.asarray(grid), np.ones((factor, factor)))
