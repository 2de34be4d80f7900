"""One query row's attention by plain products, against float64 and against torch's kernel; on a GPU the loop that takes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib import DyRate, FastV, RatePredictor, generate
from dyrate_lib.attention import attend, attend_one_row
from dyrate_lib.decoder import PrunedDecoder
from dyrate_lib.step import DirectStep, ModuleStep
from tests.contract import random_batch, small_model

MASKS = ("none", "rows", "heads", "added")


def mask_of(kind: str, allowed: torch.Tensor, heads: int):
    if kind == "none":
        return None
    if kind == "heads":
        return allowed[:, None, None].expand(-1, heads, 1, -1)
    wide = allowed[:, None, None]
    return wide if kind == "rows" else torch.zeros(wide.shape).masked_fill(~wide, -torch.inf)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([(4, 4), (6, 2), (7, 1)]), st.integers(1, 40),
    st.sampled_from(MASKS),
)  # fmt: skip
def test_products_are_attention(seed, batch, heads, length, kind):
    n_q, n_kv = heads
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_q, 1, 8, generator=random)
    cache = torch.randn(2, batch, n_kv, length + 9, 8, generator=random)
    k, v = cache[:, :, :, 4 : 4 + length]  # a part of a longer cache, as a step reads it
    allowed = torch.rand(batch, length, generator=random) < 0.7
    allowed[:, -1] = True  # a row reads itself at least
    mask = mask_of(kind, allowed, n_q)
    got = attend_one_row(q, k, v, mask)
    assert got.shape == q.shape and got.dtype == torch.float32
    torch.testing.assert_close(got, attend(q, k, v, mask), rtol=1e-5, atol=1e-6)
    exact = attend(q.double(), k.double(), v.double(), mask if kind != "added" else mask.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def _predictor() -> RatePredictor:
    made = RatePredictor(4)
    with torch.no_grad():
        made.linear.weight.normal_(0, 3, generator=torch.Generator().manual_seed(1))
    return made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", [None, FastV(2, 0.5), DyRate(_predictor())], ids=lambda m: "none" if m is None else m.name)
def test_on_a_gpu_the_reference_loop_says_what_it_said_by_torchs_kernel_and_the_modules(method, monkeypatch):
    model, prompts = small_model().cuda(), random_batch(6, [(2, 5, True), (3, 4, True), (1, 9, True)])
    batch = {key: value.cuda() for key, value in prompts.items()}
    taken: list[str] = []

    def spy(*given):
        taken.append("row")
        return attend_one_row(*given)

    monkeypatch.setattr("dyrate_lib.attention.attend_one_row", spy)
    decoders: list[PrunedDecoder] = []
    made = PrunedDecoder.__init__
    monkeypatch.setattr(PrunedDecoder, "__init__", lambda self, *a: (decoders.append(self), made(self, *a))[1])
    fast = generate(model, batch, method, 12, eos_token_id=[], engine="reference", return_logits=True)
    assert taken and isinstance(decoders[0]._step, DirectStep)

    monkeypatch.setattr("dyrate_lib.decoder.step_for", ModuleStep)
    monkeypatch.setattr("dyrate_lib.attention.attend_one_row", _by_torch)
    slow = generate(model, batch, method, 12, eos_token_id=[], engine="reference", return_logits=True)
    torch.testing.assert_close(fast.logits, slow.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(fast.trace.kept, slow.trace.kept)


def _by_torch(q, k, v, allowed=None):
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
