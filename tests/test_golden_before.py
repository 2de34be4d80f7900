"""The methods that cut before the LLM against the authors' own code (float32, 1e-4): features, picks, logits, tokens."""

from __future__ import annotations

import pytest
import torch

from dyrate_lib import BeforeLLM, CDPruner, DivPrune, PruMerge, PruMergePlus, VisionZip, encoder, generate
from dyrate_lib.methods.before import Reduction
from dyrate_lib.models import Adapter
from tests.test_reference_figures import close, ours, stock

SAMPLES = pytest.mark.parametrize("sample", [0, 1])


class Look(BeforeLLM):
    """Keeps all and shows what a method sees."""

    tower = True

    def kept_count(self, n_image):
        return n_image

    def reduce(self, view):
        self.view = view
        return Reduction.picked(view, torch.arange(view.embeds.shape[1])[None])


@pytest.fixture
def view(golden_model, golden_inputs, sample):
    look = Look()
    look.embed(Adapter(golden_model), golden_inputs(sample))
    return look.view


@SAMPLES
def test_the_view_holds_what_the_tower_gave(golden, view, sample):
    states = view.hidden[view.adapter.vision_feature_index]
    assert close(states[0], golden("visionzip")[f"sample{sample}.hidden_states"])
    assert close(view.features[0], golden("baseline")[f"sample{sample}.vision_features"])
    assert close(view.embeds[0], golden("divprune")[f"sample{sample}.projected_features"])
    assert view.instruction_ids[0].shape[0] == (12, 7)[sample]


@SAMPLES
def test_visionzip(golden, view, sample):
    want, method = golden("visionzip"), VisionZip(12, 4)
    features, picks = method.zip(view)
    assert close(features[0], want[f"sample{sample}.output"])
    assert (picks[0] + 1).tolist() == want[f"sample{sample}.all_indices"].tolist()[1:]
    index = view.adapter.vision_feature_index - 1
    q, k = view.adapter.vision_qk(index, view.hidden[index])
    assert close(encoder.cls_attention(q, k, 4).sum(1)[0], want[f"sample{sample}.cls_attention_sum"])
    assert close(k.unflatten(-1, (4, -1)).mean(-2)[0], want[f"sample{sample}.metric"])


@SAMPLES
@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("adaptive", PruMerge()),
        ("plus", PruMergePlus()),
        ("fixed_1_8", PruMerge(1 / 8)),
        ("plus_fixed_1_8", PruMergePlus(1 / 8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_prumerge(golden, view, case, method, sample):
    want = golden("prumerge")
    features, count, patches = method.merge(view)
    assert close(features[0], want[f"{case}.sample{sample}.output"])
    assert patches[0].tolist() == want[f"{case}.sample{sample}.kept"].tolist() and int(count) == patches.shape[1]
    last = view.adapter.n_vision_layers - 1
    scores = encoder.cls_attention(*view.adapter.vision_qk(last, view.hidden[last]))[:, 0]
    assert close(scores[0], want[f"{case}.sample{sample}.cls_attn"])
    if f"{case}.sample{sample}.outlier_ratio" in want:
        assert encoder.outlier_share(scores).tolist() == want[f"{case}.sample{sample}.outlier_ratio"].tolist()


@SAMPLES
@pytest.mark.parametrize("method", [VisionZip(12, 4), PruMerge(), PruMergePlus()], ids=["visionzip", "prumerge", "plus"])
def test_merged_features_go_through_the_projector_in_place_of_the_picture(
    golden_model, golden_inputs, golden, view, method, sample
):
    """No figures of the LLM's output exist for these: the prompt must be text, projected features, text."""
    adapter, inputs = view.adapter, golden_inputs(sample)
    name = {"visionzip": "visionzip", "prumerge": "prumerge", "prumerge+": "prumerge"}[method.name]
    case = {"visionzip": "", "prumerge": "adaptive.", "prumerge+": "plus."}[method.name]
    rows = adapter.project_features(golden(name)[f"{case}sample{sample}.output"])
    words = adapter.embed_tokens(inputs["input_ids"])[0]
    start = int((inputs["input_ids"][0] == adapter.image_token_id).nonzero()[0])
    prompt = method.embed(adapter, inputs)
    assert close(prompt.embeds[0], torch.cat((words[:start], rows, words[start + 36 :])))
    assert prompt.position_ids[0].tolist() == list(range(prompt.embeds.shape[1]))


def pruners(golden, sample):
    clip = golden("cdpruner")
    cdpruner = CDPruner(0.5, text=clip[f"m1.sample{sample}.text_embeds"], image_projection=clip["visual_projection.weight"])
    return {"divprune": ("", DivPrune(0.5)), "cdpruner": ("m1.", cdpruner)}


@SAMPLES
@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_picks_logits_tokens_and_positions(golden_model, golden, golden_inputs, name, sample):
    case, method = pruners(golden, sample)[name]
    want, inputs = golden(name), golden_inputs(sample)
    prefix = f"{case}keep18.sample{sample}."
    out = ours(golden_model, inputs, method, 16)
    assert out.trace.kept_indices[0].tolist() == want[prefix + "kept_pick_order"].tolist()
    assert out.trace.kept_at(0, 0).tolist() == want[prefix + "kept"].tolist()
    assert close(out.logits[0], want[prefix + "greedy_logits"])
    assert out.new_tokens[0].tolist() == want[prefix + "greedy_tokens"].tolist()
    prompt = method.embed(Adapter(golden_model), inputs)
    assert close(prompt.embeds[0], want[prefix + "inputs_embeds"])
    for implementation in ("sdpa", "eager"):
        golden_model.set_attn_implementation(implementation)
        positions = []
        watch = golden_model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs, found=positions: found.append(kwargs["position_ids"]), with_kwargs=True
        )
        try:
            logits, _, _ = stock(golden_model, inputs, method, 16)
        finally:
            watch.remove()
            golden_model.set_attn_implementation("sdpa")
        assert close(logits, want[prefix + "greedy_logits"]), implementation
        assert positions[0][0].tolist() == list(range(prompt.embeds.shape[1]))
        assert [int(p) for p in positions[1:]] == want[prefix + "decode_positions"].tolist()


@SAMPLES
def test_divprune_distances_and_rows(golden_model, golden, golden_inputs, sample):
    want = golden("divprune")
    features = want[f"sample{sample}.projected_features"][None]
    assert close(1 - encoder.cosine(features, features)[0], want[f"sample{sample}.cosine_distance"])
    prefix = f"keep18.sample{sample}."
    assert encoder.farthest_first(features, 18)[0].tolist() == want[prefix + "kept_pick_order"].tolist()
    with DivPrune(0.5)(golden_model):
        out = golden_model(**golden_inputs(sample))
    assert close(out.logits[0], want[prefix + "prefill_logits"])


@SAMPLES
def test_cdpruner_relevance_kernel_and_greedy(golden, view, sample):
    want = golden("cdpruner")
    method = pruners(golden, sample)["cdpruner"][1]
    raw = method.relevance(view)
    assert close(raw[0], want[f"m1.sample{sample}.relevance_raw"])
    relevance = encoder.unit_range(raw)
    assert close(relevance[0], want[f"m1.sample{sample}.relevance"])
    features = want[f"sample{sample}.projected_features"][None]
    kernel = encoder.conditional_kernel(features, want[f"m1.sample{sample}.relevance"][None])
    assert close(kernel[0], want[f"m1.sample{sample}.kernel"])
    picks = encoder.greedy_dpp(kernel, 18)[0]
    assert picks.tolist() == want[f"m1.keep18.sample{sample}.kept_pick_order"].tolist()
    # the gains, from determinants: what a pick adds to the log-determinant of those before it
    chosen = kernel[0].double()[picks][:, picks]
    gains = torch.stack([torch.linalg.det(chosen[: k + 1, : k + 1]) for k in range(18)])
    gains = torch.cat((gains[:1], gains[1:] / gains[:-1]))
    assert close(gains, want[f"m1.keep18.sample{sample}.pick_gains"])


def test_the_text_shapes_that_cdpruner_takes(golden_model, golden, golden_inputs):
    """One tensor for all pictures and one for each are the same for one picture; segments are averaged over cosines."""
    want = golden("cdpruner")
    text, weight = want["m1.sample0.text_embeds"], want["visual_projection.weight"]
    one = generate(golden_model, golden_inputs(0), CDPruner(0.5, text=text, image_projection=weight), 1)
    module = torch.nn.Linear(64, 48, bias=False)
    module.weight.data = weight
    for same in ([text], torch.cat((text, 3 * text))):
        out = generate(golden_model, golden_inputs(0), CDPruner(0.5, text=same, image_projection=module), 1)
        assert torch.equal(out.trace.kept_indices, one.trace.kept_indices)
