"""SparseVLM and PyramidDrop against the authors' own code (float32, 1e-4): our loop and stock `generate` under the hooks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from dyrate_lib import PyramidDrop, SparseVLM, generate
from dyrate_lib.clustering import cluster_and_merge
from dyrate_lib.methods.sparsevlm import text_raters
from dyrate_lib.models import Adapter
from dyrate_lib.staged_decoder import StagedDecoder
from tests.test_reference_figures import close, ours, stock


@dataclass
class WatchedSparseVLM(SparseVLM):
    """SparseVLM that notes what it saw and decided."""

    seen: list = field(default_factory=list)

    def cut(self, view):
        cut = super().cut(view)
        self.seen.append((view, cut))
        return cut


@dataclass
class WatchedPyramidDrop(PyramidDrop):
    seen: list = field(default_factory=list)

    def cut(self, view):
        cut = super().cut(view)
        self.seen.append((view, cut))
        return cut


def sparse(want, prefix, cls=SparseVLM):
    """The reference runs: layers 1, 3, 5, counts 20, 12, 6, and the clustering noise that was stored with them."""
    return cls(counts=(20, 12, 6), layers=(1, 3, 5), noise=lambda stage, n: want[f"{prefix}stage{stage}.density_noise"])


@pytest.fixture(params=["zero", "seed0"])
def noise(request):
    return request.param


@pytest.mark.parametrize("sample", [0, 1])
def test_sparsevlm_logits_tokens_and_caches(golden_model, golden, golden_inputs, noise, sample):
    want, inputs, prefix = golden("sparsevlm"), golden_inputs(sample), f"a.noise_{noise}.sample{sample}."
    method = sparse(want, prefix)
    out = ours(golden_model, inputs, method, 16)
    assert close(out.logits[0], want[prefix + "greedy_logits"])
    assert out.new_tokens[0].tolist() == want[prefix + "greedy_tokens"].tolist()
    original = want[prefix + "final_visual_original"]
    with method(golden_model):
        forward = golden_model(**inputs, use_cache=True)
    assert close(forward.logits[0], want[prefix + "logits_all_rows"])
    lengths = [layer.keys.shape[2] for layer in forward.past_key_values.layers]
    assert lengths == want[prefix + "kv_lengths"].tolist()
    assert out.trace.kept_by_layer[0, 0, -1] == len(original)
    for implementation in ("sdpa", "eager"):
        golden_model.set_attn_implementation(implementation)
        try:
            logits, whole, pruning = stock(golden_model, inputs, method, 16)
        finally:
            golden_model.set_attn_implementation("sdpa")
        assert close(logits, want[prefix + "greedy_logits"]), implementation
        lengths = [layer.keys.shape[2] for layer in whole.past_key_values.layers]
        assert lengths == want[prefix + "final_kv_lengths"].tolist()
        assert [int(kept) for kept in pruning.kept] == out.trace.kept[0].tolist()


@pytest.mark.parametrize("sample", [0, 1])
def test_sparsevlm_stages(golden_model, golden, golden_inputs, noise, sample):
    want, prefix = golden("sparsevlm"), f"a.noise_{noise}.sample{sample}."
    method = sparse(want, prefix, WatchedSparseVLM)
    ours(golden_model, golden_inputs(sample), method, 1)
    current = list(range(36))
    for stage, (view, cut) in enumerate(method.seen):
        key = f"{prefix}stage{stage}."
        assert close(cut.scores[0], want[key + "scores"])
        kept = cut.keep[0].nonzero()[:, 0].tolist()
        assert kept == want[key + "kept_in_current"].tolist()
        assert [current[place] for place in kept] == want[key + "kept_original"].tolist()
        assert cut.n_merged == [int(want[key + "n_clusters"])]
        assert close(cut.merged[0], want[key + "merge_output"])
        candidates = want[key + "merge_candidates_current"]
        assert close(view.hidden[0, candidates], want[key + "merge_input"])
        assert method.candidates(view.counts[0] - len(kept)) == len(candidates)
        current = [current[place] for place in kept] + [-1] * cut.n_merged[0]
    assert current == want[prefix + "final_visual_original"].tolist()


@pytest.mark.parametrize("sample", [0, 1])
def test_sparsevlm_raters(golden_model, golden, golden_inputs, sample):
    prompt = Adapter(golden_model).embed(golden_inputs(sample))
    after = int(prompt.image_index[0, -1]) + 1
    found = text_raters(prompt.embeds, prompt.types)[0].nonzero()[:, 0] - after
    assert found.tolist() == golden("sparsevlm")[f"a.sample{sample}.text_raters"].tolist()


@pytest.mark.parametrize(("name", "n_clusters"), [("n16_k2", 2), ("n29_k3", 3)])
def test_clustering(golden, noise, name, n_clusters):
    want = golden("sparsevlm_cluster")
    prefix = f"{name}.noise_{noise}."
    found = cluster_and_merge(want[f"{name}.x"][None], n_clusters, want[prefix + "noise"])
    for key in ("output", "density", "score"):
        assert (getattr(found, key)[0] - want[prefix + key]).abs().max() < 1e-6, key
    for key in ("centres", "assignment"):
        assert getattr(found, key)[0].tolist() == want[prefix + key].tolist()
    if noise == "zero":  # the default
        assert torch.equal(cluster_and_merge(want[f"{name}.x"][None], n_clusters).output, found.output)


PYRAMID = dict(layers=(2, 4, 6), ratios=(0.5, 0.25, 0.125))


@pytest.mark.parametrize("sample", [0, 1])
def test_pyramiddrop_logits_tokens_and_caches(golden_model, golden, golden_inputs, sample):
    want, inputs, prefix = golden("pyramiddrop"), golden_inputs(sample), f"sample{sample}."
    out = ours(golden_model, inputs, PyramidDrop(**PYRAMID), 16)
    assert close(out.logits[0], want[prefix + "greedy_logits"])
    assert out.new_tokens[0].tolist() == want[prefix + "greedy_tokens"].tolist()
    assert PyramidDrop().cuts(8) == PYRAMID["layers"]  # the released ones, scaled to this depth
    with PyramidDrop()(golden_model):
        forward = golden_model(**inputs, use_cache=True)
    assert close(forward.logits[0], want[prefix + "prefill_logits"])
    assert [e.keys.shape[2] for e in forward.past_key_values.layers] == want[prefix + "kv_lengths"].tolist()
    for implementation in ("sdpa", "eager"):
        golden_model.set_attn_implementation(implementation)
        try:
            logits, _, _ = stock(golden_model, inputs, PyramidDrop(**PYRAMID), 16)
        finally:
            golden_model.set_attn_implementation("sdpa")
        assert close(logits, want[prefix + "greedy_logits"]), implementation


@pytest.mark.parametrize("sample", [0, 1])
def test_pyramiddrop_stages_and_positions(golden_model, golden, golden_inputs, sample):
    want, prefix = golden("pyramiddrop"), f"sample{sample}."
    method = WatchedPyramidDrop(**PYRAMID)
    generate(golden_model, golden_inputs(sample), method, 1)
    current = torch.arange(36)
    for stage, (_, cut) in enumerate(method.seen):
        key = f"{prefix}stage{stage}."
        assert close(cut.scores[0], want[key + "scores"])
        kept = cut.keep[0].nonzero()[:, 0]
        assert kept.tolist() == want[key + "kept_in_current"].tolist()
        rank = cut.scores[0].argsort(descending=True)[: len(kept)]
        assert rank.tolist() == want[key + "kept_rank_order"].tolist()
        current = current[kept]
        assert current.tolist() == want[key + "kept_original"].tolist()
    adapter = Adapter(golden_model)
    runner = StagedDecoder(adapter, adapter.embed(golden_inputs(sample)), method, 16)
    runner.prefill()
    for step, token in enumerate(want[prefix + "greedy_tokens"][:15]):
        runner.decode(token[None])
        for layer in (0, 2, 4, 6):
            assert int(runner.state.positions(layer)) == int(want[f"{prefix}decode_positions_layer{layer}"][step])


@pytest.mark.parametrize("sample", [0, 1])
def test_trace_tells_what_the_first_pruned_layer_reads(golden_model, golden, golden_inputs, sample):
    drop = ours(golden_model, golden_inputs(sample), PyramidDrop(**PYRAMID), 4).trace
    want = golden("pyramiddrop")[f"sample{sample}.stage0.kept_rank_order"]
    assert drop.kept_indices[0].tolist() == want.tolist()
    assert drop.kept_at(0, 3).tolist() == want.sort().values.tolist() and drop.layer == 2
    figures, prefix = golden("sparsevlm"), f"a.noise_zero.sample{sample}."
    merged = ours(golden_model, golden_inputs(sample), sparse(figures, prefix), 4).trace
    kept = figures[prefix + "stage0.kept_original"].tolist()
    assert merged.kept_at(0, 0).tolist() == kept and merged.kept[0].tolist() == [len(kept) + 1] * 4
    assert sorted(merged.kept_indices[0].tolist()) == [-1, *kept]
