"""The library's own exceptions: one base, three kinds, so that a caller can tell bad input from a missing resource."""

from __future__ import annotations

import operator
from typing import Any


class DyRateError(Exception):
    """Base of every error that this library raises on purpose. Its message names the cause and the cure."""


class InputError(DyRateError, ValueError):
    """What the caller passed cannot be used: a picture, a prompt, a rate, a layer, a predictor, a parameter."""


class Unsupported(InputError):
    """Sound, but nothing that the graph engine can run: `engine="auto"` takes the reference loop instead."""


class ResourceError(DyRateError, RuntimeError):
    """Something the work needs is not there: weights, data, Java, a GPU, room on the disk."""


class RecordError(DyRateError, RuntimeError):
    """A stored record cannot be read or was altered after it was written."""


def check_whole(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int; `name` is what the caller calls it.

    Raises:
        InputError: no whole number (True and 2.0 are none), or below `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        floor = "" if least is None else f" of at least {least}"
        raise InputError(f"{name}={value!r} must be a whole number{floor}.")
    return number
