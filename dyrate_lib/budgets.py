"""Equal budgets: the setting of a method that costs what was asked for, counted alike for every method.

Two measures, both from `Method.plan`, the image tokens at each layer's input in each forward pass: `flops`, the ratio to
the unpruned model in one of `accounting`'s conventions, and `tokens`, the mean over layers and passes. Published "equal
tokens" differ by what they count (SparseVLM's 192 are 206.5 at layer inputs); `nominal_table` shows both.

A method of one's own takes part by a method `settings(n_image, n_layers)` that returns `Settings`, or a plain sequence
of methods, from the cheapest to the costliest. Those of the library are in `budget_settings`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import methods
from .accounting import CONVENTIONS, flops
from .budget_settings import KNOWN, Settings, released_settings
from .dimensions import llava_dimensions
from .errors import InputError
from .methods import BeforeLLM, Method
from .models import ModelInfo, model_info

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 0.02  # of the budget asked for: finer than the differences that tables of methods are read for
TEXT_TOKENS, STEPS = 64, 64  # of the run that is counted, unless told otherwise


@dataclass(frozen=True)
class Fit:
    """What a search found: the method, its cost and the cost wanted, and the smallest and largest that settings reach."""

    method: Method
    cost: float
    wanted: float
    lowest: float
    highest: float
    measure: str

    @property
    def error(self) -> float:
        """(cost - wanted) / wanted."""
        return (self.cost - self.wanted) / self.wanted

    def __str__(self) -> str:
        show = _percent if self.measure.startswith("FLOPs") else _tokens
        return (
            f"{self.method}: {show(self.cost)} {self.measure} where {show(self.wanted)} was asked for "
            f"({100 * self.error:+.1f} %); its settings reach {show(self.lowest)} to {show(self.highest)}"
        )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _tokens(value: float) -> str:
    return f"{value:.1f}"


def named(method: Method | type[Method] | str) -> Method:
    """A method from its name ("fastv", "prumerge+"), its class, or itself.

    Raises:
        InputError: an unknown name, or a class that cannot be built without arguments.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        classes = [value for value in vars(methods).values() if inspect.isclass(value) and issubclass(value, Method)]
        known = {cls.name: cls for cls in classes if cls.name}
        if method.lower() not in known:
            raise InputError(f"no method {method!r}: there are {', '.join(sorted(known))}")
        method = known[method.lower()]
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise InputError(f"method must be a Method such as FastV(), its class or its name, not {method!r}")
    try:
        return method()
    except TypeError as error:
        raise InputError(f"{method.__name__} needs arguments: pass one that is built ({error})") from error


def _dimensions(model: Any) -> ModelInfo:
    if model is None:
        return llava_dimensions("7b")
    return model if isinstance(model, ModelInfo) else model_info(model)


def actual_tokens(
    method: Method | type[Method] | str, *, n_layers: int = 32, n_image: int = 576, steps: int = 1
) -> float:
    """Image tokens at layer inputs, averaged over layers and forward passes (`steps=1`: of the prefill).

    Raises:
        InputError: the count depends on the content (see `Method.plan`).
    """
    return float(named(method).plan(n_image, n_layers, steps).mean())


def cost_ratio(
    method: Method | type[Method] | str, model: Any = None, *, convention: str = "paper", prompt_length: int | None = None,
    steps: int = STEPS, n_image: int | None = None,
) -> float:  # fmt: skip
    """FLOPs over those of the unpruned model, for one sample; arguments and errors as in `budget`."""
    info = _dimensions(model)
    n_image = info.n_image_tokens if n_image is None else n_image
    method = named(method)
    plan, length = method.plan(n_image, info.n_layers, steps), _prompt(prompt_length, n_image)
    return flops(info, length, n_image, plan, convention, scores_all=method.scores_all).ratio


def _prompt(prompt_length: int | None, n_image: int) -> int:
    return n_image + TEXT_TOKENS if prompt_length is None else prompt_length


def settings(method: Method, n_image: int, n_layers: int) -> Settings:
    """A method's settings from the cheapest to the costliest, its own or the library's.

    Raises:
        InputError: nobody said how its cost is set.
    """
    own = getattr(method, "settings", None)
    if own is None and method.name not in KNOWN:
        method.plan(n_image, n_layers, 1)  # where the content decides, that is the reason to give
        raise InputError(
            f"{type(method).__name__} says nothing of how its cost is set: give it a method settings(n_image, n_layers) "
            "that returns methods from the cheapest to the costliest"
        )
    found = own(n_image, n_layers) if own else KNOWN[method.name](method, n_image, n_layers)
    found = found if isinstance(found, Settings) else _listed(found)
    if found.count < 1:
        raise InputError(f"{type(method).__name__} has no setting for {n_image} image tokens in {n_layers} layers")
    return found


def _listed(some: Sequence[Method]) -> Settings:
    return Settings(len(some), some.__getitem__)


def fit_budget(
    method: Method | type[Method] | str, model: Any = None, *, flops: float | None = None, tokens: float | None = None,
    convention: str = "paper", prompt_length: int | None = None, steps: int = STEPS, n_image: int | None = None,
) -> Fit:  # fmt: skip
    """The setting of a method that comes nearest to a budget, however near that is. Arguments as in `budget`."""
    if (flops is None) == (tokens is None):
        raise InputError("give one budget: flops=, a share of the unpruned model's, or tokens=, a mean over layers")
    if convention not in CONVENTIONS:
        raise InputError(f"unknown FLOPs convention {convention!r}; known: {', '.join(CONVENTIONS)}")
    info, method = _dimensions(model), named(method)
    n_image = info.n_image_tokens if n_image is None else n_image
    wanted, most = (flops, 1.0) if flops is not None else (tokens, float(n_image))
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted <= most:
        raise InputError(f"a budget of {wanted!r} is none: it must lie above 0 and at most at {most:g}")
    if n_image < 1 or _prompt(prompt_length, n_image) < n_image or steps < 1:
        raise InputError(f"no run has {n_image} image tokens in a prompt of {prompt_length} and {steps} forward passes")

    if isinstance(method, BeforeLLM) and info.n_image_tokens and n_image != info.n_image_tokens:
        raise InputError(
            f"{type(method).__name__} reduces each picture by itself, so its budget is counted for one picture of "
            f"{info.n_image_tokens} tokens, not for {n_image}: leave n_image out"
        )

    candidates = settings(method, n_image, info.n_layers)

    @functools.cache
    def cost(index: int) -> float:
        candidate = candidates.make(index)
        if tokens is not None:
            return actual_tokens(candidate, n_layers=info.n_layers, n_image=n_image, steps=steps)
        return cost_ratio(
            candidate, info, convention=convention, prompt_length=prompt_length, steps=steps, n_image=n_image
        )

    top = candidates.count - 1
    best = nearest(cost, top, float(wanted))
    measure = f"FLOPs ({convention})" if flops is not None else "tokens a layer"
    return Fit(candidates.make(best), cost(best), float(wanted), cost(0), cost(top), measure)


def budget(
    method: Method | type[Method] | str, model: Any = None, *, flops: float | None = None, tokens: float | None = None,
    convention: str = "paper", prompt_length: int | None = None, steps: int = STEPS, n_image: int | None = None,
    strict: bool = True, tolerance: float = TOLERANCE,
) -> Method:  # fmt: skip
    """A method of the same kind, set so that it costs `flops` or `tokens`.

    Args:
        method: a method, its class or its name; of an instance everything but the setting searched is kept. Searched are
            the rate (fastv, random, path), the layer (vtw), the token count (visionzip, prumerge, prumerge+, divprune,
            cdpruner, layer-topk), the counts in their proportion (sparsevlm, depth), the share kept at each drop (pyramiddrop,
            whose drops move to earlier layers for budgets below the given ratios' cost, st3).
        model: a model or its `ModelInfo`; None takes LLaVA-1.5-7B's dimensions.
        flops: FLOPs over those of the unpruned model, in `convention`; tokens: image tokens at layer inputs, averaged
            over layers and passes. One of the two.
        prompt_length, steps, n_image: the run that is counted: tokens of the unpruned prompt (default: 64 besides the
            picture), forward passes, image tokens (default: one picture's).
        strict: False returns the nearest setting and warns of its error; True refuses one that is further off than
            `tolerance`, a share of the budget.

    Raises:
        InputError: no setting meets the budget (the message tells what can be reached), counts that depend on the
            content (DyRate is trained for a budget), two budgets or none. Before any model runs.
    """
    fit = fit_budget(
        method, model, flops=flops, tokens=tokens, convention=convention, prompt_length=prompt_length, steps=steps,
        n_image=n_image,
    )  # fmt: skip
    if abs(fit.error) <= tolerance:
        return fit.method
    if not strict:
        warnings.warn(f"nearest setting: {fit}", stacklevel=2)
        return fit.method
    why = (
        "below what it can reach" if fit.wanted < fit.lowest
        else "above what it can reach" if fit.wanted > fit.highest
        else "between two of its settings"
    )  # fmt: skip
    raise InputError(
        f"no setting of {type(fit.method).__name__} meets this budget, which lies {why}. The nearest is {fit}. Ask for a "
        "budget in that range, allow a larger tolerance, or take the nearest with strict=False."
    )


def nearest(cost: Callable[[int], float], top: int, wanted: float) -> int:
    """The argument in 0..top at which a cost that never falls comes nearest to `wanted` (bisection)."""
    low, high = 0, top
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= wanted else (middle + 1, high)
    return min((index for index in (low - 1, low) if index >= 0), key=lambda index: abs(cost(index) - wanted))


def nominal_table(n_layers: int = 32, n_image: int = 576) -> pd.DataFrame:
    """What published settings are called by, and what the layers really receive, one line each.

    Columns: method, setting, nominal (tokens it is called by), actual (mean of the prefill's layer inputs), excess % (of
    actual over nominal), last layer, over 64 passes (mean over layers and passes: lower where tokens leave while the
    reply grows), FLOPs % (paper's convention, at LLaVA-1.5-7B's dimensions if n_layers is 32).
    """
    import dataclasses

    import pandas as pd

    info = dataclasses.replace(llava_dimensions("7b"), n_layers=n_layers)
    out = []
    for known in released_settings():
        plan = known.method.plan(n_image, n_layers, STEPS)
        actual = float(plan[0].mean())
        nominal = float("nan") if known.tokens is None else known.tokens
        out.append(
            {
                "method": known.label, "setting": known.setting, "nominal": nominal,
                "actual": actual, "excess %": 100 * (actual / nominal - 1),
                "last layer": int(plan[0, -1]), f"over {STEPS} passes": float(plan.mean()),
                "FLOPs % (paper)": 100 * flops(info, _prompt(None, n_image), n_image, plan, "paper").ratio,
            }
        )  # fmt: skip
    return pd.DataFrame(out)
