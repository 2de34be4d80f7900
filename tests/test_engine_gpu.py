"""The graph engine on a GPU: captured, in float32, the reference loop's tokens for every method; kernels at real sizes; bf16.

    pytest -m gpu tests/test_engine_gpu.py

Every run is made three times: as it is, captured, replayed (see `engine.graphs.Replayable`).
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
if CUDA:
    pytest.importorskip("triton")

from dyrate_lib import VTW, DyRate, FastV, NoReduction, RatePath, generate  # noqa: E402
from dyrate_lib.engine import Engine, twins  # noqa: E402
from tests.contract import lively_predictor, random_batch, small_model  # noqa: E402
from tests.engine_cases import (  # noqa: E402
    METHODS,
    ROWS,
    SETTINGS,
    attention_case,
    check_attention,
    check_same,
    error,
    methods_and,
    stock_features,
)

BATCHES = {"ragged": (ROWS, 1), "single": (ROWS[1:2], 2), "many": (ROWS * 6, 3)}
BF16 = 2**-8  # half a unit in the last place of 1, in bfloat16
KINDS = ("qkv", "out", "gate_up", "down", "head")


@pytest.fixture(scope="module", autouse=True)
def plain_float32():
    """No TF32 anywhere: float32 is compared to the last digits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def model():
    return copy.deepcopy(small_model()).to("cuda")


def ops(kind: str):
    """Kernels: as tuned; cuBLAS for every product; skinny kernels for every product; with programmatic dependent launch."""
    from dyrate_lib.engine.skinny_kernel import Config
    from dyrate_lib.engine.triton_ops import TritonOps

    skinny = {(1, name): Config(8, 64, 4, 1) for name in KINDS}
    skinny |= {(limit, name): Config(16, 64, 4, 3) for limit in (16, 64) for name in KINDS}
    if kind == "early" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("programmatic dependent launch needs Hopper")
    return {
        "tuned": lambda: TritonOps(),
        "cublas": lambda: TritonOps({}),
        "skinny": lambda: TritonOps(skinny),
        "early": lambda: TritonOps(skinny, early=True),
    }[kind]()


def engine_for(model, kind="tuned", capture=True):
    return Engine(model, ops(kind), capture=capture)


@pytest.fixture(scope="module")
def engine(model):
    made = engine_for(model)
    yield made
    made.release()


def same(engine, model, batch, method, times=3, **kwargs):
    wanted = generate(model, batch, method, engine="reference", **kwargs)
    for _ in range(times):
        check_same(generate(model, batch, method, engine=engine, **kwargs), wanted, logits=1e-3, attention=1e-4)
    return wanted


# -- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", methods_and(BATCHES))
def test_captured_same_as_the_reference(model, engine, name, size):
    rows, seed = BATCHES[size]
    same(engine, model, random_batch(6, rows, seed=seed), METHODS[name], max_new_tokens=16, eos_token_id=[],
         return_logits=True)  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["dyrate", "fastv", "none", "st3"])
def test_captured_with_settings(model, engine, setting, name):
    batch = random_batch(6, ROWS, seed=1)
    kwargs = dict(max_new_tokens=20, return_logits=True) | SETTINGS[setting]
    out = same(engine, model, batch, METHODS[name], **kwargs)
    if setting == "eos":
        assert int(out.lengths.max()) < 20 and len(set(out.lengths.tolist())) > 1


@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("kind", ["tuned", "cublas", "skinny", "early"])
def test_every_way_to_multiply(model, kind, capture):
    model = copy.deepcopy(model)  # a second engine on one model takes the first one's weights from it
    engine = engine_for(model, kind, capture)
    try:
        for rows, seed in BATCHES.values():
            batch = random_batch(6, rows, seed=seed)
            for method in (METHODS["dyrate"], METHODS["none"], METHODS["dyrate-step"]):
                same(engine, model, batch, method, max_new_tokens=10, eos_token_id=[], return_logits=True)
    finally:
        engine.release()


def test_methods_and_shapes_take_turns(model, engine, monkeypatch):
    """Buffers and graphs of one plan are not taken for another's, and memory does not grow with the plans met.

    Each plan is met four times in a row, by prompts of two seeds, so that its graphs are captured and replayed; then so many
    others follow that it goes, and the next round makes it anew.
    """
    from dyrate_lib.engine import graphs, runner

    groups = [
        [(name, random_batch(6, rows, seed=seed), steps) for seed in (5, 6)]
        for name in ("dyrate", "fastv", "vtw", "none", "st3")
        for rows in (ROWS, ROWS[:1], ROWS[2:])
        for steps in (5, 40)
    ]
    turns = [turn for group in groups for turn in group * 2]
    reference = {
        id(batch): generate(model, batch, METHODS[name], steps, engine="reference", eos_token_id=[])
        for group in groups
        for name, batch, steps in group
    }
    made, replays, run_init, replay = [], [], runner.Run.__init__, graphs.Replayable.__call__

    def counted(self, *args):
        made.append(1)
        run_init(self, *args)

    def called(self, work):
        replay(self, work)
        replays.append(self.graph is not None and self.calls > 2)

    monkeypatch.setattr(runner.Run, "__init__", counted)
    monkeypatch.setattr(graphs.Replayable, "__call__", called)
    engine.reset()
    held, made_by_round = [], []
    for _ in range(3):
        del made[:], replays[:]
        for name, batch, steps in turns:
            ours = generate(model, batch, METHODS[name], steps, engine=engine, eos_token_id=[])
            check_same(ours, reference[id(batch)], attention=1e-4)
        del ours
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
        made_by_round.append(len(made))
        assert sum(replays) > len(turns)
    assert len(engine.plans) == runner.PLANS < made_by_round[1] == made_by_round[2]
    heads = [part for run in engine.plans.values() for part in run._parts["head"].values()]
    assert sum(part.graph is not None and part.calls == 4 for part in heads) >= runner.PLANS // 2
    assert held[2] <= held[1] * 1.05 + 2**20


def test_all_graphs_gone_and_others_made(model):
    """A pool that has lost its last graph is not used again: no capture fails for it."""
    model = copy.deepcopy(model)
    engine, batch = engine_for(model), random_batch(6, ROWS, seed=1)
    for _ in range(3):
        same(engine, model, batch, METHODS["fastv"], max_new_tokens=6, eos_token_id=[])
        pool = engine.pool
        engine.plans.clear()
        engine.eyes.clear()
        gc.collect()
        assert not engine.graphs and pool is not None
    same(engine, model, batch, METHODS["dyrate"], max_new_tokens=6, eos_token_id=[])
    assert engine.pool != pool
    assert all(not part.failed for run in engine.plans.values() for parts in run._parts.values() for part in parts.values())
    engine.release()


def test_no_wait_inside_a_step(model):
    """With graphs at hand, a decode step asks nothing of the device."""
    model = copy.deepcopy(model)
    engine = engine_for(model)
    batch = random_batch(6, ROWS, seed=1)
    for method in (DyRate(lively_predictor(), 3), FastV(2, 0.5), VTW(4), NoReduction()):
        generate(model, batch, method, 4, engine=engine, eos_token_id=[])
        run = next(reversed(engine.plans.values()))
        assert run.method is method
        assert all(part.graph is not None and not part.failed for part in run._parts["decode"].values())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.state.step.fill_(1)
            run.decode()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    engine.release()


def test_everything_that_may_be_captured_is(model, caplog):
    """No method or setting makes a capture fail (a failure would only be slow, and be said in the log)."""
    model = copy.deepcopy(model)
    engine = engine_for(model)
    batch = random_batch(6, ROWS, seed=1)
    with caplog.at_level("WARNING", logger="dyrate_lib.engine"):
        for method in METHODS.values():
            for _ in range(2):
                generate(model, batch, method, 6, engine=engine, eos_token_id=[])
        for setting in SETTINGS.values():
            for _ in range(2):
                kwargs = dict(max_new_tokens=6) | setting
                generate(model, batch, METHODS["dyrate"], engine=engine, **kwargs)
    engine.release()
    assert not [record for record in caplog.records if record.name == "dyrate_lib.engine"], caplog.text


def test_releasing_gives_memory_back():
    model = copy.deepcopy(small_model()).to("cuda")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    engine = engine_for(model)
    for _ in range(3):
        generate(model, random_batch(6, ROWS, seed=1), METHODS["dyrate"], 8, engine=engine, eos_token_id=[])
    engine.release()
    del engine
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held + 2**20
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def first_difference(a, b):
    """[B] float: the first column where rows differ, their width where they do not."""
    differ = a != b
    return torch.where(differ.any(-1), differ.long().argmax(-1), a.shape[1]).double()


@pytest.mark.parametrize("name", ["none", "fastv", "path"])
def test_bfloat16_is_as_close_to_float32_as_the_reference(name):
    """Both loops in bfloat16 against the float32 reply: errors of logits along it, and where greedy replies part from it."""
    wide = copy.deepcopy(small_model()).to("cuda")
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    batch, method = random_batch(6, ROWS * 8, seed=4), METHODS[name]
    true = generate(wide, batch, method, 24, engine="reference", eos_token_id=[], return_logits=True)
    engine = engine_for(narrow)
    kwargs = {"forced_tokens": true.new_tokens, "return_logits": True}
    theirs = generate(narrow, batch, method, engine="reference", **kwargs).logits.float()
    ours = generate(narrow, batch, method, engine=engine, **kwargs).logits.float()
    scale = true.logits.norm(dim=-1)
    mine, other = ((logits - true.logits).norm(dim=-1) / scale for logits in (ours, theirs))
    print(f"{name}: median error {float(mine.median()):.4f}, the reference's {float(other.median()):.4f}")
    assert float(mine.median()) < 1.3 * float(other.median())
    assert float(mine.quantile(0.9)) < 1.5 * float(other.quantile(0.9))
    greedy = {"max_new_tokens": 24, "eos_token_id": []}
    parts = [
        first_difference(out.new_tokens, true.new_tokens).mean()
        for out in (
            generate(narrow, batch, method, engine=engine, **greedy),
            generate(narrow, batch, method, engine="reference", **greedy),
        )
    ]
    print(f"{name}: first difference at token {float(parts[0]):.1f}, the reference's at {float(parts[1]):.1f}")
    assert float(parts[0]) > 0.6 * float(parts[1])
    engine.release()


def test_bfloat16_is_the_same_in_every_run():
    """No atomics: the same reply, bit for bit, as it is, captured, and replayed."""
    narrow = copy.deepcopy(small_model()).to("cuda", torch.bfloat16)
    engine, batch = engine_for(narrow), random_batch(6, ROWS, seed=1)
    for method in (METHODS["dyrate"], RatePath(3, (0.3, 0.9))):
        outs = [
            generate(narrow, batch, method, 16, engine=engine, eos_token_id=[], return_logits=True) for _ in range(4)
        ]
        for out in outs[1:]:
            assert torch.equal(out.logits, outs[0].logits) and torch.equal(out.new_tokens, outs[0].new_tokens)
    engine.release()


# -- kernels ----------------------------------------------------------------------------------------------------------

SIZES = {
    "7b": dict(heads=32, kv=32, d=128, kept=(576, 0, 100), filled=(64, 1, 127), start=576, entries=736),
    "7b, alone": dict(heads=32, kv=32, d=128, kept=(57,), filled=(90,), start=60, entries=192),
    "2880 tokens": dict(heads=40, kv=40, d=128, kept=(2880, 288), filled=(70, 70), start=2880, entries=2976),
    "grouped": dict(heads=28, kv=4, d=128, kept=(300, 7), filled=(64, 33), start=300, entries=448),
    "one key head": dict(heads=8, kv=1, d=64, kept=(12, 0), filled=(5, 0), start=12, entries=64),
    "small heads": dict(heads=4, kv=4, d=16, kept=(36, 5), filled=(20, 9), start=36, entries=96),
    "wide heads": dict(heads=8, kv=2, d=256, kept=(36, 5), filled=(20, 9), start=36, entries=96),
    "all text": dict(heads=32, kv=32, d=128, kept=(0, 0), filled=(640, 599), start=0, entries=704),
    "indexed": dict(heads=32, kv=32, d=128, kept=(500, 3), filled=(64, 9), start=576, entries=736, indexed=True),
}
PRECISIONS = {torch.float32: 2e-5, torch.bfloat16: 4 * BF16, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_decode_attention(name, looks, dtype):
    from dyrate_lib.engine.attention_kernel import decode_attention

    case = attention_case(1, **SIZES[name], dtype=dtype, device="cuda")
    check_attention(decode_attention, case, looks, PRECISIONS[dtype])


@pytest.mark.parametrize("splits", [1, 2, 8, 32])
@pytest.mark.parametrize("block, warps", [(16, 1), (32, 4), (64, 4), (64, 8)])
def test_decode_attention_however_it_is_split(splits, block, warps):
    from functools import partial

    from dyrate_lib.engine.attention_kernel import decode_attention

    for name in ("7b", "grouped"):
        case = attention_case(2, **SIZES[name], device="cuda")
        check_attention(partial(decode_attention, splits=splits, block=block, warps=warps), case, True, 2e-5)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_small_kernels(dtype):
    from dyrate_lib.engine import small_kernels

    generator = torch.Generator("cuda").manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    for rows, width in ((1, 4096), (70, 5120), (3, 172)):
        x, weight = normal(rows, width), normal(width)
        wanted = twins.rms_norm(x.double(), weight.double(), 1e-5)
        assert error(small_kernels.rms_norm(x, weight, 1e-5), wanted) < PRECISIONS[dtype]
        x = normal(rows, 2 * width)
        assert error(small_kernels.swiglu(x), twins.swiglu(x.double())) < PRECISIONS[dtype]
    batch, length, entries, d = 2, 50, 64, 128
    for heads, kv in ((32, 32), (28, 4)):
        qkv, cos, sin = normal(batch, length, (heads + 2 * kv) * d), normal(batch, length, d), normal(batch, length, d)
        dest = torch.stack([torch.randperm(entries, device="cuda", generator=generator)[:length] for _ in range(batch)])
        dest = torch.where(torch.rand(batch, length, device="cuda", generator=generator) < 0.2, -1, dest).int()
        caches = [torch.full((batch, kv, entries, d), torch.nan, device="cuda", dtype=dtype) for _ in "kv"]
        wide = [cache.double() for cache in caches]
        wanted = twins.rope_store(qkv.double(), cos.double(), sin.double(), *wide, dest, heads)
        found = small_kernels.rope_store(qkv.clone(), cos, sin, *caches, dest, heads)
        for a, b in zip((*found, *caches), (*wanted, *wide), strict=True):
            torch.testing.assert_close(
                a.double(), b, atol=4 * PRECISIONS[dtype], rtol=PRECISIONS[dtype], equal_nan=True
            )


# -- the vision tower -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("rows, width", [(577, 1024), (5 * 577, 1024), (3, 172), (1, 32)])
def test_tower_kernels(rows, width, dtype):
    from dyrate_lib.engine import tower_kernels

    generator = torch.Generator("cuda").manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x, delta, weight, bias = normal(rows, width) + 2, normal(rows, width), normal(width), normal(width)
    total = (x.double() + delta.double()).to(dtype)
    wanted = twins.layer_norm(total.double(), weight.double(), bias.double(), 1e-5)
    found, normed = tower_kernels.add_layer_norm(x, delta, weight, bias, 1e-5)
    assert found.data_ptr() == x.data_ptr() and error(found, total) < PRECISIONS[dtype]
    assert error(normed, wanted) < PRECISIONS[dtype]
    x = 4 * normal(rows, 4 * width)
    wanted = twins.quick_gelu(x.double())
    assert error(tower_kernels.quick_gelu(x), wanted) < PRECISIONS[dtype]


@pytest.fixture(scope="module")
def clip_large():
    """A LLaVA with the tower of LLaVA-1.5 (CLIP ViT-L/14 at 336) and a language model that is hardly there; float32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14,
        projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=200, hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=199, image_seq_length=576, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    made = LlavaForConditionalGeneration(config).to("cuda").eval()
    for name, parameter in made.model.vision_tower.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made.to(torch.bfloat16).float()  # weights that bfloat16 holds


@pytest.mark.parametrize("pictures", [1, 4])
def test_tower_of_real_size(clip_large, pictures):
    """float32: as stock; bfloat16: no further from float64 than stock; captured and replayed the same, bit for bit."""
    from dyrate_lib.models import Adapter

    x = torch.randn(pictures, 3, 336, 336, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    x = x.to(torch.bfloat16).float()
    with torch.no_grad():
        wide = copy.deepcopy(clip_large)
        engine = engine_for(wide, capture=False)
        wanted = stock_features(wide, x)
        assert engine.see(x).shape == (576 * pictures, 256) and engine.tower.odd is None and not engine.tower.hooked
        assert error(engine.see(x), wanted) < 2e-5
        engine.release()
        true = stock_features(copy.deepcopy(clip_large).double(), x.double())
        narrow = copy.deepcopy(clip_large).to(torch.bfloat16)
        theirs = error(stock_features(narrow, x.to(torch.bfloat16)), true)
        engine = engine_for(narrow)
        outs = [engine.see(x.to(torch.bfloat16)).clone() for _ in range(4)]
        ours = error(outs[0], true)
        print(f"{pictures} pictures: error {ours:.5f}, stock's {theirs:.5f}")
        assert ours <= 1.05 * theirs
        assert all(torch.equal(out, outs[0]) for out in outs) and all(eye.part.graph is not None for eye in engine.eyes.values())
        assert torch.equal(engine.see(x.cpu()), outs[0])  # pictures as a processor gives them
        before, x = outs[0], x.to(torch.bfloat16)
        Adapter(narrow).vision_layers[3].self_attn.v_proj.weight.data.mul_(8)  # in place: the graph reads it
        wanted = stock_features(narrow, x)
        assert error(engine.see(x), wanted) < 0.3 * error(before, wanted)
        before, mlp = engine.see(x).clone(), Adapter(narrow).vision_layers[3].mlp
        mlp.fc1.weight = torch.nn.Parameter(-6 * mlp.fc1.weight)  # another parameter: noticed
        wanted = stock_features(narrow, x)
        for _ in range(3):
            assert error(engine.see(x), wanted) < 0.3 * error(before, wanted)
        engine.release()


@pytest.mark.parametrize("rows", [64, 65, 180, 254, 320, 321])
def test_products_by_cublaslt(rows):
    from dyrate_lib.engine.triton_ops import TritonOps

    before = torch.backends.cuda.preferred_blas_library()
    generator = torch.Generator("cuda").manual_seed(5)
    x, weight = (torch.randn(n, 512, device="cuda", generator=generator).to(torch.bfloat16) for n in (rows, 768))
    residual, bias = (torch.randn(*n, device="cuda", generator=generator).to(torch.bfloat16) for n in ((rows, 768), (768,)))
    made, wanted = TritonOps(), x.double() @ weight.double().t()
    assert error(made.linear(x, weight), wanted) < 2 * BF16
    assert error(made.linear(x, weight, bias), wanted + bias.double()) < 2 * BF16
    assert error(made.add_linear(residual.clone(), x, weight), wanted + residual.double()) < 2 * BF16
    assert torch.backends.cuda.preferred_blas_library() == before


# -- products of few rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64])
def test_skinny(rows, dtype):
    from dyrate_lib.engine.skinny_kernel import CANDIDATES, plain, skinny

    generator = torch.Generator("cuda").manual_seed(5)
    width, n = 1100, 528

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x, weight = normal(rows, width), normal(n, width)
    folded = {
        "plain": {},
        "norm, bias": {"norm": normal(width), "eps": 1e-5, "bias": normal(n)},
        "norm, gated": {"norm": normal(width), "eps": 1e-5, "gated": True},
        "residual": {"residual": normal(rows, n)},
        "bias, residual": {"bias": normal(n), "residual": normal(rows, n)},
    }
    for config in CANDIDATES["one" if rows == 1 else "few"]:
        for what, kwargs in folded.items():
            double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            wanted = plain(x.double(), weight.double(), **double)
            bound = 1e-5 if dtype == torch.float32 else 4 * BF16
            try:
                found = skinny(x, weight, config, **kwargs)
            except Exception as refused:
                # float32 needs twice the shared memory; the tuner leaves such a setting out, too
                if dtype == torch.float32 and "out of resource" in str(refused):
                    continue
                raise
            assert error(found, wanted) < bound, (config, what)
