"""CONTRIBUTING.md's five steps, followed: the method written there is added, and meets the contract like any other."""

from __future__ import annotations

import re
import sys
import types

import pytest
import torch

from dyrate_lib import InputError, generate, paths
from tests import test_contract as contract
from tests import test_decoding as decoding
from tests.contract import Case, cases, one_row, random_batch, small_model

NAME = "every-kth"


@pytest.fixture(autouse=True)
def added(monkeypatch):
    """Steps 2 to 4 as they are written: the file, and the line in the matrix. Yields the method's class."""
    text = (paths.root() / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```python\n(.*?)\n *```", text, flags=re.DOTALL)
    file, line = (re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in blocks[:2])
    module = types.ModuleType("dyrate_lib.methods.every_kth")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look their annotations up
    exec(compile(file, "CONTRIBUTING.md", "exec"), vars(module))
    entry = eval(f"{{{line}}}", {"Case": Case, "EveryKth": module.EveryKth})
    monkeypatch.setitem(cases(), NAME, entry[NAME])
    return module.EveryKth


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def padded():
    return random_batch(6, contract.ROWS)


@pytest.fixture(scope="module")
def single(padded):
    return one_row(padded, 1)


def test_it_keeps_every_kth_token(model, padded, single, added):
    out = generate(model, padded, added(2, 5), max_new_tokens=3, eos_token_id=[])
    assert out.trace.kept_at(0, 2).tolist() == list(range(0, 36, 5))
    assert out.trace.kept[:, 0].tolist() == [8, 8, 0]
    assert out.flops("cached").ratio < 1 and out.flops("paper").ratio < out.flops("cached").ratio
    with pytest.raises(InputError, match="k=0"):
        added(2, 0)
    with pytest.raises(InputError, match="1 to 7"), added(8, 2)(model):
        pass


@pytest.mark.parametrize(
    "test",
    [
        contract.test_prefill_only, contract.test_cached_decode, contract.test_positions_are_kept_or_counted_anew,
        contract.test_accounting_agrees_with_the_flop_counter,
        contract.test_a_context_can_be_entered_again_and_a_method_used_on_two_models, decoding.test_beams,
    ],
)  # fmt: skip
def test_it_meets_the_contract_alone(model, single, test):
    test(model, single, NAME, **({"beams": 5} if test is decoding.test_beams else {}))


@pytest.mark.parametrize(
    "test",
    [
        contract.test_padding, contract.test_beam, contract.test_sampling, contract.test_keeping_all_is_the_unpruned_model,
        contract.test_the_model_is_restored_also_after_an_exception, decoding.test_eager_attention_gives_the_same,
    ],
)  # fmt: skip
def test_it_meets_the_contract_in_a_padded_batch(model, padded, test):
    model(**padded), model.generate(**padded, max_new_tokens=1)  # transformers marks a model on its first passes
    test(model, padded, NAME)


def test_a_method_that_does_not_follow_its_own_count_would_fail(model, single, added, monkeypatch):
    """The matrix can fail: a plan that differs from what is kept is found."""
    monkeypatch.setattr(added, "prefill", lambda self, view: torch.full_like(view.n_image, 7))
    with pytest.raises(AssertionError):
        contract.test_prefill_only(model, single, NAME)
