"""The library's own exceptions: one base, three kinds, so that a caller can tell bad input from a missing resource."""


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
