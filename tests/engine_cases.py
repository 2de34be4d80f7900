"""What the tests of the graph engine share: methods, batches, settings, inputs of kernels, and what "the same" means."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyrate_lib import VTW, DepthPrune, DyRate, FastV, NoReduction, RandomPrune, RatePath
from dyrate_lib.experiments.efficiency import Replay
from dyrate_lib.methods import ST3
from dyrate_lib.models import Adapter
from tests import contract
from tests.contract import Shape, lively_predictor, small_model

METHODS = {
    "none": NoReduction(),
    "fastv": FastV(2, 0.5),
    "vtw": VTW(4),
    "random": RandomPrune(2, 0.75),
    "path": RatePath(3, (0.1, 0.3, 0.3, 0.8, 1.0)),
    "paths": RatePath(3, ((0.1, 0.3), (0.5,), (0.0, 0.2, 1.0), (0.9,))),  # one for each of ROWS
    "replay": Replay(3, (30, 20, 20, 7, 0)),
    "depth": DepthPrune({3: 0.4, 5: 0.8, 6: 1.0}),
    "dyrate": DyRate(lively_predictor(), 3),
    "dyrate-first": DyRate(lively_predictor(seed=3), 1),
    "dyrate-step": DyRate(lively_predictor(), 3, rank="step"),
    "dyrate-reversible": DyRate(lively_predictor(), 3, reversible=True),
    "st3": ST3(1, 2, floor=0.1, horizon=8),
    "st3-cosine": ST3(2, 3, rho=0.7, decay="cosine", floor=0.0, horizon=10),
    "dyrate-both": DyRate(lively_predictor(), 2, rank="step", reversible=True),
}
METHODS |= {
    name: case.method
    for name, case in contract.cases().items()
    if name not in METHODS and case.graph and not case.method.refresh
}  # every method of the package that a graph can hold
ROWS = ((2, 7, True), (5, 3, True), (0, 6, False), (1, 11, True))  # see `contract.random_batch`

SETTINGS: dict[str, dict[str, Any]] = {
    "eos": dict(eos_token_id=list(range(3, 60))),
    "sampling": dict(do_sample=True, seed=3, eos_token_id=[]),
    "top-k, top-p": dict(do_sample=True, seed=4, temperature=1.7, top_k=40, top_p=0.9, eos_token_id=[7, 8]),
    "several": dict(do_sample=True, seed=5, num_return_sequences=3),
    "penalty": dict(repetition_penalty=1.4, eos_token_id=[]),
    "penalty, sampling": dict(do_sample=True, seed=6, repetition_penalty=1.2, temperature=0.7),
    "forced": dict(forced_tokens=torch.randint(5, 200, (4, 9), generator=torch.Generator().manual_seed(1))),
}


def methods_and(batches: Iterable[str]) -> list[tuple[str, str]]:
    """Every method's name with every batch's; "paths" holds rates for the four samples of "ragged" alone."""
    return [(name, size) for name in METHODS for size in batches if name != "paths" or size == "ragged"]


def lively_tower(strategy: str = "default", layer: object = -2, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose tower's norms and biases do something, with the features of another layer or with the CLS row."""
    model = copy.deepcopy(small_model(Shape(layers=2, heads=2, kv_heads=2, grid=3, width=32)))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.model.vision_tower.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.config.vision_feature_select_strategy, model.config.vision_feature_layer = strategy, layer
    return model.to(dtype)


def stock_features(model: Any, pixels: Tensor) -> Tensor:
    """What the model's own tower and projector make of pictures: [tokens of all, D]."""
    return torch.cat(list(Adapter(model).picture_features({"pixel_values": pixels}, pixels.dtype)))


def check_same(ours: Any, theirs: Any, logits: float = 2e-4, attention: float = 1e-5) -> None:
    """Two outputs of `generate`: everything is equal, types and devices too; logits and attention shares are so to rounding."""
    near = {"logits": {"atol": logits, "rtol": 1e-4}, "attention": {"atol": attention, "rtol": 1e-4}}
    for mine, other in ((ours, theirs), (ours.trace, theirs.trace)):
        for field in dataclasses.fields(other):
            a, b = getattr(mine, field.name), getattr(other, field.name)
            if isinstance(b, Tensor):
                torch.testing.assert_close(
                    a, b, **near.get(field.name, {"atol": 0, "rtol": 0}), msg=_naming(field.name)
                )
            elif isinstance(b, list):
                assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), field.name
            elif field.name != "trace":
                assert a == b, field.name


def _naming(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


# -- kernels ----------------------------------------------------------------------------------------------------------


def attention_case(
    seed: int, heads: int, kv: int, d: int, kept: Sequence[int], filled: Sequence[int], start: int, entries: int,
    dtype: torch.dtype = torch.float32, indexed: bool = False, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Random arguments of `decode_attention`; kept, filled: one number a sample. What must not be read is not a number."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, passes = len(kept), 5
    angle = normal(batch, passes, d // 2).repeat(1, 1, 2)
    case: dict[str, Any] = {
        "qkv": normal(batch, (heads + 2 * kv) * d), "cos": angle.cos(), "sin": angle.sin(), "step": torch.tensor([3]),
        "keys": normal(batch, kv, entries, d), "values": normal(batch, kv, entries, d),
        "kept": torch.tensor(kept, dtype=torch.int32), "start": start, "filled": torch.tensor(filled, dtype=torch.int32),
        "n_heads": heads,
    }  # fmt: skip
    if indexed:
        case["index"] = torch.stack([torch.randperm(start, generator=generator) for _ in kept]).int()
    for row, (k, f) in enumerate(zip(kept, filled, strict=True)):
        read = torch.zeros(entries, dtype=torch.bool)
        read[case["index"][row, :k].long() if indexed else slice(0, k)] = True
        read[start : start + f] = True
        case["keys"][row, :, ~read] = torch.nan
        case["values"][row, :, ~read] = torch.nan
    for key, value in case.items():
        if isinstance(value, Tensor):
            case[key] = value.to(device, dtype if value.is_floating_point() else value.dtype)
    return case


def doubled(case: dict[str, Any]) -> dict[str, Any]:
    """A copy of the arguments with all floating point numbers in float64."""
    return {
        key: (value.double() if value.is_floating_point() else value.clone()) if isinstance(value, Tensor) else value
        for key, value in case.items()
    }


def cloned(case: dict[str, Any]) -> dict[str, Any]:
    """A copy of the arguments."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in case.items()}


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def plain_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, step: Tensor, keys: Tensor, values: Tensor, kept: Tensor, start: int,
    filled: Tensor, n_heads: int, index: Tensor | None = None, types: Tensor | None = None, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`decode_attention` by its definition, sample by sample and head by head: (output [B, H d], keys, values, shares [B, H, 4],
    scores [B, H, S]: logits minus their log-sum-exp, -inf where nothing is read)."""
    (batch, n_kv, entries, d), now = keys.shape, int(step)
    keys, values = keys.clone(), values.clone()
    out, shares = keys.new_zeros(batch, n_heads, d), keys.new_zeros(batch, n_heads, 4)
    scores = keys.new_full((batch, n_heads, entries), -torch.inf)
    for b in range(batch):
        heads = qkv[b].view(n_heads + 2 * n_kv, d).clone()
        turned = torch.cat((-heads[:, d // 2 :], heads[:, : d // 2]), 1)
        heads[: n_heads + n_kv] = (heads * cos[b, now] + turned * sin[b, now])[: n_heads + n_kv]
        place, k = start + int(filled[b]), int(kept[b])
        keys[b, :, place], values[b, :, place] = heads[n_heads : n_heads + n_kv], heads[n_heads + n_kv :]
        image = list(range(k)) if index is None else index[b, :k].tolist()
        read = torch.tensor([*image, *range(start, place + 1)], device=keys.device)
        for h in range(n_heads):
            logits = keys[b, h * n_kv // n_heads, read] @ heads[h] / d**0.5
            weight = torch.softmax(logits, 0)
            out[b, h] = weight @ values[b, h * n_kv // n_heads, read]
            scores[b, h, read] = torch.log_softmax(logits, 0)
            if types is not None:
                shares[b, h].index_add_(0, types[b, read].long(), weight)
    return out.flatten(1), keys, values, shares, scores


def check_attention(function: Any, case: dict[str, Any], looks: bool, tolerance: float = 1e-5) -> None:
    """`function` against the definition in float64: output, cache, shares by type and scores (the latter two if it `looks`)."""
    device, (batch, _, entries, _) = case["keys"].device, case["keys"].shape
    heads = case["n_heads"]
    types = torch.randint(0, 4, (batch, entries), generator=torch.Generator().manual_seed(2)).to(torch.int8).to(device)
    wanted, keys, values, shares, scores = plain_attention(**doubled(case), types=types)
    mine = cloned(case)
    if looks:
        mine |= {
            "types": types, "shares": torch.full((batch, heads, 4), torch.nan, device=device),
            "scores": torch.zeros(batch, heads, entries, device=device),
        }  # fmt: skip
    found = function(**mine)
    assert found.dtype == case["qkv"].dtype and found.shape == wanted.shape
    assert error(found, wanted) < tolerance
    for now, true in ((mine["keys"], keys), (mine["values"], values)):
        torch.testing.assert_close(now.double(), true, atol=tolerance, rtol=tolerance, equal_nan=True)
    if looks:
        torch.testing.assert_close(mine["shares"].double(), shares, atol=tolerance, rtol=10 * tolerance)
        read = scores > -torch.inf
        torch.testing.assert_close(
            mine["scores"].double()[read], scores[read], atol=10 * tolerance, rtol=10 * tolerance
        )
