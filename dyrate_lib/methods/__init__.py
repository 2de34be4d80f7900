"""The pruning methods, one file each."""

from .base import Method
from .dyrate import DyRate
from .fastv import FastV
from .none import NoReduction
from .random import RandomPrune
from .schedule import DepthPrune, RatePath
from .vtw import VTW, vtw_divergence, vtw_search

__all__ = [
    "VTW",
    "DepthPrune",
    "DyRate",
    "FastV",
    "Method",
    "NoReduction",
    "RandomPrune",
    "RatePath",
    "vtw_divergence",
    "vtw_search",
]
