"""What the contract tests run on: every method with its settings for a small model, small models, and random batches.

A new method gets one entry in `cases()`; then tests/test_contract.py and tests/test_decoding.py run it in every mode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dyrate_lib
from dyrate_lib import Method, RatePredictor

GREEDY = dict(do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True)


def lively_predictor(n_heads: int = 4, n_rates: int = 10, seed: int = 0) -> RatePredictor:
    """A predictor with random weights, so that rates differ between samples and steps."""
    predictor = RatePredictor(n_heads, n_rates)
    generator = torch.Generator().manual_seed(seed)
    predictor.linear.weight.data.normal_(0, 30, generator=generator)
    return predictor


@dataclass(frozen=True)
class Case:
    """One method under the contract.

    method: a setting that prunes 36 tokens over 8 layers. keep_all: one that keeps all, None where the method has none.
    kept: N -> image tokens at each of 8 layers after the prefill, None where that depends on the content.
    renumbered: positions are counted anew, 0, 1, .., in each layer's own sequence. spare: keys and values stay that are
    not read. flash: works with flash attention. graph: fits into the graph engine.
    """

    method: Method
    keep_all: Method | None = None
    kept: Callable[[int], Sequence[int]] | None = None
    renumbered: bool = False
    spare: bool = False
    flash: bool = True
    graph: bool = True


def _half(n: int, share: float = 0.5) -> int:
    return round(n * share)


@functools.cache
def cases() -> dict[str, Case]:
    """Name -> case, for all methods that the package exports."""
    d = dyrate_lib
    lively, still = lively_predictor(), RatePredictor(4)
    found = {
        "none": Case(d.NoReduction(), d.NoReduction(), lambda n: [n] * 8),
        "fastv": Case(d.FastV(2, 0.5), d.FastV(2, 0.0), lambda n: [n] * 2 + [_half(n)] * 6),
        "fastv-refresh": Case(
            d.FastV(3, 0.75, refresh=True), d.FastV(3, 0.0, refresh=True), lambda n: [n] * 3 + [_half(n, 0.25)] * 5
        ),
        "vtw": Case(d.VTW(4), None, lambda n: [n] * 4 + [0] * 4),
        "random": Case(d.RandomPrune(2, 0.75), d.RandomPrune(2, 0.0), lambda n: [n] * 2 + [_half(n, 0.25)] * 6),
        "path": Case(d.RatePath(3, (0.1, 0.5, 1.0)), d.RatePath(3, (0.0,)), lambda n: [n] * 3 + [n - n // 10] * 5),
        "depth": Case(
            d.DepthPrune({3: 0.5, 5: 0.75, 6: 1.0}), d.DepthPrune({3: 0.0}),
            lambda n: [n] * 3 + [_half(n)] * 2 + [_half(n, 0.25)] + [0] * 2,
        ),
        "dyrate": Case(d.DyRate(lively, 3), d.DyRate(still, 3)),
        "dyrate-step": Case(d.DyRate(lively, 3, rank="step"), d.DyRate(still, 3, rank="step"), spare=True),
        "dyrate-reversible": Case(
            d.DyRate(lively, 3, reversible=True), d.DyRate(still, 3, reversible=True), spare=True, flash=False
        ),
        "dyrate-both": Case(
            d.DyRate(lively, 2, rank="step", reversible=True), d.DyRate(still, 2, rank="step", reversible=True),
            spare=True, flash=False,
        ),
        "relook": Case(
            d.RelookRate(lively, layer=3, window=3, pool="max", tilt=0.5), d.RelookRate(still, layer=3, tilt=0.5), spare=True,
            flash=False, graph=False,
        ),
        "relook-path": Case(
            d.RelookRate(rates=(0.1, 0.8, 0.4), layer=2, window=2, tilt=-0.7), d.RelookRate(rates=(0.0,), layer=2, tilt=-0.7),
            lambda n: [n] * 8, spare=True, flash=False, graph=False,
        ),
        "merge": Case(
            d.MergeRate(lively, layer=3), d.MergeRate(still, layer=3), flash=False, graph=False,
        ),
        "merge-path": Case(
            d.MergeRate(rates=(0.5, 0.8, 0.9), layer=2, spread=0.25), d.MergeRate(rates=(0.0,), layer=2),
            lambda n: [n] * 2 + [_half(n)] * 6, flash=False, graph=False,
        ),
        "visionzip": Case(d.VisionZip(dominant=12, contextual=4), None, lambda n: [16] * 8, renumbered=True),
        "prumerge": Case(d.PruMerge(), None, None, renumbered=True),
        "prumerge-fixed": Case(d.PruMerge(ratio=0.25), None, lambda n: [n // 4 + 1] * 8, renumbered=True),
        "prumerge-plus": Case(d.PruMergePlus(), None, None, renumbered=True),
        "prumerge-plus-fixed": Case(d.PruMergePlus(ratio=0.125), None, lambda n: [4 + 4 + 1] * 8, renumbered=True),
        "divprune": Case(d.DivPrune(ratio=0.25), d.DivPrune(ratio=1.0), lambda n: [n // 4] * 8, renumbered=True),
        "cdpruner": Case(d.CDPruner(ratio=0.25), d.CDPruner(ratio=1.0), lambda n: [n // 4] * 8, renumbered=True),
        "sparsevlm": Case(
            d.SparseVLM(counts=(20, 12, 6), layers=(1, 3, 5)), d.SparseVLM(counts=(1.0, 1.0, 1.0), layers=(1, 3, 5)),
            lambda n: [n] * 2 + [21] * 2 + [13] * 2 + [7] * 2, renumbered=True,
        ),
        "sparsevlm-drop": Case(
            d.SparseVLM(counts=(20, 12, 6), layers=(1, 3, 5), recycle=False),
            d.SparseVLM(counts=(1.0, 1.0, 1.0), layers=(1, 3, 5), recycle=False),
            lambda n: [n] * 2 + [20] * 2 + [12] * 2 + [6] * 2, renumbered=True,
        ),
        "sparsevlm-adaptive": Case(
            d.SparseVLM(adaptive=True), d.SparseVLM(adaptive=True, scale=0.0), None, renumbered=True
        ),
        "pyramiddrop": Case(
            d.PyramidDrop(layers=(2, 4, 6)), d.PyramidDrop(layers=(2, 4, 6), ratios=(1.0, 1.0, 1.0)),
            lambda n: [n] * 2 + [n // 2] * 2 + [n // 4] * 2 + [n // 8] * 2, renumbered=True,
        ),
        "st3": Case(
            d.ST3(first=2, every=2, horizon=6), d.ST3(first=2, every=2, rho=1.0, floor=1.0),
            lambda n: [n] * 2 + [n // 2] * 2 + [n // 4] * 2 + [n // 8] * 2,
        ),
    }  # fmt: skip
    return found


def representatives() -> list[str]:
    """One method of each kind of machinery: enough where what is tested does not depend on the method's own choice."""
    wanted = ("fastv-refresh", "depth", "dyrate", "dyrate-both", "visionzip", "prumerge-plus", "sparsevlm", "pyramiddrop", "st3")
    return [name for name in wanted if name in cases()]


# -- models and batches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Dimensions of a small model: image tokens are grid x grid."""

    layers: int = 8
    heads: int = 4
    kv_heads: int = 4
    grid: int = 6
    width: int = 64
    seed: int = field(default=0)


PAD, BOS, EOS, IMAGE, VOCAB = 0, 1, 2, 199, 200


@functools.cache
def small_model(shape: Shape = Shape(), attention: str = "sdpa") -> Any:  # noqa: B008 (frozen)
    """A random LLaVA in float32 whose attention is far from uniform."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=14 * shape.grid,
        patch_size=14, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=shape.width, intermediate_size=96, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=512,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=shape.grid**2,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.18)
    model.lm_head.weight.data[[PAD, BOS, EOS, IMAGE]] = 0  # as good as never generated
    model.eval().requires_grad_(False)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def random_batch(grid: int, rows: Sequence[tuple[int, int, bool]], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of (text tokens before the picture, after it, whether there is a picture)."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(3, IMAGE, (n,), generator=generator).tolist()

    ids = [[BOS, *words(before), *[IMAGE] * (grid**2 * picture), *words(after)] for before, after, picture in rows]
    longest = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
    }
    pictures = [torch.randn(3, 14 * grid, 14 * grid, generator=generator) for _, _, picture in rows if picture]
    if pictures:
        batch["pixel_values"] = torch.stack(pictures)
    return batch


def one_row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Row `row` by itself, its padding cut off."""
    real = batch["attention_mask"][row].bool()
    out = {"input_ids": batch["input_ids"][row : row + 1, real]}
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    has_picture = (batch["input_ids"] == IMAGE).any(-1)
    if has_picture[row]:
        place = int(has_picture[:row].sum())
        out["pixel_values"] = batch["pixel_values"][place : place + 1]
    return out


def repeated(batch: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """Every row `times` times in a row, as `generate` expands a batch for beams or several sequences."""
    return {key: value.repeat_interleave(times, dim=0) for key, value in batch.items()}


def kv_lengths(cache: Any) -> list[int]:
    """Entries in each layer of a transformers cache."""
    return [0 if layer.keys is None else layer.keys.shape[2] for layer in cache.layers]


def replay(model: Any, inputs: dict[str, Tensor], method: Method | None, sequences: Tensor) -> Tensor:
    """Logits [B, steps, vocab] that our own loop gives along `sequences` [B, T + steps]: what stock must have seen."""
    reply = sequences[:, inputs["input_ids"].shape[1] :]
    return dyrate_lib.generate(model, inputs, method, forced_tokens=reply, return_logits=True).logits


# -- for a method with a loop of its own, beside one that is written out -----------------------------------------------

ROWS = ((3, 5, True), (1, 12, True), (0, 4, False))  # unequal prompts, one without a picture
GROUPED = Shape(kv_heads=2)


def some_reply(rows: int, seed: int = 3, steps: int = 4) -> Tensor:
    """Tokens to force, [rows, steps]."""
    return torch.randint(5, 199, (rows, steps), generator=torch.Generator().manual_seed(seed))


def run(model: Any, inputs: dict[str, Tensor], method: Method | None, forced: Tensor) -> Any:
    """The reference loop along `forced`, with logits."""
    return dyrate_lib.generate(model, inputs, method, forced_tokens=forced, return_logits=True, engine="reference")


def two_pictures() -> dict[str, Tensor]:
    """A prompt with two pictures of 6 x 6 tokens, and text between and behind them."""
    batch, n = random_batch(6, [(0, 3, True), (0, 5, True)], seed=4), 36
    ids = torch.cat((batch["input_ids"][0, -3 - n - 1 :], batch["input_ids"][1, 1:]))[None]
    assert int((ids == IMAGE).sum()) == 2 * n and ids[0, 0] == BOS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch["pixel_values"]}
