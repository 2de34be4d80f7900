"""The whole loop by Triton's kernels: tokens and trace as the reference loop's."""

from __future__ import annotations

import copy

import pytest

from dyrate_lib import DepthPrune, DyRate, NoReduction, RatePath, generate
from dyrate_lib.engine import eager_engine
from dyrate_lib.engine.skinny_kernel import Config
from dyrate_lib.engine.triton_ops import TritonOps
from dyrate_lib.methods import ST3
from tests.contract import Shape, lively_predictor, random_batch, small_model
from tests.engine_cases import check_same
from tests.interpreted import DEVICE

SHAPES = {
    "own keys": Shape(layers=3, heads=2, kv_heads=2, grid=3, width=32),
    "shared keys": Shape(layers=3, heads=4, kv_heads=2, grid=3, width=64),
}
KINDS = ("qkv", "out", "gate_up", "down", "head")
TABLES = {
    "default": None,
    "cublas": {},
    "skinny": {(limit, kind): Config(16, 64, 4, 1) for limit in (1, 16) for kind in KINDS},
}
METHODS = {
    "dyrate": lambda heads: DyRate(lively_predictor(heads), 1),
    "none": lambda heads: NoReduction(),
    "depth": lambda heads: DepthPrune({1: 0.4, 2: 0.8}),
    "path": lambda heads: RatePath(2, (0.1, 0.6, 1.0)),
    "dyrate-step": lambda heads: DyRate(lively_predictor(heads), 1, rank="step"),
    "dyrate-reversible": lambda heads: DyRate(lively_predictor(heads), 1, reversible=True),
    "st3": lambda heads: ST3(1, 1, floor=0.1, horizon=4),
}
ROWS = {"one": ((2, 3, True),), "two": ((0, 4, False), (1, 5, True))}
QUICK = [("own keys", "default", "one", "dyrate"), ("shared keys", "skinny", "two", "dyrate"),
         ("own keys", "cublas", "two", "depth"), ("own keys", "skinny", "one", "none")]  # fmt: skip
REST = [("shared keys", table, rows, "dyrate") for table in ("default", "cublas") for rows in ROWS] + [
    ("own keys", "skinny", "one", name) for name in METHODS if name not in ("dyrate", "none")
]
CASES = QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in REST]


@pytest.mark.parametrize("shape, table, rows, name", CASES)
def test_kernels_in_the_loop(shape, table, rows, name):
    model = copy.deepcopy(small_model(SHAPES[shape])).to(DEVICE)
    method, batch = METHODS[name](SHAPES[shape].heads), random_batch(3, ROWS[rows], seed=1)
    engine = eager_engine(model, TritonOps(TABLES[table]))
    kwargs = dict(max_new_tokens=3, eos_token_id=[], return_logits=True)
    kwargs |= {"do_sample": True, "seed": 1, "top_k": 50} if name == "depth" else {}
    check_same(
        generate(model, batch, method, engine=engine, **kwargs),
        generate(model, batch, method, engine="reference", **kwargs),
    )
    engine.release()
