"""lmms-eval's `model_args` as a checked description of the model, the method and how it is asked."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import methods
from ..errors import InputError, ResourceError
from ..generation import ENGINES
from ..methods import CDPruner, Method, NoReduction, clip_text

TEMPLATES = ("auto", "dyrate", "processor")
NEW_TOKENS = 1024  # of tasks that set no limit: lmms-eval's own LLaVA adapter takes as many
OWN = (
    "pretrained", "method", "dtype", "device", "flops", "predictor", "clip", "template", "system_prompt", "max_new_tokens",
    "seed", "engine", "records", "batch_size", "max_batch_size",
)  # fmt: skip
# Fields that hold code or tensors, which no argument can name.
_NOT_SETTINGS = ("noise", "text", "image_projection", "predictor")


@dataclass(frozen=True)
class Settings:
    """What one evaluation runs; made by `read_settings`.

    pretrained: as `load_vlm` takes it. method: its name; options: fields of its class; flops: None, or the ratio to search
    its setting for (paper's convention). template: "dyrate" is the project's chat prompt, "processor" the checkpoint's own
    chat template, "auto" the first for LLaVA-1.5 and the second for other families. system_prompt: None is the template's.
    max_new_tokens: for tasks that set none. records: folder, or None.
    """

    pretrained: str = "scenes-small"
    method: str = "none"
    options: dict[str, Any] = field(default_factory=dict)
    flops: float | None = None
    predictor: str | None = None
    clip: str | None = None
    dtype: str | None = None
    device: str | None = None
    template: str = "auto"
    system_prompt: str | None = None
    max_new_tokens: int = NEW_TOKENS
    seed: int = 0
    engine: str = "reference"
    batch_size: int = 1
    records: str | None = None

    @property
    def label(self) -> str:
        """The method and what was set of it, e.g. "fastv(layer=2, rate=0.5)"."""
        told = [f"{k}={v}" for k, v in sorted(self.options.items())]
        told += [f"{k}={getattr(self, k)}" for k in ("flops", "predictor") if getattr(self, k) is not None]
        return f"{self.method}({', '.join(told)})" if told else self.method


def method_classes() -> dict[str, type[Method]]:
    """Every method by its name, those that need arguments too."""
    found = [v for v in vars(methods).values() if inspect.isclass(v) and issubclass(v, Method)]
    return {cls.name: cls for cls in found if cls.name}


def method_options(name: str) -> dict[str, Any]:
    """The settings that a method takes as model_args, with their defaults (None where there is none).

    Raises InputError for an unknown method.
    """
    known = method_classes()
    if name not in known:
        raise InputError(f"method={name!r} is none of {', '.join(sorted(known))}")
    out = {}
    for f in dataclasses.fields(known[name]):  # type: ignore[arg-type]
        if f.init and not f.name.startswith("_") and f.name not in _NOT_SETTINGS:
            made = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
            out[f.name] = None if made is dataclasses.MISSING else made
    return out


def read_settings(**args: Any) -> Settings:
    """model_args, as lmms-eval has split them, to `Settings`; nothing is loaded.

    Values may be strings, numbers or booleans; "none" is None, and "[2, 6, 15]" and '{"3": 0.5}' are JSON.

    Raises:
        InputError: an argument that neither the adapter nor the method has, or a value out of range.
    """
    values = {key: _value(key, value) for key, value in args.items() if value is not None}
    name = str(values.pop("method", None) or "none").lower()
    takes = method_options(name)
    options = {}
    # a field of the method wins over an argument of ours with the same name (RandomPrune's seed is both)
    for key in [k for k in values if k in takes]:
        options[key] = values[key] if key == "seed" else values.pop(key)
    unknown = sorted(set(values) - set(OWN))
    if unknown:
        raise InputError(
            f"model_args: {unknown[0]!r} is no setting of method {name}, which takes {', '.join(takes) or 'none'}, nor of the "
            f"adapter, which takes {', '.join(OWN)}"
        )
    values.pop("max_batch_size", None)
    for key in ("pretrained", "dtype", "device", "predictor", "clip", "system_prompt", "records", "template", "engine"):
        if values.get(key) is not None:
            values[key] = str(values[key])
    values = {key: value for key, value in values.items() if value is not None}
    made = Settings(method=name, options={k: _tupled(v) for k, v in options.items()}, **values)
    _check(made)
    return made


def _check(s: Settings) -> None:
    for key, least in (("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(s, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"model_args: {key}={value!r} must be a whole number of at least {least}")
    for key, known in (("template", TEMPLATES), ("engine", ENGINES)):
        if getattr(s, key) not in known:
            raise InputError(f"model_args: {key}={getattr(s, key)!r} is none of {', '.join(known)}")
    if not s.pretrained:
        raise InputError("model_args: pretrained is empty: name a hub id or a folder")
    if s.flops is not None:
        if isinstance(s.flops, bool) or not isinstance(s.flops, int | float) or not 0 < s.flops <= 1:
            raise InputError(f"model_args: flops={s.flops!r} must be a share above 0, at most 1")
        if s.method == "none" or "predictor" in _fields(s.method):
            raise InputError(f"model_args: flops does not go with method {s.method}" + _trained(s.method))
    if s.predictor is not None and "predictor" not in _fields(s.method):
        raise InputError(f"model_args: predictor goes with dyrate, not with method {s.method}")
    if s.clip is not None and s.method != "cdpruner":
        raise InputError(f"model_args: clip goes with cdpruner, not with method {s.method}")
    if s.predictor is None and _led_by_predictor(s):
        _shipped(s)
    elif s.predictor is None:
        try:
            method_classes()[s.method](**s.options)  # refuses bad values now, not after the weights are loaded
        except TypeError as error:
            raise InputError(f"model_args: method {s.method}: {error}") from error


def _fields(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(method_classes()[name])}  # type: ignore[arg-type]


def _led_by_predictor(s: Settings) -> bool:
    """Whether the method takes its rate from a predictor: not where a schedule is named in its stead (relook's rates)."""
    return "predictor" in _fields(s.method) and s.options.get("rates") is None


def _trained(name: str) -> str:
    return ": its budget is set in training, see predictor" if name != "none" else ": there is nothing to set"


def _shipped(s: Settings) -> Any:
    from ..captioning import default_predictor

    return default_predictor(s.pretrained)


def build_method(settings: Settings, model: Any = None) -> Method:
    """The method of some settings. model: a model or its `ModelInfo`, needed where a budget is searched (flops).

    Raises:
        InputError: settings that the method refuses, a budget that it cannot meet. ResourceError: no such predictor.
    """
    cls, options = method_classes()[settings.method], dict(settings.options)
    if cls is NoReduction:
        return NoReduction()
    if settings.predictor is not None or _led_by_predictor(settings):
        options["predictor"] = settings.predictor or _shipped(settings)
    if cls is CDPruner and settings.clip:
        options.update(_clip(settings.clip))
    try:
        made = cls(**options)
    except TypeError as error:
        raise InputError(f"model_args: method {settings.method}: {error}") from error
    if settings.flops is None:
        return made
    from ..budgets import budget

    return budget(made, model, flops=float(settings.flops))


def _clip(source: str) -> dict[str, Any]:
    """CDPruner's text tower and visual projection, from a CLIP checkpoint in safetensors."""
    from transformers import AutoTokenizer, CLIPModel, CLIPTextModelWithProjection

    try:
        whole = CLIPModel.from_pretrained(source, use_safetensors=True)
        text = CLIPTextModelWithProjection.from_pretrained(source, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ResourceError(f"clip={source} could not be loaded: {error}") from error
    return {"text": clip_text(text.eval(), tokenizer), "image_projection": whole.visual_projection.weight.detach()}


# ---------------------------------------------------------------------------------------------------------- values


def _value(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if key in ("system_prompt", "pretrained", "records", "predictor", "clip"):
        return value
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"model_args: {key}={value!r} is not JSON: {error}") from error
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _tupled(value: Any) -> Any:
    """Lists as tuples; JSON's string keys as the layer numbers that they are."""
    if isinstance(value, Mapping):
        return {int(k) if isinstance(k, str) and k.isdecimal() else k: _tupled(v) for k, v in value.items()}
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value
