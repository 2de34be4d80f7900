"""The engine's Triton kernels on a CPU, interpreted. `tests/test_engine_interpreter.py` runs them in processes of their own.

Triton decides when it is imported whether to interpret, and much imports it; so these modules are no `test_` files, and need

    TRITON_INTERPRET=1 pytest tests/interpreted/kernels.py
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)
