"""Noticing that a model is no longer the one that an engine was made of, and giving several parameters one storage."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str, nn.Module]  # a module, its name in it, and the module that stands there


class Watch:
    """Modules at their places, their own parameters, and their forward hooks.

    called: places whose module computes, so that parameters and hooks count. holders: places that only lead to others: what
    stands there counts, its hooks do not. The storage of every parameter is held until the watch is given up: a captured graph
    that reads it may run once more before anyone asks. hooked: whether any of `called` had forward hooks when this was made.
    """

    def __init__(self, called: Iterable[Place], holders: Iterable[Place] = ()) -> None:
        parts, others = list(called), list(holders)
        modules = [module for _, _, module in parts]
        self._homes: list[dict] = [parent._modules for parent, _, _ in (*parts, *others)]
        self._names = [name for _, name, _ in (*parts, *others)]
        self._objects: list = [module for _, _, module in (*parts, *others)]
        for module in modules:  # a bias that is None, too: one may be put there
            self._homes += [module._parameters] * len(module._parameters)
            self._names += list(module._parameters)
            self._objects += list(module._parameters.values())
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._parameters = [own for module in modules for own in module._parameters.values() if own is not None]
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        self._held = [parameter.data for parameter in self._parameters]
        self._counts = list(map(len, self._hooks))
        self.hooked = _foreign(self._hooks)

    def intact(self) -> bool:
        """Whether all is where it was: nothing moved, cast, given other weights or modules, or hooked since.

        Every call of `generate` asks, before the device has anything to do: so the loops are the interpreter's own.
        """
        counts = list(map(len, self._hooks))
        if counts != self._counts:
            self._counts = counts
            if _foreign(self._hooks) != self.hooked:
                return False
        return (
            all(map(is_, map(dict.get, self._homes, self._names), self._objects))
            and list(map(Tensor.data_ptr, self._parameters)) == self._addresses
        )


def hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks that somebody waits for."""
    return _foreign([module._forward_hooks, module._forward_pre_hooks])


def _foreign(hooks: Iterable[dict]) -> bool:
    """Whether there are hooks other than those by which transformers notes hidden states, once it has been asked for any."""
    makers = (getattr(hook, "__module__", "") for found in hooks for hook in found.values())
    return any(not str(maker).startswith("transformers.utils.") for maker in makers)


@torch.inference_mode(False)  # a parameter made of an inference tensor could not be trained
def fuse(parts: list[nn.Parameter]) -> Tensor:
    """One matrix (or vector) of several, row after row, of which the parameters become views: nothing is held twice."""
    whole = torch.cat([part.data for part in parts])
    row = 0
    for part in parts:
        part.data = whole[row : row + part.shape[0]]
        row += part.shape[0]
    return whole


@torch.inference_mode(False)
def part_again(parameters: Iterable[nn.Parameter]) -> None:
    """Give fused parameters storage of their own."""
    for parameter in parameters:
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()
