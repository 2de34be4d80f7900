"""Cutting before the LLM in the other families, and with several pictures in a prompt."""

from __future__ import annotations

import pytest
import torch

from dyrate_lib import CDPruner, DivPrune, InputError, NoReduction, PruMerge, PruMergePlus, VisionZip, generate
from dyrate_lib.models import Adapter
from tests.test_families import ROWS, STEPS, stock
from tests.tiny_families import FAMILIES, model_of

ANY = {"divprune": DivPrune(0.4), "cdpruner": CDPruner(0.4)}
CLIP = {"visionzip": VisionZip(2, 1), "prumerge": PruMerge(), "plus": PruMergePlus(), "prumerge-fixed": PruMerge(0.5)}


def fits(name, method):
    return method in ANY.values() or hasattr(Adapter(model_of(name))._clip.embeddings, "class_embedding")


PAIRS = [(name, key) for name in FAMILIES for key in ANY] + [
    (name, key) for name in FAMILIES if name.startswith("llava") for key in CLIP
]
by_pair = pytest.mark.parametrize(("name", "key"), PAIRS)


@by_pair
def test_our_loop_is_stock_and_a_batch_its_rows(name, key):
    model, family, method = model_of(name), FAMILIES[name], {**ANY, **CLIP}[key]
    inputs = family.inputs(ROWS)
    ours = generate(model, inputs, method, STEPS, eos_token_id=[], return_logits=True)
    with method(model) as pruning:
        theirs = stock(name, inputs, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert (torch.stack(theirs.logits, 1) - ours.logits).abs().max() < 1e-4
    assert torch.equal(torch.stack(pruning.kept, 1), ours.trace.kept)
    cut = ours.trace.kept[:, 0] < ours.trace.n_image
    assert cut.tolist() == [True, True, False, True]
    for row, (pictures, text) in enumerate(ROWS):
        alone = family.inputs([(pictures, text)])
        alone["input_ids"][0, -text:] = inputs["input_ids"][row, -text:]
        single = generate(model, alone, method, STEPS, eos_token_id=[], return_logits=True)
        assert (single.logits[0] - ours.logits[row]).abs().max() < 1e-4
        assert single.trace.kept_at(0, 0).tolist() == ours.trace.kept_at(row, 0).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_is_the_unpruned_model(name):
    model, inputs = model_of(name), FAMILIES[name].inputs(ROWS)
    want = generate(model, inputs, NoReduction(), STEPS, eos_token_id=[], return_logits=True)
    out = generate(model, inputs, DivPrune(1.0), STEPS, eos_token_id=[], return_logits=True)
    assert torch.equal(out.logits, want.logits)


@by_pair
def test_beams(name, key):
    model, method, inputs = model_of(name), {**ANY, **CLIP}[key], FAMILIES[name].inputs(ROWS)
    with method(model):
        out = stock(
            name, inputs, num_beams=2, num_return_sequences=2, length_penalty=1.0, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    reply = out.sequences[:, inputs["input_ids"].shape[1] :]
    for which in (0, 1):
        forced = generate(model, inputs, method, forced_tokens=reply[which::2], return_logits=True)
        scores = torch.log_softmax(forced.logits, -1).gather(-1, reply[which::2, :, None]).sum((1, 2)) / reply.shape[1]
        assert torch.allclose(scores, out.sequences_scores[which::2], atol=1e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("llava")])
@pytest.mark.parametrize("key", CLIP)
def test_towers_without_cls_are_refused(name, key):
    model, method = model_of(name), CLIP[key]
    with pytest.raises(InputError, match="CLS token"):
        generate(model, FAMILIES[name].inputs(ROWS), method, 2)
    with pytest.raises(InputError, match="CLS token"), method(model):
        pass


def test_a_text_for_each_picture_and_crops_of_their_own():
    """LLaVA-NeXT: pictures of 3 and 5 crops; each crop keeps the budget, by its own picture's text."""
    g = torch.Generator().manual_seed(0)
    texts, weight = [torch.randn(1, 8, generator=g) for _ in range(4)], torch.randn(8, 32, generator=g)
    model, inputs = model_of("llava-next"), FAMILIES["llava-next"].inputs(ROWS)
    out = generate(model, inputs, CDPruner(tokens=2, text=texts, image_projection=weight), 1)
    crops = Adapter(model).picture_crops(inputs)
    assert out.trace.kept[:, 0].tolist() == [2 * crops[0], 2 * (crops[1] + crops[2]), 0, 2 * crops[3]]
    for row, picture in ((0, 0), (3, 3)):
        alone = FAMILIES["llava-next"].inputs([ROWS[row]])
        single = generate(model, alone, CDPruner(tokens=2, text=texts[picture], image_projection=weight), 1)
        assert single.trace.kept_at(0, 0).tolist() == out.trace.kept_at(row, 0).tolist()
    with pytest.raises(InputError, match="3 text embeddings for 4 pictures"):
        generate(model, inputs, CDPruner(tokens=2, text=texts[:3], image_projection=weight), 1)
