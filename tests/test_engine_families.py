"""The engine on every family: other positions, biases, grouped heads, several pictures a prompt."""

from __future__ import annotations

import pytest
import torch

from dyrate_lib import generate
from dyrate_lib.engine import eager_engine
from tests.engine_cases import check_same
from tests.test_families import METHODS, ROWS
from tests.tiny_families import FAMILIES, model_of


@pytest.mark.parametrize("name", FAMILIES)
def test_same_as_the_reference(name):
    model, inputs = model_of(name), FAMILIES[name].inputs(ROWS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = eager_engine(model, buckets=True)
    try:
        for method in (None, *METHODS.values()):
            kwargs = dict(max_new_tokens=6, eos_token_id=[], return_logits=True)
            check_same(
                generate(model, inputs, method, engine=engine, **kwargs),
                generate(model, inputs, method, engine="reference", **kwargs),
            )
    finally:
        engine.release()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
