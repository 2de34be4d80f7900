"""The operations of a layer, by the means at hand: plain PyTorch here, Triton in `triton_ops.py`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import step, twins
from .weights import LayerWeights


class TorchOps:
    """Plain PyTorch: the twins of all kernels. Serves on any device and in any precision."""

    name = "torch"
    rms_norm = staticmethod(twins.rms_norm)
    swiglu = staticmethod(twins.swiglu)
    layer_norm = staticmethod(twins.layer_norm)
    add_layer_norm = staticmethod(twins.add_layer_norm)
    quick_gelu = staticmethod(twins.quick_gelu)
    rope_store = staticmethod(twins.rope_store)
    decode_attention = staticmethod(twins.decode_attention)
    advance = staticmethod(step.advance)
    emit = staticmethod(step.emit)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [M, K], weight [N, K] to [M, N]."""
        return F.linear(x, weight, bias)

    def add_linear(self, x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x + a weight^T (+ bias): x [M, N], a [M, K]. May write to x."""
        if bias is not None:
            return x + F.linear(a, weight, bias)
        return x.addmm_(a, weight.t())

    # -- parts of a layer, which a subclass may fuse -----------------------------------------------------------------

    def norm_qkv(self, x: Tensor, w: LayerWeights) -> Tensor:
        """Input norm and the fused projection: x [M, D] to [M, (H + 2 K) d]."""
        return self.linear(self.rms_norm(x, w.norm, w.eps), w.qkv, w.qkv_bias)

    def attention_out(self, x: Tensor, attended: Tensor, w: LayerWeights) -> Tensor:
        """x + the output projection of attended [M, H d]: [M, D]. May write to x."""
        return self.add_linear(x, attended, w.o, w.o_bias)

    def mlp(self, x: Tensor, w: LayerWeights) -> Tensor:
        """x + the gated MLP of its norm: [M, D]. May write to x."""
        gate_up = self.linear(self.rms_norm(x, w.post_norm, w.post_eps), w.gate_up)
        return self.add_linear(x, self.swiglu(gate_up), w.down)

    def head(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
        """Final norm and LM head: [M, D] to [M, V]."""
        return self.linear(self.rms_norm(x, norm, eps), weight)
