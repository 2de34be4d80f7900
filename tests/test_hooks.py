"""The context manager: the model is untouched afterwards, whatever happens inside; beams; what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

from dyrate_lib import VTW, DyRate, FastV, InputError, RatePath, generate
from tests.test_generation import METHODS, lively_predictor


def fingerprint(model):
    """Everything a hook could leave behind: hooks and attributes of every module, generation config, weights' sum."""
    hooks = {}
    for name, module in model.named_modules():
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        ):
            hooks[name, kind] = len(getattr(module, kind))
        hooks[name, "attributes"] = sorted(vars(module))
        hooks[name, "forward"] = "forward" in vars(module)
    weights = sum(float(p.double().abs().sum()) for p in model.parameters())
    return hooks, copy.deepcopy(model.generation_config.to_dict()), weights


@pytest.fixture(autouse=True)
def used_before(tiny, batch):
    """transformers marks a model on its first forward pass and first generate: let that be over before any comparison."""
    tiny[0](**batch)
    tiny[0].generate(**batch, max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "none"])
def test_model_is_restored(tiny, batch, name):
    model = tiny[0]
    before = fingerprint(model)
    plain = model(**batch).logits
    with METHODS[name](model):
        assert fingerprint(model) != before  # or the comparison below would show nothing
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert fingerprint(model) == before
    assert torch.equal(model(**batch).logits, plain)


def test_model_is_restored_after_an_exception(tiny, batch):
    model = tiny[0]
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), FastV(2, 0.5)(model):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
        raise ZeroDivisionError
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="inside the model"), FastV(2, 0.5, refresh=True)(model):
        model.model.language_model.layers[5].mlp.register_forward_pre_hook(_fail)
        try:
            model.generate(**batch, max_new_tokens=2, do_sample=False)
        finally:
            model.model.language_model.layers[5].mlp._forward_pre_hooks.clear()
    assert fingerprint(model) == before


def _fail(*_):
    raise RuntimeError("inside the model")


def test_a_context_that_cannot_be_entered_leaves_nothing(tiny, monkeypatch):
    from dyrate_lib.hooks import StockPruning

    before = fingerprint(tiny[0])
    monkeypatch.setattr(StockPruning, "_watch_pictures", _fail)
    with pytest.raises(RuntimeError, match="inside the model"), FastV(2, 0.5, refresh=True)(tiny[0]):
        pass
    assert fingerprint(tiny[0]) == before


def test_two_contexts_at_once_are_refused_and_leave_the_first_intact(tiny, batch):
    model = tiny[0]
    before = fingerprint(model)
    want = generate(model, batch, FastV(2, 0.5), 4, eos_token_id=[]).sequences
    with FastV(2, 0.5)(model):
        with pytest.raises(InputError, match="already being pruned"), VTW(4)(model):
            pass
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None), want)
    assert fingerprint(model) == before


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize(
    "method",
    [FastV(2, 0.5), VTW(4), DyRate(lively_predictor(), 3), DyRate(lively_predictor(), 3, rank="step")],
    ids=["fastv", "vtw", "dyrate", "dyrate-step"],
)
def test_beam_search_scores_are_those_of_its_own_sequences(tiny, alone, method, beams):
    """The winning beam's score must be what the pruned loop, forced along it, gives: so state followed the beams."""
    model = tiny[0]
    for b in (0, 2):
        inputs = alone(b)
        with method(model):
            out = model.generate(
                **inputs, max_new_tokens=6, num_beams=beams, do_sample=False, eos_token_id=None, length_penalty=1.0,
                output_scores=True, return_dict_in_generate=True, num_return_sequences=beams,
            )  # fmt: skip
        start = inputs["input_ids"].shape[1]
        for row in range(beams):
            reply = out.sequences[row : row + 1, start:]
            forced = generate(model, inputs, method, forced_tokens=reply, return_logits=True)
            logp = torch.log_softmax(forced.logits[0], -1).gather(-1, reply[0][:, None]).sum()
            assert float(logp) / reply.shape[1] == pytest.approx(float(out.sequences_scores[row]), abs=1e-3)


def test_beams_in_a_padded_batch_equal_each_alone(tiny, batch, alone):
    model, method = tiny[0], DyRate(lively_predictor(), 3)
    settings = dict(max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None)
    with method(model):
        together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for b in range(4):
        inputs = alone(b)
        with method(model):
            single = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        assert together[b].tolist() == single[0].tolist()


def test_several_sequences_per_prompt_and_sampling(tiny, batch):
    model = tiny[0]
    torch.manual_seed(0)
    with FastV(2, 0.5)(model) as pruning:
        out = model.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=3, eos_token_id=None)
    assert out.shape[0] == 12 and all(kept.tolist() == [18] * 12 for kept in pruning.kept)


def test_what_cannot_be_pruned_is_refused(tiny, batch):
    model = tiny[0]
    with pytest.raises(InputError, match="use_cache=False"), FastV(2, 0.5, refresh=True)(model):
        model.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=True)
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(InputError, match="outside the pruning context"), FastV(2, 0.5)(model):
        model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
    with pytest.raises(InputError, match="static cache|2-D"), FastV(2, 0.5)(model):
        model.generate(**batch, max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True)
    with pytest.raises(InputError, match="input_ids"), FastV(2, 0.5)(model):
        model(inputs_embeds=torch.zeros(1, 5, 64))
    with pytest.raises(InputError, match="not supported"):
        FastV(2, 0.5)(torch.nn.Linear(2, 2))


def test_a_deep_path_cuts_the_cache_under_stock_generate(tiny, alone):
    model, inputs = tiny[0], alone(0)
    with RatePath(3, (0.0, 0.5, 1.0))(model):
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True
        )
    text = inputs["input_ids"].shape[1] - 36
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths == [text + 36 + 4] * 3 + [text + 4] * 5


def test_our_loop_inside_a_context_is_refused(tiny, alone):
    """Which of the two would prune? Neither is left to chance."""
    with FastV(2, 0.5)(tiny[0]), pytest.raises(InputError, match="being pruned by a context"):
        generate(tiny[0], alone(0), VTW(3), max_new_tokens=2)
