"""dyrate_lib: visual token reduction while a LLaVA-style model generates, and the study of DyRate made with it."""

from .attention import attention_shares
from .errors import DyRateError, InputError, RecordError, ResourceError
from .generation import GenerationOutput, Trace, generate
from .loading import load_vlm, prepare_inputs
from .methods import VTW, DepthPrune, DyRate, FastV, Method, NoReduction, RandomPrune, RatePath, vtw_search
from .models import model_info
from .predictor import RatePredictor
from .prompts import chat_prompt

__version__ = "0.1.0"

__all__ = [
    "VTW", "DepthPrune", "DyRate", "DyRateError", "FastV", "GenerationOutput", "InputError", "Method", "NoReduction",
    "RandomPrune", "RatePath", "RatePredictor", "RecordError", "ResourceError", "Trace", "attention_shares", "chat_prompt",
    "generate", "load_vlm", "model_info", "prepare_inputs", "vtw_search",
]  # fmt: skip
