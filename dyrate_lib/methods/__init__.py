"""The pruning methods, one file each."""

from .base import Method
from .before import BeforeLLM
from .cdpruner import CDPruner, clip_text
from .divprune import DivPrune
from .dyrate import DyRate
from .fastv import FastV
from .layer_topk import LayerTopK
from .merge import MergeRate
from .none import NoReduction
from .prumerge import PruMerge, PruMergePlus
from .pyramiddrop import PyramidDrop
from .random import RandomPrune
from .relook import RelookRate
from .schedule import DepthPrune, RatePath
from .sparsevlm import SparseVLM
from .st3 import ST3
from .staged import Staged
from .visionzip import VisionZip
from .vtw import VTW, vtw_divergence, vtw_search

__all__ = [
    "ST3",
    "VTW",
    "BeforeLLM",
    "CDPruner",
    "DepthPrune",
    "DivPrune",
    "DyRate",
    "FastV",
    "LayerTopK",
    "MergeRate",
    "Method",
    "NoReduction",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "RandomPrune",
    "RatePath",
    "RelookRate",
    "SparseVLM",
    "Staged",
    "VisionZip",
    "clip_text",
    "vtw_divergence",
    "vtw_search",
]
