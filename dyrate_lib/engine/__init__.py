"""The graph engine: pruned generation at the pace of the memory, on a GPU. `generate(..., engine="graph")` is its user.

Where things are: `select` says which engine a model can have; `loop` is the loop; `runner` holds an engine's buffers and graphs
by `state.Plan`, `tails` the layouts of what is kept; `batch`, `prefill` and `step` are a prompt's pass and a token's, `tower` is
what sees the pictures; `staged` serves methods that cut at several layers; `policy` puts a method's rule on the device; `choice`
chooses tokens; `watch` notices a model that has changed. `ops` are a layer's operations, by `twins` (plain PyTorch) or, in
`triton_ops`, by the `*_kernel` modules, the only ones that need Triton.

An engine serves one call at a time.
"""

from .runner import Engine
from .select import eager_engine, engine_of, release, unsupported

__all__ = ["Engine", "eager_engine", "engine_of", "release", "unsupported"]
