"""BLEU-4 and ROUGE-L picture by picture, in numbers that add up, so that both can be resampled over pictures.

A corpus BLEU is no mean of sentences' scores: it is a function of sums of matched and guessed n-grams and of lengths. These sums
are pycocoevalcap's own (closest reference length), and so is the function of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .metrics import _check_ids, ptb_tokenize

ORDER = 4
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against 0 / 0


def caption_sums(predictions: Mapping[str, str], references: Mapping[str, list[str]]) -> dict[str, Any]:
    """What each picture adds to the corpus scores.

    Args and errors as `metrics.caption_scores`.

    Returns:
        ids (sorted), bleu (int [pictures, 10]: matched 1- to 4-grams, guessed ones, length, length of the closest reference; see
        `bleu4`) and rouge (float [pictures], ROUGE-L x 100, whose mean is the corpus score).
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge

    ids = _check_ids(predictions, references)
    tokens = iter(ptb_tokenize([predictions[i] for i in ids] + [caption for i in ids for caption in references[i]]))
    said = [next(tokens) for _ in ids]
    truths = [[next(tokens) for _ in references[i]] for i in ids]
    scorer, rouge = BleuScorer(n=ORDER), Rouge()
    for reply, truth in zip(said, truths, strict=True):
        scorer += (reply, truth)
    bleu = []
    for found in scorer.ctest:
        closest = min((abs(length - found["testlen"]), length) for length in found["reflen"])[1]
        bleu.append([*found["correct"], *found["guess"], found["testlen"], closest])
    # an empty caption scores nothing, as in `caption_scores`
    each = [100.0 * rouge.calc_score([r], t) if r else 0.0 for r, t in zip(said, truths, strict=True)]
    return {"ids": ids, "bleu": np.array(bleu, dtype=np.int64), "rouge": np.array(each, dtype=np.float64)}


def bleu4(sums: np.ndarray) -> np.ndarray:
    """[...] BLEU-4 x 100 of summed statistics [..., 10] (see `caption_sums`)."""
    sums = np.asarray(sums, dtype=np.float64)
    matched, guessed, length, closest = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER], sums[..., -2], sums[..., -1]
    precision = ((matched + _TINY) / (guessed + _SMALL)).prod(axis=-1) ** (1 / ORDER)
    share = (length + _TINY) / (closest + _SMALL)
    return 100.0 * precision * np.exp(np.minimum(0.0, 1 - 1 / share))
