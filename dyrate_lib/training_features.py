"""What the rate predictor reads in training: the same teacher-forced pass, seen as each kind of inputs has it at inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .errors import InputError
from .predictor import RatePredictor
from .predictor_inputs import BANK, STEPS, need_codes, unit_rms
from .teacher_forcing import TeacherForced


class FeatureReader:
    """Features of a batch's rows for one kind of inputs, as `RatePredictor` takes them.

    limit: tokens of a response at most. seed: of the exchange of pictures ("foreign"), a stream of its own, so that all kinds
    of inputs see the same references and the same draws of rates.
    """

    def __init__(self, inputs: str, tokenizer: Any, limit: int, seed: int) -> None:
        self.inputs, self.tokenizer, self.limit = inputs, tokenizer, limit
        self._exchange = torch.Generator().manual_seed(seed)

    def __call__(self, forced: TeacherForced, items: Sequence[Any], picks: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """[b, R, ..] of this process's rows; items, picks (which reference) and lengths are the whole batch's."""
        mine = distributed.rows(len(items))
        b, steps, device = len(mine), forced.steps, forced.shares.device
        if self.inputs == "step":
            return torch.arange(steps, device=device).expand(b, -1)
        if self.inputs == "none":
            return forced.shares.new_empty(b, steps, 0)
        if self.inputs == "hidden":
            start = forced.prompt.types.shape[1] - 1
            return unit_rms(forced.x[:, start : start + steps])
        if self.inputs == "foreign":
            return self._exchanged(forced.shares, lengths)
        if self.inputs == "oracle":
            codes = torch.zeros(b, steps, dtype=torch.long)
            for row, i in enumerate(mine):
                known = need_codes(reference_needs(self.tokenizer, items[i], picks[i]))[: self.limit]
                codes[row, : len(known)] = torch.tensor(known)
            return codes.to(device)
        return forced.shares

    def _exchanged(self, shares: Tensor, lengths: Sequence[int]) -> Tensor:
        """Each row gets another row's shares at the same step: the batch turned by a random number of places."""
        n = len(lengths)
        whole = held(distributed.gathered(shares, n), lengths)
        turn = 1 + int(torch.randint(n - 1, (1,), generator=self._exchange))
        return whole[[(i + turn) % n for i in distributed.rows(n)]]


def held(shares: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B, R, H, 4] in which every row keeps the shares of its last valid step from then on: what follows a reply is padding."""
    last = torch.tensor(lengths, device=shares.device)[:, None] - 1
    steps = torch.minimum(torch.arange(shares.shape[1], device=shares.device)[None], last)
    return torch.gather(shares, 1, steps[..., None, None].expand_as(shares))


def fill_bank(predictor: RatePredictor, batches: Sequence[tuple[TeacherForced, Sequence[int]]]) -> None:
    """Give a "foreign" predictor its bank: shares of the first pictures met, each once. batches: with all rows' lengths."""
    found: dict[int, Tensor] = {}
    for forced, lengths in batches:
        whole = held(distributed.gathered(forced.shares, len(lengths)), lengths)
        steps = torch.arange(STEPS, device=whole.device).clamp(max=whole.shape[1] - 1)
        keys = distributed.gathered(forced.prompt.content_key, len(lengths)).tolist()
        for key, rows in zip(keys, whole[:, steps], strict=True):
            if len(found) < BANK:
                found.setdefault(key, rows.half())
    predictor.bank = torch.stack(list(found.values()))
    predictor.bank_keys = torch.tensor(list(found), device=predictor.bank.device)


# --------------------------------------------------------------------------------------------- what a reference needs


def reference_needs(tokenizer: Any, item: Any, pick: int) -> list[str]:
    """What each token of a scene's reference `pick` needs (names of `scenes.NEEDS`), its end token last.

    The tokens are those of `encode_responses`; one that is a part of a word needs what the word needs.

    Raises:
        InputError: as `check_annotated`; a tokenizer that does not say where its tokens stand in the text.
    """
    from .scenes.captions import annotated_reference, spell

    check_annotated(item)
    words = annotated_reference(item.meta["scene"], item.meta["family"], pick)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("To tell what each token needs takes a fast tokenizer, which says where its tokens stand in the text.")
    text = " " + spell(words)
    ends, at = [], 0
    for word, _ in words:
        at = text.index(word, at) + len(word)
        ends.append(at)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    needs, now = [], 0
    for _, end in spans:
        while ends[now] < end:
            now += 1
        needs.append(words[now][1])
    return [*needs, "none"]


def check_annotated(item: Any, number: int | None = None) -> None:
    """Refuse an item whose references are not captions of a scene, word for word. Raises InputError."""
    from .scenes.captions import FAMILIES, references

    meta = getattr(item, "meta", None) or {}
    which = "An item" if number is None else f"Item {number}"
    if meta.get("scene") is None or meta.get("family") not in FAMILIES:
        raise InputError(
            f"{which} does not say what its words need: an oracle is trained on captions of scenes, scenes:FAMILY:SPLIT with "
            f"FAMILY one of {', '.join(FAMILIES)}."
        )
    if list(item.references) != references(meta["scene"], meta["family"]):
        raise InputError(f"{which} has other references than its scene's captions, so what their words need is not known.")
