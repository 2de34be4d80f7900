"""Where transformers hands a decoder, a layer or its attention the cache: as `past_key_values`, and from 5.24 on as `cache`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("past_key_values", "cache")


def cache_name(kwargs: Mapping[str, Any]) -> str:
    """The word under which a module's keyword arguments hold the cache; where they hold none, the old one."""
    return next((name for name in NAMES if name in kwargs), NAMES[0])


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a module's keyword arguments, None where there is none."""
    return kwargs.get(cache_name(kwargs))
