"""Every way of decoding that transformers offers, under the context: what it saw is what our loop gives along the same
tokens, and what it did with that is its own. With SDPA, eager and (by stand-in kernels) flash attention."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from dyrate_lib import VTW, FastV, InputError, NoReduction, chat_prompt, generate, load_vlm, prepare_inputs
from tests.contract import (
    EOS,
    GREEDY,
    IMAGE,
    cases,
    one_row,
    random_batch,
    repeated,
    replay,
    representatives,
    small_model,
)

TOLERANCE = 1e-4
STEPS = 6
ROWS = ((2, 7, True), (5, 3, True), (0, 6, False), (1, 11, True))  # unequal prompts, one without a picture

every_method = pytest.mark.parametrize("name", cases())
every_kind = pytest.mark.parametrize("name", representatives())


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def batch():
    return random_batch(6, ROWS, seed=1)


@pytest.fixture(scope="module")
def single(batch):
    return one_row(batch, 3)


def stock(model, inputs, method, **kwargs):
    with method(model):
        return model.generate(**inputs, **{**GREEDY, "max_new_tokens": STEPS, **kwargs})


def reply(out, inputs):
    return out.sequences[:, inputs["input_ids"].shape[1] :]


# -- choosing the next token ---------------------------------------------------------------------------------------

CHOICES = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.7},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "top-k": {"do_sample": True, "top_k": 4},
    "top-p": {"do_sample": True, "top_p": 0.7, "top_k": 0},
    "temperature": {"do_sample": True, "temperature": 0.4, "top_k": 0},
    "all of them": {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize(
    "name, choice",
    [(name, "all of them") for name in cases()]
    + [(name, choice) for name in representatives() for choice in list(CHOICES)[:-1]],
)
def test_choosing(model, batch, name, choice):
    """Raw logits are those of our loop along the same tokens; the scores, and what may be drawn, are transformers' own."""
    method, settings = cases()[name].method, CHOICES[choice]
    torch.manual_seed(0)
    out = stock(model, batch, method, output_scores=True, suppress_tokens=[IMAGE], **settings)
    logits = replay(model, batch, method, out.sequences)
    assert (torch.stack(out.logits, 1) - logits).abs().max() < TOLERANCE
    chosen = torch.stack(out.scores, 1).gather(-1, reply(out, batch)[..., None])
    assert bool(torch.isfinite(chosen).all())
    finite = torch.isfinite(torch.stack(out.scores, 1)).sum(-1)
    if choice == "top-k":
        assert bool((finite <= 4).all())
    if "repetition_penalty" in settings and not settings.get("do_sample"):
        start = batch["input_ids"].shape[1]
        for row in range(len(ROWS)):
            for step in range(STEPS):
                seen = out.sequences[row, : start + step].unique()
                raw, now = out.logits[step][row, seen], out.scores[step][row, seen]
                wanted = torch.where(raw < 0, raw * 1.7, raw / 1.7)
                real = seen != IMAGE  # suppressed
                assert torch.allclose(now[real], wanted[real], atol=1e-5)


@every_kind
def test_the_same_seed_draws_the_same_and_another_does_not(model, batch, name):
    def draw(seed):
        torch.manual_seed(seed)
        return stock(
            model, batch, cases()[name].method, do_sample=True, temperature=3.0, max_new_tokens=8, suppress_tokens=[IMAGE]
        ).sequences

    first = draw(5)
    assert torch.equal(draw(5), first) and not torch.equal(draw(6), first)


@pytest.mark.parametrize("beams", [2, 5])
@every_method
def test_beams(model, single, name, beams):
    """All returned beams, best first, each with the score that our loop gives along it."""
    method = cases()[name].method
    out = stock(
        model, single, method, num_beams=beams, num_return_sequences=beams, output_scores=True, length_penalty=1.0,
        suppress_tokens=[IMAGE],
    )  # fmt: skip
    logits = replay(model, repeated(single, beams), method, out.sequences)
    score = torch.log_softmax(logits, -1).gather(-1, reply(out, single)[..., None])[..., 0].mean(-1)
    assert (score - out.sequences_scores).abs().max() < 1e-3
    assert bool((out.sequences_scores.diff() <= 1e-6).all())
    assert len({tuple(row) for row in out.sequences.tolist()}) == beams


@every_kind
def test_beams_of_a_padded_batch_are_those_of_each_row_alone(model, batch, name):
    method, settings = cases()[name].method, dict(num_beams=3, max_new_tokens=4, suppress_tokens=[IMAGE])
    together = reply(stock(model, batch, method, **settings), batch)
    for row in range(len(ROWS)):
        alone = one_row(batch, row)
        assert reply(stock(model, alone, method, **settings), alone)[0].tolist() == together[row].tolist()


@every_kind
def test_beams_that_end_early(model, batch, name):
    """With an end token beams finish at different steps; finished ones are kept and scored by their own length."""
    method = cases()[name].method
    free = stock(model, batch, method, num_beams=3)
    eos = int(reply(free, batch)[0, 2])
    out = stock(model, batch, method, num_beams=3, eos_token_id=eos, output_scores=True)
    tokens = reply(out, batch)
    logits = replay(model, batch, method, out.sequences)
    logp = torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
    for row in range(len(ROWS)):
        found = (tokens[row] == eos).nonzero()
        length = int(found[0]) + 1 if len(found) else tokens.shape[1]
        assert float(logp[row, :length].sum()) / length == pytest.approx(float(out.sequences_scores[row]), abs=1e-3)


# -- stopping and streaming ----------------------------------------------------------------------------------------


class StopAt(StoppingCriteria):
    """Ends a row when its newest token is `token`."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@every_kind
def test_stopping_criteria_end_row_by_row(model, batch, name):
    """transformers pads ended rows where there is an end token as well; this model does not generate its own."""
    method, start = cases()[name].method, batch["input_ids"].shape[1]
    free = reply(stock(model, batch, method), batch).tolist()
    token = free[1][1]
    stop = StopAt(token)
    out = stock(model, batch, method, stopping_criteria=StoppingCriteriaList([stop]), eos_token_id=EOS)
    steps = out.sequences.shape[1] - start
    ends = [min(row.index(token) + 1 if token in row else STEPS, steps) for row in free]
    for got, all_of_it, end in zip(reply(out, batch).tolist(), free, ends, strict=True):
        assert got == all_of_it[:end] + [model.generation_config.pad_token_id] * (steps - end)
    assert min(ends) < steps  # or nothing was stopped
    ours = generate(model, batch, method, STEPS, eos_token_id=EOS, stopping_criteria=stop)
    assert torch.equal(ours.sequences, out.sequences)
    assert ours.lengths.tolist() == ends
    assert ours.trace.valid.sum(-1).tolist() == ends


class Collect(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


@every_kind
def test_a_streamer_gets_the_prompt_then_token_by_token(model, single, name):
    method, streamer, own = cases()[name].method, Collect(), Collect()
    out = stock(model, single, method, streamer=streamer)
    assert streamer.ended and streamer.got[0] == single["input_ids"][0].tolist()
    assert streamer.got[1:] == [[token] for token in reply(out, single)[0].tolist()]
    generate(model, single, method, STEPS, eos_token_id=[], streamer=own)
    assert own.got == streamer.got and own.ended


@pytest.mark.parametrize("method", [FastV(2, 0.5), VTW(4)], ids=["fastv", "vtw"])
def test_stop_strings_and_a_text_streamer(tiny, alone, method):
    model, processor = tiny
    inputs = alone(1)
    free = generate(model, inputs, method, 8, eos_token_id=[])
    words = [processor.tokenizer.decode([token]).strip() for token in free.new_tokens[0].tolist()]
    stop = next(word for word in words[1:] if word.isascii() and len(word) > 2)
    with method(model):
        out = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, stop_strings=[stop],
            tokenizer=processor.tokenizer,
        )  # fmt: skip
    first = words.index(stop)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == free.new_tokens[0, : first + 1].tolist()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=30)
    with method(model):
        settings = dict(inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, streamer=streamer)
        thread = threading.Thread(target=model.generate, kwargs=settings)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text.strip() == processor.tokenizer.decode(free.new_tokens[0]).strip()


# -- prompts without a picture ---------------------------------------------------------------------------------------


@every_method
def test_prompts_without_a_picture_pass_through(model, name):
    """Nothing to cut: greedy, beams and sampling are those of the unpruned model."""
    method, inputs = cases()[name].method, random_batch(6, [(0, 5, False), (0, 9, False)], seed=4)
    for settings in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "suppress_tokens": [IMAGE]}):
        torch.manual_seed(1)
        plain = stock(model, inputs, NoReduction(), **settings)
        torch.manual_seed(1)
        pruned = stock(model, inputs, method, **settings)
        assert torch.equal(plain.sequences, pruned.sequences)
    ours = generate(model, inputs, method, STEPS, eos_token_id=[])
    assert torch.equal(ours.sequences, stock(model, inputs, NoReduction()).sequences)
    assert int(ours.trace.kept.sum()) == 0


# -- our own loop's further settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastv", "dyrate"])
def test_our_loop_penalises_repetition_as_transformers_does(model, batch, name):
    method = cases()[name].method
    out = stock(model, batch, method, repetition_penalty=1.7)
    ours = generate(model, batch, method, STEPS, repetition_penalty=1.7, eos_token_id=[])
    assert torch.equal(out.sequences, ours.sequences)
    assert not torch.equal(ours.sequences, generate(model, batch, method, STEPS, eos_token_id=[]).sequences)
    with pytest.raises(InputError, match="repetition_penalty"):
        generate(model, batch, method, STEPS, repetition_penalty=0.0)


@every_kind
def test_our_loop_draws_several_sequences_per_prompt(model, batch, name):
    method = cases()[name].method
    settings = dict(do_sample=True, temperature=2.0, seed=0, eos_token_id=[], return_logits=True)
    out = generate(model, batch, method, 4, num_return_sequences=3, **settings)
    assert out.sequences.shape[0] == 3 * len(ROWS)
    assert len({tuple(row) for row in out.new_tokens[:3].tolist()}) > 1
    wide = repeated(batch, 3)
    assert torch.equal(out.sequences[:, : wide["input_ids"].shape[1]], wide["input_ids"])
    again = generate(model, wide, method, forced_tokens=out.new_tokens, return_logits=True)
    assert (again.logits - out.logits).abs().max() < TOLERANCE
    assert torch.equal(again.trace.kept_by_layer, out.trace.kept_by_layer)
    with pytest.raises(InputError, match="num_return_sequences"):
        generate(model, batch, method, 4, num_return_sequences=2)  # greedy ones would all be the same


# -- attention implementations ---------------------------------------------------------------------------------------


@every_method
def test_eager_attention_gives_the_same(model, batch, name):
    method, eager = cases()[name].method, small_model(attention="eager")
    assert eager.model.language_model.config._attn_implementation == "eager"
    for settings in ({}, {"num_beams": 2}):
        want, got = (stock(m, batch, method, **settings) for m in (model, eager))
        assert torch.equal(want.sequences, got.sequences)
    single = one_row(batch, 0)  # no padding: nothing needs a mask
    want, got = (torch.stack(stock(m, single, method).logits) for m in (model, eager))
    assert (want - got).abs().max() < TOLERANCE


@pytest.fixture
def flash_model(monkeypatch):
    """The small model on transformers' own flash attention path, its two kernels replaced by plain ones."""
    import transformers.modeling_flash_attention_utils as flash

    def dense(q, k, v, softmax_scale=None, causal=False):
        """[B, T, heads, d]; a shorter query stands at the end, as in flash attention 2.1 and later."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * softmax_scale
        if causal:
            rows, columns = scores.shape[-2:]
            scores = scores.masked_fill(~torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        """[tokens, heads, d], the samples one behind the other."""
        calls.append("varlen")
        parts = []
        for i in range(len(cu_seqlens_q) - 1):
            rows, columns = slice(*cu_seqlens_q[i : i + 2]), slice(*cu_seqlens_k[i : i + 2])
            parts.append(dense(q[None, rows], k[None, columns], v[None, columns], softmax_scale, causal)[0])
        return torch.cat(parts)

    def plain(q, k, v, softmax_scale=None, causal=False):
        calls.append("dense")
        return dense(q, k, v, softmax_scale, causal)

    calls: list[str] = []
    for name in dir(flash):
        if name.startswith("_flash_") and name.endswith("_fn") or name in ("_pad_fn", "_unpad_fn", "_loaded_implementation"):
            monkeypatch.setattr(flash, name, None)
    monkeypatch.setattr(flash, "_process_flash_kwargs_fn", None)
    monkeypatch.setattr(
        flash, "_lazy_imports", lambda *a, **k: (plain, varlen, None, flash._pad_input, flash._unpad_input)
    )
    model = small_model(attention="eager")  # an instance that no other test holds SDPA on
    config = model.model.language_model.config
    config._attn_implementation = "flash_attention_2"
    assert config._attn_implementation == "flash_attention_2"
    yield model, calls
    config._attn_implementation = "eager"


@pytest.mark.parametrize("name", [name for name, case in cases().items() if case.flash])
def test_flash_attention_without_a_mask(model, batch, single, flash_model, name):
    """One prompt needs no mask, an unequal batch only flash attention's own (which entries are there)."""
    method, (flash, calls) = cases()[name].method, flash_model
    want, got = (stock(m, single, method) for m in (model, flash))
    assert torch.equal(want.sequences, got.sequences)
    assert (torch.stack(want.logits) - torch.stack(got.logits)).abs().max() < TOLERANCE
    if not cases()[name].spare:
        assert set(calls) == {"dense"}
    want, got = (stock(m, batch, method) for m in (model, flash))
    assert (torch.stack(want.logits) - torch.stack(got.logits)).abs().max() < TOLERANCE
    assert "varlen" in calls
    want, got = (stock(m, batch, method, num_beams=2) for m in (model, flash))
    assert torch.equal(want.sequences, got.sequences)


@pytest.mark.parametrize("name", [name for name, case in cases().items() if not case.flash])
def test_what_flash_attention_cannot_do_is_refused(flash_model, name):
    with pytest.raises(InputError, match="flash attention"), cases()[name].method(flash_model[0]):
        pass


def test_an_unknown_attention_is_refused(model):
    config = model.model.language_model.config
    config._attn_implementation, before = "flex_attention", config._attn_implementation
    try:
        with pytest.raises(InputError, match="sdpa"), FastV(2, 0.5)(model):
            pass
    finally:
        config._attn_implementation = before


def test_loading_with_eager_attention(tiny, alone):
    """`load_vlm(attn_implementation=...)` gives a model that prunes the same."""
    eager, _ = load_vlm("random:tiny", device="cpu", attn_implementation="eager")
    inputs = alone(0)
    with FastV(2, 0.5)(eager):
        got = eager.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(got, generate(tiny[0], inputs, FastV(2, 0.5), 4, eos_token_id=[]).sequences)


def test_a_processor_prompt_without_a_picture_streams_and_stops(tiny):
    inputs = prepare_inputs(tiny[1], None, [chat_prompt("Hello there.", image=False)])
    streamer = Collect()
    with FastV(2, 0.5)(tiny[0]):
        out = tiny[0].generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, streamer=streamer)
    assert sum(streamer.got, []) == out[0].tolist()
