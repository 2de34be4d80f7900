"""dyrate_lib: visual token reduction while a LLaVA-style model generates, and the study of DyRate made with it."""

from .attention import attention_shares
from .budgets import actual_tokens, budget
from .errors import DyRateError, InputError, RecordError, ResourceError
from .generation import GenerationOutput, Trace, generate
from .loading import load_vlm, prepare_inputs
from .methods import (
    ST3,
    VTW,
    BeforeLLM,
    CDPruner,
    DepthPrune,
    DivPrune,
    DyRate,
    FastV,
    LayerTopK,
    MergeRate,
    Method,
    NoReduction,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    RandomPrune,
    RatePath,
    RelookRate,
    SparseVLM,
    VisionZip,
    clip_text,
    vtw_search,
)
from .models import model_info
from .predictor import RatePredictor
from .prompts import chat_prompt

__version__ = "0.3.4"

__all__ = [
    "ST3", "VTW", "BeforeLLM", "CDPruner", "DepthPrune", "DivPrune", "DyRate", "DyRateError", "FastV",
    "GenerationOutput", "InputError", "LayerTopK", "MergeRate", "Method", "NoReduction", "PruMerge", "PruMergePlus",
    "PyramidDrop", "RandomPrune", "RatePath", "RatePredictor", "RecordError", "RelookRate", "ResourceError", "SparseVLM", "Trace",
    "VisionZip", "actual_tokens", "attention_shares", "budget", "chat_prompt", "clip_text", "generate", "load_vlm", "model_info",
    "prepare_inputs", "vtw_search",
]  # fmt: skip
