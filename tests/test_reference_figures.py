"""FastV and VTW against the authors' own code (float32, 1e-4): our loop and stock `generate` under the hooks."""

from __future__ import annotations

import pytest
import torch

from dyrate_lib import VTW, FastV, NoReduction, generate

TOLERANCE = 1e-4


def stock(model, inputs, method, steps):
    with method(model) as pruning:
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits, 1)[0], out, pruning


def ours(model, inputs, method, steps):
    return generate(model, inputs, method, max_new_tokens=steps, eos_token_id=[], return_logits=True)


def close(a, b):
    return (a - b).abs().max() < TOLERANCE


CASES = [
    ("baseline", "sample{i}.", NoReduction(), 16),
    ("fastv", "k2_r0.5.sample{i}.", FastV(2, 0.5), 16),
    ("vtw", "sample{i}.", VTW(4), 16),
    ("fastv", "nocache_k2_r0.5.sample{i}.", FastV(2, 0.5, refresh=True), 8),
]


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize(("file", "prefix", "method", "steps"), CASES, ids=["none", "fastv", "vtw", "fastv-refresh"])
def test_logits_and_tokens_match(golden_model, golden, golden_inputs, file, prefix, method, steps, sample):
    want, inputs, prefix = golden(file), golden_inputs(sample), prefix.format(i=sample)
    out = ours(golden_model, inputs, method, steps)
    assert close(out.logits[0], want[prefix + "greedy_logits"])
    assert out.new_tokens[0].tolist() == want[prefix + "greedy_tokens"].tolist()
    for implementation in ("sdpa", "eager"):
        golden_model.set_attn_implementation(implementation)
        try:
            logits, _, _ = stock(golden_model, inputs, method, steps)
        finally:
            golden_model.set_attn_implementation("sdpa")
        assert close(logits, want[prefix + "greedy_logits"]), implementation


@pytest.mark.parametrize("sample", [0, 1])
def test_fastv_keeps_the_same_tokens(golden_model, golden, golden_inputs, sample):
    want, inputs, prefix = golden("fastv"), golden_inputs(sample), f"k2_r0.5.sample{sample}."
    trace = ours(golden_model, inputs, FastV(2, 0.5), 16).trace
    assert trace.kept_indices[0].tolist() == want[prefix + "kept_visual_rank_order"].tolist()
    assert trace.kept_at(0, 0).tolist() == want[prefix + "kept_visual"].tolist()
    refreshed = ours(golden_model, inputs, FastV(2, 0.5, refresh=True), 8).trace
    kept = [refreshed.kept_at(0, t).tolist() for t in range(8)]
    assert kept == want[f"nocache_k2_r0.5.sample{sample}.kept_visual_per_step"].tolist()


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize(("file", "prefix", "method"), [c[:3] for c in CASES[1:3]], ids=["fastv", "vtw"])
def test_rows_and_cache_lengths_under_stock_forward(golden_model, golden, golden_inputs, file, prefix, method, sample):
    want, inputs, prefix = golden(file), golden_inputs(sample), prefix.format(i=sample)
    with method(golden_model):
        out = golden_model(**inputs, use_cache=True)
    assert close(out.logits[0], want[prefix + "prefill_logits_kept_rows"])
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == want[prefix + "kv_lengths"].tolist()
    _, whole, _ = stock(golden_model, inputs, method, 16)
    if prefix + "final_kv_lengths" in want:
        lengths = [layer.keys.shape[2] for layer in whole.past_key_values.layers]
        assert lengths == want[prefix + "final_kv_lengths"].tolist()
