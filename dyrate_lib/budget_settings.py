"""What is set in each method to meet a budget, as a sequence of settings from the cheapest to the costliest.

One function a method, by its name: (method, n_image, n_layers) -> `Settings`. All but the setting searched is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import InputError
from .methods import (
    ST3,
    VTW,
    CDPruner,
    DivPrune,
    FastV,
    Method,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    SparseVLM,
    VisionZip,
)

THOUSAND = 1000  # steps of a share that is set continuously


@dataclass(frozen=True)
class Settings:
    """`count` settings of a method; make(i) builds the i-th. Costs must not fall with i."""

    count: int
    make: Callable[[int], Method]


def _with(method: Method, **changes: Any) -> Method:
    return replace(method, **changes)  # type: ignore[type-var]


def _rate(method: Method, n_image: int, n_layers: int) -> Settings:
    """FastV, random: the rate that keeps i = 0..N tokens from the method's layer on."""
    return Settings(n_image + 1, lambda i: _with(method, rate=round((n_image - i) / n_image, 6)))


def _layer(method: Method, n_image: int, n_layers: int) -> Settings:
    """VTW: the layer at whose input all image tokens leave, 1..L-1. Whole layers, so most budgets are met roughly."""
    return Settings(n_layers - 1, lambda i: _with(method, layer=i + 1))


def _only(method: Method, n_image: int, n_layers: int) -> Settings:
    """No reduction: nothing to set."""
    return Settings(1, lambda i: method)


def _scaled(share: float, scale: float) -> float:
    """The rate of a kept share times `scale`, at most all kept."""
    return round(1.0 - min(1.0, share * scale), 6)


def _path(method: Any, n_image: int, n_layers: int) -> Settings:
    """RatePath, and RelookRate and MergeRate with a schedule: every kept share times one factor, until all keep all."""
    if method.rates is None:
        raise InputError(f"{type(method).__name__}: a predictor's budget is set in training; give rates to search their scale.")
    nested = not isinstance(method.rates[0], int | float)
    flat = [rate for row in (method.rates if nested else [method.rates]) for rate in row]
    least = max(min(1.0 - max(flat), 1.0), 1e-3)

    def make(i: int) -> Method:
        scale = i / THOUSAND / least
        if nested:
            return _with(method, rates=tuple(tuple(_scaled(1.0 - r, scale) for r in row) for row in method.rates))
        return _with(method, rates=tuple(_scaled(1.0 - r, scale) for r in method.rates))

    return Settings(THOUSAND + 1, make)


def _depth(method: Any, n_image: int, n_layers: int) -> Settings:
    """DepthPrune: every kept share times one factor, until all keep all."""
    least = max(1.0 - max(method.rates.values()), 1e-3)

    def make(i: int) -> Method:
        return _with(method, rates={k: _scaled(1.0 - r, i / THOUSAND / least) for k, r in method.rates.items()})

    return Settings(THOUSAND + 1, make)


def _counts(method: Any, n_image: int, n_layers: int) -> Settings:
    """SparseVLM: the method's list of counts times one factor, whole tokens, until every cut keeps all."""
    shares = [c if isinstance(c, int) else c * n_image for c in method._counts]
    least = min((c for c in shares if c > 0), default=n_image)
    steps = 4 * THOUSAND  # the first cut's count moves by more than a token a thousandth
    top = n_image / least

    def make(i: int) -> Method:
        return _with(method, counts=tuple(min(n_image, round(c * top * i / steps)) for c in shares))

    return Settings(steps + 1, make)


def _pyramid(method: Any, n_image: int, n_layers: int) -> Settings:
    """PyramidDrop: its ratios to one power, so that 0.5, 0.25, 0.125 become l, l^2, l^3 with l the share kept at each drop.

    Its first quarter of the depth sees every token, so that l alone reaches no low budget: below the cost of the given
    ratios the cuts move to earlier layers, their proportion kept, and l falls only as far as the next layer demands.
    """
    cuts, given = method.cuts(n_layers), list(method.ratios)
    inner = [r for r in given if 0 < r < 1]
    if not inner:
        return Settings(1, lambda i: method)

    def ratios(kept: float) -> tuple[float, ...]:
        return tuple(round(kept ** (math.log(r) / math.log(inner[0])), 6) if 0 < r < 1 else r for r in given)

    def tokens(layers: Sequence[int], shares: Sequence[float]) -> float:
        ends = [*layers[1:], n_layers]
        return layers[0] + sum(share * (end - start) for start, end, share in zip(layers, ends, shares, strict=True))

    path: list[tuple[tuple[int, ...] | None, tuple[float, ...]]] = []
    reached = -1.0
    for first in range(1, cuts[0] + 1):
        layers: list[int] = []
        for cut in cuts:
            layers.append(max(round(cut * first / cuts[0]), layers[-1] + 1 if layers else 1))
        here, top = first == cuts[0], THOUSAND if first == cuts[0] else round(THOUSAND * inner[0])
        for i in range(top + 1):
            shares = ratios(i / THOUSAND)
            if (cost := tokens(layers, shares)) > reached:
                path.append((method.layers if here else tuple(layers), shares))
                reached = cost
    return Settings(len(path), lambda i: _with(method, layers=path[i][0], ratios=path[i][1]))


def _rho(method: Any, n_image: int, n_layers: int) -> Settings:
    """ST3: the share kept at each cut, in thousandths; how it anneals over steps stays."""
    return Settings(THOUSAND + 1, lambda i: _with(method, rho=i / THOUSAND))


def _dominant(method: Any, n_image: int, n_layers: int) -> Settings:
    """VisionZip: 1..N tokens, dominant and contextual ones in the method's own proportion."""
    share = method.contextual / (method.dominant + method.contextual)

    def make(i: int) -> Method:
        contextual = min(round((i + 1) * share), i)
        return _with(method, dominant=i + 1 - contextual, contextual=contextual)

    return Settings(n_image, make)


def _tokens(method: Method, n_image: int, n_layers: int) -> Settings:
    """LayerTopK: 0..N tokens that a layer reads. Below the cost of its prompt's pass, which reads everything, none reaches."""
    return Settings(n_image + 1, lambda i: _with(method, tokens=i, rate=None))


def _fixed_ratio(method: Any, n_image: int, n_layers: int) -> Settings:
    """PruMerge, PruMerge+: a fixed count, ratio = 1..N-1 patches. The + adds samples, so its counts have gaps."""
    # a thousandth of a patch more, so that int(N ratio) is the count meant
    return Settings(n_image - 1, lambda i: _with(method, ratio=round((i + 1.001) / n_image, 6)))


def _ratio(method: Any, n_image: int, n_layers: int) -> Settings:
    """DivPrune, CDPruner: the ratio that keeps 1..N tokens."""
    more = {"tokens": None} if hasattr(method, "tokens") else {}
    return Settings(n_image, lambda i: _with(method, ratio=round((i + 1) / n_image, 6), **more))


KNOWN: dict[str, Callable[[Any, int, int], Settings]] = {
    "none": _only, "fastv": _rate, "random": _rate, "vtw": _layer, "path": _path, "relook": _path, "merge": _path,
    "depth": _depth, "sparsevlm": _counts, "pyramiddrop": _pyramid, "st3": _rho, "visionzip": _dominant, "prumerge": _fixed_ratio,
    "prumerge+": _fixed_ratio, "divprune": _ratio, "cdpruner": _ratio, "layer-topk": _tokens,
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A setting as it is published: the method's label, the setting in words, and the tokens it is called by (None: none)."""

    label: str
    setting: str
    tokens: float | None
    method: Method


def released_settings() -> list[Published]:
    """Published settings whose counts do not depend on the picture, for 576 image tokens and 32 layers."""
    made = [
        Published("FastV", "P = 2, R = 0.5", 288, FastV(2, 0.5)),
        Published("FastV", "P = 3, R = 0.5", 288, FastV(3, 0.5)),
        Published("VTW", "layer 16", None, VTW(16)),
        Published("VTW", "layer 15", None, VTW(15)),
    ]
    made += [Published("SparseVLM", f"{n}, recycling", n, SparseVLM(n)) for n in (192, 128, 64)]
    made += [Published("SparseVLM", f"{n}, no recycling", n, SparseVLM(n, recycle=False)) for n in (192, 128, 64)]
    made += [
        Published("PyramidDrop", "0.5, 0.25, 0.125 after 8, 16, 24", None, PyramidDrop()),
        Published("ST3-style", "l0 = 3, s = 7, rho = 0.5", 0.3 * 576, ST3(first=3, every=7, rho=0.5)),
        Published("ST3-style", "l0 = 3, s = 3, rho = 0.7", 0.3 * 576, ST3(first=3, every=3, rho=0.7)),
    ]
    made += [
        Published("VisionZip", f"{a} + {b}", a + b, VisionZip(a, b)) for a, b in ((162, 30), (108, 20), (54, 10))
    ]
    made += [
        Published("PruMerge", "ratio 1/8", 72, PruMerge(0.125)),
        Published("PruMerge+", "ratio 1/8, sampled patches added", 144, PruMergePlus(0.125)),
        Published("DivPrune", "ratio 0.098", 0.098 * 576, DivPrune(0.098)),
    ]
    return made + [Published("CDPruner", f"{n} tokens", n, CDPruner(tokens=n)) for n in (192, 128, 64)]
