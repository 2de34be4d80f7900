"""N-gram scores and facts of captions as sums over pictures, their tables, and the figure of what CIDEr hides."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyrate_lib import metrics, metrics_sums
from dyrate_lib.experiments import benchmarks, caption_fact_tables, caption_facts, open_study
from dyrate_lib.experiments.benchmarks import Row
from dyrate_lib.metrics_sums import bleu4, caption_sums
from dyrate_lib.scenes.facts import fact_rates

WORDS = st.lists(st.sampled_from("a red blue star ring on the left".split()), max_size=8).map(" ".join)


@pytest.fixture
def no_java(monkeypatch):
    """Tokens split at blanks, lower case."""
    plain = lambda sentences: [" ".join(s.lower().split()) for s in sentences]  # noqa: E731
    monkeypatch.setattr(metrics, "ptb_tokenize", plain)
    monkeypatch.setattr(metrics_sums, "ptb_tokenize", plain)


def test_bleu_by_hand():
    # 'a b c d' against 'a b c d e': all n-grams matched, shorter by one
    sums = np.array([4, 3, 2, 1, 4, 3, 2, 1, 4, 5], dtype=float)
    assert bleu4(sums) == pytest.approx(100 * np.exp(1 - 5 / 4))
    # half of the unigrams, bigrams, ...: the geometric mean of 1/2 and no penalty for length
    assert bleu4(np.array([2, 2, 2, 2, 4, 4, 4, 4, 7, 6])) == pytest.approx(50)
    assert bleu4(np.zeros(10)) == pytest.approx(0, abs=1e-9)
    assert bleu4(np.stack([sums, sums])).shape == (2,)


@given(st.lists(st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=4))
def test_sums_make_pycocoevalcaps_corpus_scores(pairs):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    said = {str(i): reply for i, (reply, _) in enumerate(pairs)}
    truth = {str(i): references for i, (_, references) in enumerate(pairs)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_sums, "ptb_tokenize", list)
        found = caption_sums(said, truth)
    assert found["ids"] == sorted(said)
    theirs, _ = Bleu(4).compute_score(truth, {i: [said[i]] for i in truth}, verbose=0)
    assert bleu4(found["bleu"].sum(axis=0)) == pytest.approx(100 * theirs[3])
    spoken = [i for i in sorted(said) if said[i]]
    rouge = [Rouge().calc_score([said[i]], truth[i]) for i in spoken]
    assert found["rouge"].sum() == pytest.approx(100 * sum(rouge))


@pytest.fixture
def study(tmp_path, no_java, monkeypatch):
    """Captions made up from references: `original` says the first, others that of another picture for some of them."""
    made = open_study("03_benchmarks", scale="smoke", records="fresh", out=str(tmp_path), progress=False)
    made.scale = dataclasses.replace(made.scale, n_captions=8, bootstrap=100)

    def rows(study, key, role):
        items = list(study.dataset(role))
        out = []
        for name, wrong in (("original", 0), ("fastv-2", 1), ("dyrate", (2, 4)), ("vtw", 8)):
            cells = []
            for k in wrong if isinstance(wrong, tuple) else (wrong,):
                texts = [items[(i + (i < k)) % len(items)].references[0] for i in range(len(items))]
                payload = [
                    {"id": item.id, "text": text, "flops": {"paper": 0.3, "cached": 0.5}, "steps": 9}
                    for item, text in zip(items, texts, strict=True)
                ]
                cells.append({"payload": payload})
            out.append(Row(name, name, name, tuple(cells)))
        return out

    monkeypatch.setattr(benchmarks, "_table_rows", rows)
    return made


def test_facts_and_scores_are_the_whole_sets(study):
    rows = {row.key: row for row in caption_facts.rows(study, "small", "late")}
    level = caption_facts.level(study, rows["original"], "late", "hallucination")
    assert (level["mean"], level["lo"], level["hi"], level["n"]) == (0, 0, 0, 8)
    cell = rows["fastv-2"].cells[0]
    whole = study.scores(cell, "late")
    assert caption_facts.level(study, rows["fastv-2"], "late", "bleu4")["mean"] == pytest.approx(whole.bleu4)
    assert caption_facts.level(study, rows["fastv-2"], "late", "rouge_l")["mean"] == pytest.approx(whole.rouge_l)
    assert caption_facts.level(study, rows["fastv-2"], "late", "cider")["mean"] == pytest.approx(whole.cider)
    from dyrate_lib.scenes.facts import caption_facts as read

    truth = {item.id: item.meta["scene"] for item in study.dataset("late")}
    rates = fact_rates([read(e["text"], truth[e["id"]], "late") for e in cell["payload"]], 10)
    for measure in ("hallucination", "omission", "size_error"):
        found = caption_facts.level(study, rows["fastv-2"], "late", measure)["mean"]
        assert found == pytest.approx(100 * rates[measure]["mean"])


def test_seeds_are_pooled_and_changes_are_paired(study):
    rows = {row.key: row for row in caption_facts.rows(study, "small", "coco")}
    sums = caption_facts.sums(study, rows["dyrate"], "coco", "omission")
    apart = [Row("x", "x", "vtw", (cell,)) for cell in rows["dyrate"].cells]
    each = [caption_facts.sums(study, row, "coco", "omission") for row in apart]
    assert sums == pytest.approx(np.mean(each, axis=0))
    gap = caption_facts.change(study, rows["vtw"], rows["original"], "coco", "omission")
    assert 0 < gap["lo"] <= gap["mean"] <= gap["hi"]
    same = caption_facts.change(study, rows["vtw"], rows["vtw"], "coco", "cider")
    assert (same["mean"], same["lo"], same["hi"]) == (0, 0, 0)
    assert caption_facts.p_value(study, rows["vtw"], rows["vtw"], "coco", "cider") == 1
    assert caption_facts.p_value(study, rows["vtw"], rows["original"], "coco", "omission") < 0.05


def test_tables_and_figure(study):
    table = caption_fact_tables.facts_table(study, "small")
    assert set(table.set) == {"coco", "nocaps", "flickr30k", "late"} and len(table) == 4 * 4
    first = table.iloc[0]
    assert first["omitted objects %"] == "0.0 [0.0, 0.0]" and first["change, CIDEr"] == ""
    cells = caption_fact_tables.cells(study, "small")
    tested = cells[cells["p"].notna()]
    assert len(tested) == 4 * 3 * 5 and (tested["p Holm"] >= tested["p"]).all()
    assert cells[cells.measure == "size_error"]["p"].isna().all()
    attributes = caption_fact_tables.attributes_table(study, "small")
    position = attributes[(attributes.set == "coco") & (attributes.method == "original")]["wrong position %"].iloc[0]
    assert position == "" or position.startswith("0.0")  # short captions name no position: a rate of nothing is a gap
    hidden = caption_fact_tables.hidden(study)
    assert set(hidden.key) == {"fastv-2", "dyrate", "vtw"} and (hidden["CIDEr % lo"] <= hidden["CIDEr %"]).all()
    fig = caption_fact_tables.hidden_figure(study)
    assert len(fig.axes) == 2 * 4
    plt.close(fig)
    said = caption_fact_tables.hidden_findings(study).splitlines()
    assert len(said) == 4 and all("rise and CIDEr does not fall" in line for line in said)


def test_photographs_have_no_facts(study):
    photographs = dataclasses.replace(study, data="coco:/nowhere")
    assert caption_facts.models(photographs) == () and caption_fact_tables.hidden_figure(photographs) is None
    assert caption_fact_tables.facts_table(photographs, "small").empty
