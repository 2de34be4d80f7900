"""Methods that cut before the LLM: pure functions, batches, text-only prompts, stock generate, counts, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dyrate_lib import (
    BeforeLLM,
    CDPruner,
    DivPrune,
    FastV,
    InputError,
    NoReduction,
    PruMerge,
    PruMergePlus,
    VisionZip,
    chat_prompt,
    clip_text,
    encoder,
    generate,
    prepare_inputs,
)
from dyrate_lib.methods.cdpruner import question
from dyrate_lib.methods.prumerge import pruned
from dyrate_lib.models import Adapter
from tests.conftest import PROMPTS
from tests.test_hooks import fingerprint


def clip_relevance():
    g = torch.Generator().manual_seed(0)
    return dict(text=torch.randn(2, 16, generator=g), image_projection=torch.randn(16, 64, generator=g))


METHODS = {
    "visionzip": VisionZip(9, 4),
    "visionzip-dominant": VisionZip(5, 0),
    "visionzip-contextual": VisionZip(1, 7),
    "prumerge": PruMerge(),
    "prumerge-fixed": PruMerge(0.3, nearest=3),
    "plus": PruMergePlus(),
    "plus-fixed": PruMergePlus(1 / 8),
    "divprune": DivPrune(0.4),
    "cdpruner": CDPruner(0.4),
    "cdpruner-clip": CDPruner(tokens=11, **clip_relevance()),
}
EACH = pytest.mark.parametrize("name", METHODS)
STEPS = 5


def run(model, inputs, method, steps=STEPS):
    return generate(model, inputs, method, steps, eos_token_id=[], return_logits=True)


@pytest.fixture(scope="module")
def mixed(tiny, pictures):
    """Three rows: a picture, none, another picture."""
    texts = [chat_prompt(PROMPTS[0]), chat_prompt("Say something.", image=False), chat_prompt(PROMPTS[3])]
    return prepare_inputs(tiny[1], [pictures[0], None, pictures[2]], texts)


# -- rows of a batch ---------------------------------------------------------------------------------------------------


@EACH
def test_rows_of_a_batch_are_those_rows_alone(tiny, batch, alone, name):
    together = run(tiny[0], batch, METHODS[name])
    for b in range(4):
        single = run(tiny[0], alone(b), METHODS[name])
        assert (together.logits[b] - single.logits[0]).abs().max() < 1e-4
        assert together.new_tokens[b].tolist() == single.new_tokens[0].tolist()
        assert together.trace.kept[b].tolist() == single.trace.kept[0].tolist()
        assert together.trace.kept_at(b, 0).tolist() == single.trace.kept_at(0, 0).tolist()


def test_adaptive_counts_differ_within_this_batch(tiny, batch):
    """Or the test above would not show rows of unequal counts."""
    for method in (PruMerge(), PruMergePlus()):
        assert len(set(run(tiny[0], batch, method, 1).trace.kept[:, 0].tolist())) > 1


@EACH
def test_text_only_rows_pass_through(tiny, mixed, pictures, name):
    model, processor = tiny
    text = prepare_inputs(processor, None, [chat_prompt("Say something.", image=False)])
    want = run(model, text, NoReduction())
    alone = run(model, text, METHODS[name])
    assert torch.equal(alone.logits, want.logits) and not alone.trace.kept.any()
    out = run(model, mixed, METHODS[name])
    assert (out.logits[1] - want.logits[0]).abs().max() < 1e-4
    assert out.trace.n_image.tolist() == [36, 0, 36] and not out.trace.kept[1].any()
    picture = run(model, prepare_inputs(processor, [pictures[2]], [chat_prompt(PROMPTS[3])]), METHODS[name])
    assert (out.logits[2] - picture.logits[0]).abs().max() < 1e-4


def test_keeping_all_is_the_unpruned_model(tiny, batch):
    want = run(tiny[0], batch, NoReduction())
    for method in (DivPrune(1.0), CDPruner(1.0), CDPruner(tokens=36)):
        out = run(tiny[0], batch, method)
        assert torch.equal(out.logits, want.logits) and torch.equal(out.sequences, want.sequences)
        assert [out.trace.kept_at(b, 0).tolist() for b in range(4)] == [list(range(36))] * 4


# -- what is counted ---------------------------------------------------------------------------------------------------


@EACH
def test_trace_and_plan(tiny, batch, name):
    method, trace = METHODS[name], run(tiny[0], batch, METHODS[name]).trace
    assert trace.layer == 0 and trace.n_image.tolist() == [36] * 4
    assert trace.prompt_length.tolist() == batch["attention_mask"].sum(-1).tolist()
    assert (trace.kept_by_layer == trace.kept[..., None]).all() and (trace.kept == trace.kept[:, :1]).all()
    picked = (trace.kept_indices >= 0).sum(-1)
    extra = {"visionzip": 1 + 4, "visionzip-dominant": 1, "visionzip-contextual": 1 + 7}.get(name, int("p" == name[0]))
    assert (trace.kept[:, 0] - picked).tolist() == [extra] * 4  # CLS, contextual and merged rows are no picture token
    if name in ("prumerge", "plus"):
        with pytest.raises(InputError, match="depends on the picture"):
            method.plan(36, 8, STEPS)
    else:
        assert np.array_equal(method.plan(36, 8, STEPS), trace.kept_by_layer[2].numpy())
        assert method.plan(0, 8, STEPS).sum() == 0


@EACH
def test_flops_are_those_of_a_real_run(tiny, alone, name):
    model, inputs, method = tiny[0], alone(1), METHODS[name]
    out = run(model, inputs, method)
    adapter = Adapter(model)
    runner = method.runner(adapter, method.embed(adapter, inputs), STEPS)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        runner.prefill()
        for step in range(STEPS - 1):
            runner.decode(out.new_tokens[:, step])
    parts = out.flops("cached").by_part
    # the row that `trace.attention` reads, one a pass, is computed apart in the loop and counted by neither convention
    counted = counter.get_total_flops()
    assert parts["prefill"] + parts["decode"] + parts["head"] == pytest.approx(counted, rel=0.01)
    assert out.flops("cached").unpruned == pytest.approx(float(run(model, inputs, NoReduction()).flops("cached")))


# -- stock generate ----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("which", ["batch", "mixed"])
def test_stock_generate_is_our_loop(tiny, name, which, request):
    model, inputs, method = tiny[0], request.getfixturevalue(which), METHODS[name]
    want = run(model, inputs, method)
    before = fingerprint(model)
    with method(model) as pruning:
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert fingerprint(model) == before
    assert torch.equal(out.sequences, want.sequences)
    assert (torch.stack(out.logits, 1) - want.logits).abs().max() < 1e-4
    assert [kept.tolist() for kept in pruning.kept] == want.trace.kept.T.tolist()
    longest = (want.trace.kept[:, 0] + want.trace.prompt_length - want.trace.n_image).max()
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {int(longest) + STEPS - 1}


@pytest.mark.parametrize(("name", "beams"), [*((name, 2) for name in METHODS), ("prumerge", 5), ("cdpruner", 5)])
def test_beam_scores_are_those_of_the_loop_forced_along_them(tiny, batch, alone, name, beams):
    model, method = tiny[0], METHODS[name]
    settings_ = dict(max_new_tokens=4, num_beams=beams, do_sample=False, eos_token_id=None, length_penalty=1.0)
    with method(model):
        out = model.generate(
            **batch, **settings_, num_return_sequences=2, output_scores=True, return_dict_in_generate=True
        )
    start = batch["input_ids"].shape[1]
    for row in range(out.sequences.shape[0]):
        reply = out.sequences[row : row + 1, start:]
        forced = generate(model, alone(row // 2), method, forced_tokens=reply, return_logits=True)
        score = torch.log_softmax(forced.logits[0], -1).gather(-1, reply[0][:, None]).sum() / reply.shape[1]
        assert float(score) == pytest.approx(float(out.sequences_scores[row]), abs=1e-3)


@pytest.mark.parametrize("name", ["prumerge", "cdpruner"])
def test_sampling_and_passes_without_a_cache(tiny, batch, name):
    model, method = tiny[0], METHODS[name]
    torch.manual_seed(0)
    with method(model) as pruning:
        out = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=3, eos_token_id=None)
    want = run(model, batch, method).trace.kept[:, 0].repeat_interleave(3).tolist()
    assert out.shape[0] == 12 and all(kept.tolist() == want for kept in pruning.kept)
    with method(model):
        plain = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(plain, run(model, batch, method).sequences)  # the reply is no part of the instruction


def test_the_model_is_restored_and_contexts_do_not_nest(tiny, batch):
    model = tiny[0]
    model.generate(**batch, max_new_tokens=1, do_sample=False)
    before = fingerprint(model)
    for inner in (PruMerge(), FastV(2, 0.5)):
        with PruMerge()(model):
            assert fingerprint(model) != before
            with pytest.raises(InputError, match="already being pruned"), inner(model):
                pass
    with pytest.raises(InputError, match="already being pruned"), FastV(2, 0.5)(model), DivPrune(0.5)(model):
        pass
    with pytest.raises(ZeroDivisionError), VisionZip(9, 4)(model):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        raise ZeroDivisionError
    assert fingerprint(model) == before


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VisionZip(0, 10), "dominant=0"),
        (lambda: VisionZip(5, -1), "contextual=-1"),
        (lambda: VisionZip(5.5, 1), "whole number"),
        (lambda: PruMerge(0), "ratio=0"),
        (lambda: PruMergePlus(1.5), "PruMergePlus: ratio=1.5"),
        (lambda: PruMerge(nearest=-1), "nearest=-1"),
        (lambda: DivPrune(0.0), "ratio=0.0"),
        (lambda: DivPrune(float("nan")), "ratio=nan"),
        (lambda: CDPruner(2), "ratio=2"),
        (lambda: CDPruner(tokens=0), "tokens=0"),
        (lambda: CDPruner(text=torch.ones(1, 4)), "belong together"),
        (lambda: DivPrune(0.5).plan(-1, 8), "n_image >= 0"),
        (lambda: VisionZip().plan(36, 8), "more than the 36"),
    ],
)
def test_settings_that_cannot_be(make, says):
    with pytest.raises(InputError, match=says):
        make()


def refuse_to_run(model, monkeypatch):
    def no_work(*_, **__):
        raise AssertionError("work was done before the check")

    monkeypatch.setattr(model.model.vision_tower, "forward", no_work)


@pytest.mark.parametrize("method", [VisionZip(), CDPruner(tokens=40)], ids=["visionzip", "cdpruner"])
def test_more_tokens_than_a_picture_has_is_refused_before_any_work(tiny, batch, method, monkeypatch):
    refuse_to_run(tiny[0], monkeypatch)
    with pytest.raises(InputError, match="of a picture"):
        generate(tiny[0], batch, method, 2)
    with pytest.raises(InputError, match="of a picture"), method(tiny[0]):
        tiny[0].generate(**batch, max_new_tokens=2, do_sample=False)


NEEDY = [VisionZip(9, 4), PruMerge(), PruMergePlus(), CDPruner(0.4, **clip_relevance())]


@pytest.mark.parametrize("method", NEEDY, ids=lambda method: method.name)
def test_features_that_are_not_one_layers_patches_are_refused(tiny, batch, method, monkeypatch):
    model = tiny[0]
    refuse_to_run(model, monkeypatch)
    for key, value in (("vision_feature_select_strategy", "full"), ("vision_feature_layer", [-3, -2])):
        with monkeypatch.context() as patch:
            patch.setattr(model.config, key, value)
            with pytest.raises(InputError, match=key):
                generate(model, batch, method, 2)
            with pytest.raises(InputError, match=key), method(model):
                pass


@pytest.fixture(scope="module")
def without_cls():
    """A LLaVA whose tower (SigLIP) has no CLS token."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=49, image_seq_length=4, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.mark.parametrize("method", NEEDY, ids=lambda method: method.name)
def test_a_tower_without_cls_is_refused(without_cls, method):
    ids = torch.tensor([[1, 49, 49, 49, 49, 5, 6]])
    with pytest.raises(InputError, match="CLS token"):
        generate(without_cls, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 28, 28)}, method, 2)
    with pytest.raises(InputError, match="CLS token"), method(without_cls):
        pass
    assert not hasattr(without_cls, "_dyrate_pruning")


def test_what_stock_inputs_cannot_be_cut(tiny, batch):
    model = tiny[0]
    cache = model(**batch, use_cache=True).past_key_values
    with DivPrune(0.5)(model):
        with pytest.raises(InputError, match="outside the pruning context"):
            model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
        with pytest.raises(InputError, match="static cache|2-D"):
            model.generate(
                **batch, max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True
            )
        with pytest.raises(InputError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 5, 64))
        filled = model(**batch, use_cache=True).past_key_values
        with pytest.raises(InputError, match="Several new tokens"):
            model(input_ids=batch["input_ids"][:, -2:], past_key_values=filled)
    with pytest.raises(InputError, match="define reduce"):
        BeforeLLM().reduce(None)
    with pytest.raises(InputError, match="2 text embeddings for 4 pictures|3 text embeddings"):
        generate(tiny[0], batch, CDPruner(0.4, text=[torch.ones(1, 16)] * 3, image_projection=torch.ones(16, 64)), 1)


# -- CDPruner's texts --------------------------------------------------------------------------------------------------


def test_the_instruction_is_the_text_after_the_picture(tiny, pictures):
    """Two questions on one picture keep different tokens; what stands before the picture plays no part."""
    model, processor = tiny

    def kept(prompt):
        return run(model, prepare_inputs(processor, [pictures[0]], [prompt]), CDPruner(0.4), 1).trace.kept_at(0, 0).tolist()

    first = chat_prompt(PROMPTS[0])
    assert kept(first) != kept(chat_prompt(PROMPTS[3]))
    assert kept(first) == kept("Say: " + first)
    assert len(kept("There is <image>")) == 14  # no instruction: all are as relevant


def test_clip_texts_are_segments_of_77(tiny, batch):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    class Tokenizer:
        pad_token_id = 1

        def __call__(self, text):
            return {"input_ids": [2 + ord(letter) % 60 for letter in text]}

    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=16
    )
    torch.manual_seed(0)
    embed = clip_text(CLIPTextModelWithProjection(config).eval(), Tokenizer())
    assert embed("short").shape == (1, 16) and embed("a" * 77).shape == (1, 16) and embed("a" * 200).shape == (3, 16)
    heard = []

    def listen(text):
        heard.append(text)
        return embed(text)

    method = CDPruner(0.4, text=listen, image_projection=clip_relevance()["image_projection"])
    out = run(tiny[0], batch, method, 1)
    assert out.trace.kept[:, 0].tolist() == [14] * 4
    assert heard == [question(text) for text in PROMPTS]
    assert question("How many? Answer the question using a single word or phrase. ASSISTANT:") == "How many?"


# -- pure functions ----------------------------------------------------------------------------------------------------


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SEEDS = st.integers(0, 10_000)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 20), st.integers(1, 3))
def test_more_picks_begin_with_fewer_and_cover_all(seed, n, m):
    features = noise(m, n, 24, seed=seed)
    relevance = encoder.unit_range(noise(m, n, seed=seed + 1))
    for pick in (
        lambda f, r, k: encoder.farthest_first(f, k),
        lambda f, r, k: encoder.greedy_dpp(encoder.conditional_kernel(f, r), k),
    ):
        half, whole = pick(features, relevance, n // 2), pick(features, relevance, n)
        assert torch.equal(whole[:, : n // 2], half)
        assert torch.equal(whole.sort(-1).values, torch.arange(n).expand(m, n))
        for row in range(m):
            assert torch.equal(pick(features[row : row + 1], relevance[row : row + 1], n)[0], whole[row])


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(3, 20))
def test_a_permuted_dpp_picks_the_same_tokens(seed, n):
    """DivPrune's first pick is a tie of two mutually nearest tokens as often as not, so only the process is exact here."""
    features, relevance = noise(1, n, 24, seed=seed), encoder.unit_range(noise(1, n, seed=seed + 1))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    picks = encoder.greedy_dpp(encoder.conditional_kernel(features, relevance), n // 2)
    moved = encoder.greedy_dpp(encoder.conditional_kernel(features[:, order], relevance[:, order]), n // 2)
    assert torch.equal(order[moved], picks)


def test_farthest_first_spreads():
    """Three tight clusters: three picks are one of each."""
    centres = torch.eye(3).repeat_interleave(4, 0)
    features = (centres + 0.01 * noise(12, 3))[None]
    assert sorted((encoder.farthest_first(features, 3)[0] // 4).tolist()) == [0, 1, 2]
    same = torch.ones(1, 6, 4)
    assert sorted(encoder.farthest_first(same, 6)[0].tolist()) == list(range(6))
    assert sorted(encoder.farthest_first(torch.zeros(1, 6, 4), 6)[0].tolist()) == list(range(6))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(5, 30))
def test_the_dpp_is_guarded_where_nothing_new_is_left(seed, width, n):
    """Of `width` dimensions no more than that many tokens are independent; the others follow by relevance, all finite.

    In float64, where rounding stays below the guard: in float32 it passes for something new in one case of some hundreds.
    """
    random = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(noise(2, n, width, seed=seed).double(), dim=-1)
    relevance = torch.rand(2, n, generator=random, dtype=torch.float64) + 0.1
    picks = encoder.greedy_dpp(relevance[..., None] * (unit @ unit.mT) * relevance[:, None], n)
    assert torch.equal(picks.sort(-1).values, torch.arange(n).expand(2, n))
    late = relevance.gather(1, picks)[:, width:]
    assert (late[:, :-1] >= late[:, 1:]).all()
    assert encoder.greedy_dpp(torch.zeros(1, 4, 4), 4).tolist() == [[0, 1, 2, 3]]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 10), st.integers(0, 10))
def test_unit_range_is_monotone_and_within_0_and_1(seed, m, n):
    scores = noise(m, n + 1, seed=seed)
    out = encoder.unit_range(scores)
    span = scores.amax(-1) - scores.amin(-1)
    above = torch.where(span > 0, 1e-6 / span.clamp(min=1e-30), 0.0)  # the released code's epsilon, of the span
    assert (out > 0).all() and (out.amax(-1) <= (1 + above) * (1 + 1e-6)).all()
    if n:
        assert torch.equal(encoder.rank(out)[:, 0], encoder.rank(scores)[:, 0])
    assert (encoder.unit_range(torch.full((2, 5), 0.3)) == 1).all()


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(4, 20), st.integers(1, 4))
def test_merging_adds_up(seed, n, k):
    """Of features that are all ones, a kept row is 1 + its neighbours' attention and the extra row the pruned ones' sum."""
    attention = torch.softmax(noise(2, n, seed=seed), -1)
    order, count = encoder.rank(attention), torch.tensor([k, k // 2 + 1])
    kept, extra = encoder.merge_nearest(torch.ones(2, n, 3), noise(2, n, 5, seed=seed), attention, order, count)
    own = attention.gather(1, order)[:, :k]
    assert torch.allclose(kept[..., 0], 2 - own)  # at most 19 others: all within 32
    valid = torch.arange(k) < count[:, None]
    assert torch.allclose(extra[:, 0, 0], 1 - (own * valid).sum(-1), atol=1e-6)
    alone, _ = encoder.merge_nearest(torch.ones(2, n, 3), noise(2, n, 5), attention, order, count, nearest=0)
    assert torch.equal(alone, torch.ones(2, k, 3))


def test_a_repeated_patch_is_merged_as_the_released_code_does():
    """PruMerge+ at a fixed ratio: written out patch by patch, as a list of the others of each kept one."""
    n, picks, nearest = 12, [4, 0, 7, 4, 9], 6
    features, keys, attention = noise(1, n, 3, seed=1), noise(1, n, 5, seed=2), torch.softmax(noise(1, n, seed=3), -1)
    left = pruned(picks, n)
    assert left == [2, 3, 5, 6, 8, 10, 11]  # 1, the first that is not kept, goes unseen for the 4 that stands twice
    order, count = torch.tensor([picks + left]), torch.tensor([len(picks)])
    kept, extra = encoder.merge_nearest(features, keys, attention, order, count, nearest)
    for place, patch in enumerate(picks):
        others = picks[:place] + picks[place + 1 :] + left
        like = torch.nn.functional.cosine_similarity(keys[0, [patch]], keys[0, others])
        near = [others[i] for i in like.topk(nearest).indices]
        expected = features[0, patch] + sum(attention[0, other] * features[0, other] for other in near)
        assert torch.allclose(kept[0, place], expected, atol=1e-6)
    assert torch.allclose(extra[0, 0], sum(attention[0, p] * features[0, p] for p in left), atol=1e-6)
    assert pruned([3, 1], 5) == [0, 2, 4]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 20), st.integers(1, 20))
def test_contextual_tokens_keep_the_mean_of_what_joins(seed, rows, n):
    n = min(n, rows)
    features, keys = noise(2, rows, 6, seed=seed), noise(2, rows, 4, seed=seed + 1)
    out = encoder.contextual_tokens(features, keys, n)
    assert out.shape == (2, n, 6)
    targets = torch.arange(0, rows, rows // n)[:n]
    if n == rows:
        assert torch.equal(out, features)
    ones = encoder.contextual_tokens(torch.ones(2, rows, 6), keys, n)
    assert set(ones.unique().tolist()) <= {1.0, 2.0}  # itself, and a mean if any joined
    assert torch.equal(encoder.complement(targets[None], rows)[0], torch.tensor([i for i in range(rows) if i not in targets]))


def test_outliers_by_tukeys_rule():
    row = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 9.0])
    assert encoder.outlier_share(torch.stack((row, torch.ones(8)))).tolist() == [1 / 8, 0.0]


def test_prumerge_without_outliers_keeps_one():
    order = list(range(36))
    assert PruMerge().chosen(order, 0.0) == [0]
    assert PruMergePlus().chosen(order, 0.0) == [0, 12, 24]
    assert len(PruMerge(1.0).chosen(order, 1.0)) == 35 and len(PruMergePlus().chosen(order, 0.5)) == 35
