"""What a rate predictor may be fed with: the paper's attention shares, and the controls that tell what they add.

Each control knows less or more than the shares: nothing, the step, the shares of another picture, the hidden state, or (the
oracle, for training data whose truth is known) what the token about to be said needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .predictor import RatePredictor

INPUTS = ("shares", "step", "none", "hidden", "foreign", "oracle")
BY_NUMBER = ("step", "oracle")  # a number picks a row of a table, which is a linear layer on its one-hot
BLIND = ("step", "none")  # what they choose does not depend on the picture or the text
STEPS = 64  # rows of the table over steps, and steps in a bank of shares: later steps share the last
BANK = 32  # pictures whose shares a "foreign" predictor carries
_EPS = 1e-6


def width_of(inputs: str, n_heads: int, hidden: int | None = None) -> int:
    """Inputs of the linear layer. Raises InputError for an unknown kind, or a hidden state of unknown size."""
    if inputs not in INPUTS:
        raise InputError(f"RatePredictor: inputs={inputs!r} is not known; choose one of {', '.join(INPUTS)}.")
    if (hidden is not None) != (inputs == "hidden"):
        raise InputError(f"RatePredictor: inputs={inputs!r} with hidden={hidden!r}: give the state's size for 'hidden' only.")
    sizes = {"step": STEPS, "none": 0, "hidden": hidden, "oracle": _codes()}
    width = sizes.get(inputs, 4 * n_heads)
    assert width is not None  # by the second check
    return width


def unit_rms(x: Tensor) -> Tensor:
    """Rows [.., D] divided by their root mean square, float32: the size of a hidden state says little, it grows with depth."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS)


# ------------------------------------------------------------------------------------------------------- the oracle


def _codes() -> int:
    from .scenes.captions import NEEDS

    return 2 * len(NEEDS)


def need_codes(needs: Sequence[str]) -> list[int]:
    """What the oracle knows at each step of a reply, as one number: 2 * need + (1 if a need of the image is still to come).

    needs: what each token of the reply needs, in order, by the names of `scenes.NEEDS` (image, response, none). The token about
    to be said counts among those to come.

    Raises:
        InputError: a need of another name.
    """
    from .scenes.captions import NEEDS

    unknown = sorted({str(need) for need in needs if need not in NEEDS})
    if unknown:
        raise InputError(f"needs {', '.join(unknown)} are not known: there are {', '.join(NEEDS)}.")
    last = max((t for t, need in enumerate(needs) if need == "image"), default=-1)
    return [2 * NEEDS.index(need) + (t <= last) for t, need in enumerate(needs)]


def oracle_rates(predictor: RatePredictor, needs: Sequence[str]) -> list[float]:
    """The share of image tokens that an oracle removes at each step of a reply: what `RatePath` takes for one sample.

    needs: as in `need_codes`, one a step (step t yields token t). Rates are k / n_rates, as drawn: that discarding is final
    is the method's to say.

    Raises:
        InputError: the predictor is no oracle, no step, or an unknown need.
    """
    if predictor.inputs != "oracle":
        raise InputError(f"oracle_rates takes a predictor of inputs='oracle', this one reads {predictor.inputs!r}.")
    if not len(needs):
        raise InputError("oracle_rates needs what at least one token needs.")
    codes = torch.tensor(need_codes(needs), device=predictor.linear.weight.device)
    return [k / predictor.n_rates for k in predictor(codes).argmax(-1).tolist()]
