"""What does not need a GPU of captured graphs: failures, pools, and how the tail is found again."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch

from dyrate_lib import DyRate, InputError, ResourceError
from dyrate_lib.engine import graphs
from dyrate_lib.engine.graphs import Replayable
from dyrate_lib.engine.tails import MET, Tails
from dyrate_lib.methods.base import Method, PrefillView, imagined_counts
from tests.contract import lively_predictor


@pytest.fixture
def engine():
    return SimpleNamespace(pool=None, graphs=WeakSet(), device="cuda:0")


def failing(part, monkeypatch, error):
    def capture(work):
        raise error

    monkeypatch.setattr(part, "_capture", capture)


def test_a_capture_that_fails_is_said_and_the_work_done(engine, monkeypatch, caplog):
    part, done = Replayable(engine), []
    failing(part, monkeypatch, RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore"))
    with caplog.at_level("WARNING", logger="dyrate_lib.engine"):
        for _ in range(4):
            part(lambda: done.append(1))
    assert len(done) == 4 and part.failed and len(caplog.records) == 1
    assert "cannot be captured" in caplog.text and "more" not in caplog.text


def test_no_room_for_a_graph_is_our_own_error(engine, monkeypatch):
    part = Replayable(engine)
    part(lambda: None)
    outer = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    outer.__context__ = torch.OutOfMemoryError("CUDA out of memory.")  # as the end of the capture raises it
    for error in (torch.OutOfMemoryError("CUDA out of memory."), outer):
        failing(part, monkeypatch, error)
        with pytest.raises(ResourceError, match="more memory than is free on cuda:0"):
            part(lambda: None)
        assert not part.failed


def test_a_fault_of_the_work_is_not_hidden(engine, monkeypatch):
    part = Replayable(engine)
    part(lambda: None)
    failing(part, monkeypatch, RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    with pytest.raises(RuntimeError, match="must match the size"):
        part(lambda: None)
    assert not part.failed


def test_a_pool_without_a_graph_is_not_used_again(engine, monkeypatch):
    """CUDA gives a pool up with its last graph."""

    class Graph:
        def replay(self):
            pass

    class Capturing:
        def __init__(self, graph, pool):
            pools.append(pool)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

    pools, handles = [], iter(range(9))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    held = [Replayable(engine), Replayable(engine)]
    for part in held:
        for _ in range(3):
            part(lambda: None)
    assert pools == [0, 0] and len(engine.graphs) == 2
    del held[0], part
    gc.collect()
    third = Replayable(engine)
    third(lambda: None), third(lambda: None)
    assert pools == [0, 0, 0]  # one was alive still
    held.clear()
    del third
    gc.collect()
    last = Replayable(engine)
    last(lambda: None), last(lambda: None)
    assert pools[-1] == 1 and len(engine.graphs) == 1


def test_causes_end_even_where_errors_point_at_each_other():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__context__, second.__context__ = second, first
    assert graphs._causes(first) == [first, second]


# -- tails --------------------------------------------------------------------------------------------------------------


def tails(buckets: bool) -> Tails:
    plan = SimpleNamespace(batch=2, passes=32, columns=640)
    return Tails(plan, SimpleNamespace(n_kv_heads=4, head_dim=16), buckets)


def test_counts_that_are_laid_out_alike_share_a_tail():
    memory = tails(True)
    need = [[190, 190], [254, 254], [0, 0]]
    first = memory.of(need, 64)
    assert memory.of([list(row) for row in need], 64) is first
    assert memory.of([[185, 185], [249, 249], [0, 0]], 64) is first  # both 192 slots, 256 rows
    other = memory.of([[193, 193], [257, 257], [0, 0]], 64)
    assert other is not first and other.layout is not first.layout
    assert first.rows == [256, 256] and first.cuts == [True, False] and [s.slots for s in first.shapes] == [192, 192]
    assert [s.entries for s in first.shapes] == [288, 288] and first.sizes == [(2, 4, 288, 16)] * 4
    cut = memory.of([[190, 190], [254, 254], [1, 1]], 64)
    assert cut is not first and cut.layout is first.layout and cut.cuts == [True, True]
    longer = memory.of(need, 65)
    assert longer is not first and longer.shapes[0].entries == 320


def test_without_buckets_nothing_is_rounded_but_the_buffers():
    tail = tails(False).of([[7, 3], [20, 16], [0, 1]], 13)
    assert tail.rows == [20, 16] and [s.slots for s in tail.shapes] == [7, 3] and tail.cuts == [True, True]


def test_rows_are_no_more_than_the_prompt_has():
    memory = tails(True)
    memory.plan.columns = 40
    assert memory.of([[30], [39], [0]], 9).rows == [40]


def test_only_so_many_are_remembered():
    memory = tails(False)
    for n in range(MET + 50):
        memory.of([[n], [n], [0]], 5)
    assert len(memory._met) <= MET and len(memory._made) <= MET and len(memory._layouts) <= MET


# -- what a method asks for, foretold --------------------------------------------------------------------------------------


class Falling(Method):
    """Asks for fewer at every step, and for more at one: which a method that is not reversible does not get."""

    layer = 1
    asked = (50, 7, 9, -2)

    def prefill(self, view: PrefillView) -> torch.Tensor:
        return torch.full_like(view.n_image, self.asked[0])

    def step(self, view):
        return torch.full_like(view.n_image, self.asked[view.step])


def test_imagined_counts_are_bounded_as_in_a_run():
    method, n_image = Falling(), torch.tensor([12, 5])
    assert imagined_counts(method, n_image, 4, 3, 0).tolist() == [[12, 5], [7, 5], [7, 5], [0, 0]]
    method.reversible = True
    assert imagined_counts(method, n_image, 4, 3, 0).tolist() == [[12, 5], [7, 5], [9, 5], [0, 0]]
    assert method.plan(12, 3, 4).tolist() == [[12, 12, 12], [12, 7, 7], [12, 9, 9], [12, 0, 0]]


def test_a_predictor_is_placed_anew_only_where_it_changed():
    predictor = lively_predictor()
    method = DyRate(predictor, 3)
    method.prepare(8, 4, torch.device("cpu"))
    placed = method._placed
    method.prepare(8, 4, torch.device("cpu"))
    assert method._placed is placed and placed is not predictor
    predictor.linear.weight.data[0, 0] += 1  # by a way that autograd does not count
    method.prepare(8, 4, torch.device("cpu"))
    assert method._placed is not placed and torch.equal(method._placed.linear.weight, predictor.linear.weight)
    with pytest.raises(InputError, match="heads"):
        method.prepare(8, 5, torch.device("cpu"))
