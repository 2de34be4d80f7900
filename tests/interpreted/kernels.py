"""Every Triton kernel against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib.engine import attention_kernel, small_kernels, tower_kernels, twins
from dyrate_lib.engine.skinny_kernel import Config, plain, skinny
from tests.engine_cases import attention_case, check_attention, error, lively_tower, stock_features
from tests.interpreted import DEVICE

CASES = {
    "none kept": dict(heads=2, kv=2, d=16, kept=(0, 0), filled=(7, 3), start=20, entries=64),
    "all kept": dict(heads=2, kv=2, d=32, kept=(40, 40), filled=(9, 9), start=40, entries=64),
    "ragged": dict(heads=3, kv=3, d=16, kept=(0, 40, 13, 1), filled=(1, 20, 0, 5), start=40, entries=96),
    "grouped": dict(heads=6, kv=2, d=32, kept=(5, 33, 0), filled=(30, 1, 12), start=33, entries=80),
    "all text": dict(heads=2, kv=2, d=64, kept=(0, 0, 0), filled=(150, 64, 63), start=0, entries=160),
    "alone": dict(heads=4, kv=1, d=16, kept=(0,), filled=(0,), start=0, entries=8),
    "one head": dict(heads=1, kv=1, d=128, kept=(100,), filled=(28,), start=100, entries=192),
    "indexed": dict(heads=2, kv=2, d=16, kept=(7, 30, 0), filled=(4, 4, 4), start=30, entries=64, indexed=True),
    "indexed groups": dict(heads=4, kv=2, d=16, kept=(7, 30, 0), filled=(4, 4, 4), start=30, entries=64, indexed=True),
}
RUNS = {"one split": {"splits": 1, "block": 32}, "four splits": {"splits": 4, "block": 16}, "own choice": {}}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("looks", [False, True])
def test_decode_attention(name, run, looks):
    case = attention_case(1, **CASES[name], device=DEVICE)
    check_attention(partial(attention_kernel.decode_attention, **RUNS[run]), case, looks)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_decode_attention_of_any_lengths(data):
    kv, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]), label="heads")
    start, room = data.draw(st.integers(0, 50), label="slots"), data.draw(st.integers(1, 60), label="room")
    lengths = st.tuples(st.integers(0, start), st.integers(0, room - 1))
    kept, filled = zip(*data.draw(st.lists(lengths, min_size=1, max_size=3), label="kept, filled"), strict=True)
    indexed = start > 0 and data.draw(st.booleans(), label="indexed")
    case = attention_case(
        data.draw(st.integers(0, 99)),
        kv * group,
        kv,
        16,
        kept,
        filled,
        start,
        start + room,
        indexed=indexed,
        device=DEVICE,
    )
    splits, block = data.draw(st.sampled_from([1, 2, 8])), data.draw(st.sampled_from([16, 32]))
    kernel = partial(attention_kernel.decode_attention, splits=splits, block=block)
    check_attention(kernel, case, data.draw(st.booleans(), label="looks"))


def test_shares_follow_the_types():
    case = attention_case(5, **CASES["ragged"], device=DEVICE)
    shares = torch.zeros(4, 3, 4, device=DEVICE)
    types = torch.full((4, 96), 2, dtype=torch.int8, device=DEVICE)
    attention_kernel.decode_attention(**case, types=types, shares=shares)
    torch.testing.assert_close(shares[..., 2], torch.ones_like(shares[..., 2]))
    assert not shares[..., [0, 1, 3]].any()


def test_rms_norm_and_swiglu():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 172, generator=generator).to(DEVICE)
    weight = torch.randn(172, generator=generator).to(DEVICE)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert error(small_kernels.rms_norm(x, weight, 1e-5), wanted) < 1e-6
    assert error(twins.rms_norm(x, weight, 1e-5), wanted) < 1e-6
    x = torch.randn(3, 2 * 2100, generator=generator).to(DEVICE)
    gate, up = x.double().chunk(2, -1)
    assert error(small_kernels.swiglu(x), gate / (1 + (-gate).exp()) * up) < 1e-6


@pytest.mark.parametrize("heads, kv, d", [(4, 4, 16), (6, 2, 32), (17, 1, 16)])
def test_rope_store(heads, kv, d):
    generator = torch.Generator().manual_seed(4)
    batch, length, entries = 2, 5, 9
    qkv = torch.randn(batch, length, (heads + 2 * kv) * d, generator=generator).to(DEVICE)
    cos, sin = (torch.randn(batch, length, d, generator=generator).to(DEVICE) for _ in "cs")
    dest = torch.tensor([[8, 0, -1, 3, 4], [2, -1, -1, 0, 1]], dtype=torch.int32, device=DEVICE)
    caches = [torch.full((batch, kv, entries, d), torch.nan, device=DEVICE) for _ in "kv"]
    wide = [cache.double() for cache in caches]
    wanted = twins.rope_store(qkv.double(), cos.double(), sin.double(), *wide, dest, heads)
    found = small_kernels.rope_store(qkv.clone(), cos, sin, *caches, dest, heads)
    for a, b in zip((*found, *caches), (*wanted, *wide), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("what", ["plain", "norm", "bias", "gated", "residual", "norm gated", "norm bias"])
def test_skinny(rows, what):
    generator = torch.Generator().manual_seed(5)
    width, n = 100, 44
    x, weight = (torch.randn(k, width, generator=generator).to(DEVICE) for k in (rows, n))
    kwargs = {}
    if "norm" in what:
        kwargs |= {"norm": torch.randn(width, generator=generator).to(DEVICE), "eps": 1e-5}
    if "bias" in what:
        kwargs["bias"] = torch.randn(n, generator=generator).to(DEVICE)
    if "gated" in what:
        kwargs["gated"] = True
    if "residual" in what:
        kwargs["residual"] = torch.randn(rows, n, generator=generator).to(DEVICE)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    wanted = plain(x.double(), weight.double(), **double)
    assert error(skinny(x, weight, Config(16, 64, 4, 1), **kwargs), wanted) < 2e-6
    assert error(plain(x, weight, **kwargs), wanted) < 2e-6


@pytest.mark.parametrize("rows, width", [(5, 172), (3, 1024), (1, 32)])
def test_add_layer_norm(rows, width):
    generator = torch.Generator().manual_seed(6)
    x, delta = (torch.randn(rows, width, generator=generator).to(DEVICE) for _ in "xd")
    weight, bias = (torch.randn(width, generator=generator).to(DEVICE) for _ in "wb")
    total = x.double() + delta.double() + 3
    centred = total - total.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    for function in (tower_kernels.add_layer_norm, twins.add_layer_norm):
        found, normed = function(x + 3, delta.clone(), weight, bias, 1e-5)
        assert error(found, total) < 1e-6 and error(normed, wanted) < 2e-6


@pytest.mark.parametrize("count", [5, 2048, 5000])
def test_quick_gelu(count):
    x = 4 * torch.randn(1, count, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    wanted = x.double() / (1 + (-1.702 * x.double()).exp())
    for function in (tower_kernels.quick_gelu, twins.quick_gelu):
        assert error(function(x.clone()), wanted) < 1e-6


def test_tower():
    """All of it by the kernels, as the stock modules compute."""
    from dyrate_lib.engine.tower import Tower
    from dyrate_lib.engine.triton_ops import TritonOps
    from dyrate_lib.models import Adapter

    model = lively_tower().to(DEVICE)
    x = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    with torch.no_grad():
        wanted = stock_features(model, x)
        tower = Tower(Adapter(model), torch.device(x.device), torch.float32)
        assert tower.odd is None
        found = tower.features(x, TritonOps())
    assert error(found, wanted) < 1e-5
