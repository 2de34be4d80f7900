"""The kernels' twins against their definitions in float64, on lengths of every kind, and the bookkeeping of a prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib.engine import twins
from dyrate_lib.engine.batch import Batch, last_rows, tail_rows
from dyrate_lib.engine.cache import Arena
from dyrate_lib.masks import IMG, INS, PAD, SYS
from dyrate_lib.models import Adapter
from tests.contract import random_batch, small_model
from tests.engine_cases import attention_case, check_attention, error


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_decode_attention_of_any_lengths(data):
    """None kept, all kept, ragged; with and without a list of entries; own and shared keys."""
    kv, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]), label="heads")
    start, room = data.draw(st.integers(0, 40), label="slots"), data.draw(st.integers(1, 40), label="room")
    lengths = st.tuples(st.sampled_from([0, start]) | st.integers(0, start), st.integers(0, room - 1))
    kept, filled = zip(*data.draw(st.lists(lengths, min_size=1, max_size=4), label="kept, filled"), strict=True)
    indexed = start > 0 and data.draw(st.booleans(), label="indexed")
    seed = data.draw(st.integers(0, 99), label="seed")
    case = attention_case(seed, kv * group, kv, 8, kept, filled, start, start + room, indexed=indexed)
    check_attention(twins.decode_attention, case, data.draw(st.booleans(), label="looks"))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 2), st.integers(1, 2), st.integers(0, 99))
def test_rope_store_stores_what_it_returns(batch, length, kv, group, seed):
    generator = torch.Generator().manual_seed(seed)
    heads, d, entries = kv * group, 6, 8
    qkv = torch.randn(batch, length, (heads + 2 * kv) * d, generator=generator, dtype=torch.float64)
    angle = torch.randn(batch, length, d // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
    dest = torch.stack([torch.randperm(entries + 3, generator=generator)[:length] for _ in range(batch)])
    dest = torch.where(dest < entries, dest, -1).int()
    keys, values = (torch.full((batch, kv, entries, d), torch.nan, dtype=torch.float64) for _ in "kv")
    q, k, v = twins.rope_store(qkv, angle.cos(), angle.sin(), keys, values, dest, heads)
    parts = qkv.view(batch, length, heads + 2 * kv, d).transpose(1, 2)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None, :, : d // 2]

    def turned(x):
        """The rotation as a product of complex numbers."""
        y = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
        return torch.cat((y.real, y.imag), -1)

    torch.testing.assert_close(q, turned(parts[:, :heads]))
    torch.testing.assert_close(k, turned(parts[:, heads : heads + kv]))
    torch.testing.assert_close(v, parts[:, heads + kv :])
    for b in range(batch):
        for t, entry in enumerate(dest[b].tolist()):
            if entry >= 0:
                assert torch.equal(keys[b, :, entry], k[b, :, t]) and torch.equal(values[b, :, entry], v[b, :, t])
        unwritten = sorted({*range(entries)} - {*dest[b].tolist()})
        assert bool(keys[b, :, unwritten].isnan().all()) and bool(values[b, :, unwritten].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_swiglu(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 50, generator=generator).to(dtype), torch.randn(50, generator=generator).to(dtype)
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    wide = x.double()
    assert error(twins.rms_norm(x, weight, 1e-5), wide / (wide.square().mean(-1, True) + 1e-5).sqrt() * weight) < bound
    gate, up = wide.chunk(2, -1)
    assert error(twins.swiglu(x), gate * torch.sigmoid(gate) * up) < bound


def test_classify_takes_the_highest():
    shares = torch.rand(5, 3, 4)
    weight, bias = torch.randn(6, 12), torch.randn(6)
    wanted = (shares.flatten(1) @ weight.T + bias).argmax(-1)
    assert torch.equal(twins.classify(shares, weight, bias), wanted)


# -- a prompt's bookkeeping ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_batch_lies_flush_left(data):
    rows = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6), st.booleans()), min_size=1, max_size=4))
    multiple = data.draw(st.sampled_from([1, 8]))
    inputs = random_batch(6, rows, seed=1)
    prompt = Adapter(small_model()).embed(inputs)
    batch = Batch.of(prompt, inputs["input_ids"], multiple)
    assert batch.shape[1] % multiple == 0 and batch.shape[1] - max(prompt.length.tolist()) < multiple
    for b, (before, after, picture) in enumerate(rows):
        real, n = prompt.types[b] != PAD, 1 + before + after + 36 * picture
        assert int(batch.lengths[b]) == n and int(batch.n_image[b]) == 36 * picture
        for moved, original in (
            (batch.types, prompt.types), (batch.positions, prompt.position_ids), (batch.ids, inputs["input_ids"])
        ):  # fmt: skip
            assert torch.equal(moved[b, :n], original[b, real])
        assert bool((batch.types[b, n:] == PAD).all())
        columns = batch.image_index[b][batch.image_index[b] >= 0]
        assert columns.tolist() == [1 + before + i for i in range(36 * picture)]
        assert torch.equal(batch.order[b, :n], real.nonzero()[:, 0])
    assert int(batch.places.numel()) == int(batch.n_image.sum())
    assert batch.longest_text == int((batch.lengths - batch.n_image).max())
    assert batch.packed().numel() == sum(
        getattr(batch, name).numel()
        for name in ("ids", "types", "positions", "image_index", "lengths", "n_image", "last", "places")
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_layers_from_p_on_get_what_is_kept_in_the_prompts_order(data):
    batch, n, before, after = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7)), 2, 3
    has = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch), label="pictures")
    kept = torch.tensor([data.draw(st.integers(0, n)) if picture else 0 for picture in has])
    types, image = torch.full((batch, before + n + after), PAD), torch.full((batch, n), -1)
    for b, picture in enumerate(has):
        row = [SYS] * before + [IMG] * n * picture + [INS] * after
        types[b, : len(row)] = torch.tensor(row)
        if picture:
            image[b] = torch.arange(before, before + n)
    ranking = torch.stack([torch.randperm(n) for _ in range(batch)])
    slots = int(kept.max()) + data.draw(st.integers(0, 3), label="spare")
    rows = int(kept.max()) + before + after
    columns, dest = tail_rows(types, image, ranking, kept, slots, rows)
    for b in range(batch):
        chosen = set(ranking[b, : kept[b]].tolist())
        wanted = [
            (column, slots + sum(kind in (SYS, INS) for kind in types[b, :column].tolist()))
            if types[b, column] != IMG
            else (column, ranking[b].tolist().index(column - before))
            for column in range(types.shape[1])
            if types[b, column] in (SYS, INS) or (types[b, column] == IMG and column - before in chosen)
        ]
        found = list(zip(columns[b].tolist(), dest[b].tolist(), strict=True))
        assert found[: len(wanted)] == wanted
        assert all(entry == -1 for _, entry in found[len(wanted) :])


def test_last_rows():
    x = torch.arange(2 * 3 * 2.0).view(2, 3, 2)
    assert last_rows(x, torch.tensor([3, 1])).tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_an_arena_grows_at_once_and_shrinks_with_patience():
    moves = []
    arena = Arena(torch.device("cpu"), torch.float32, lambda: moves.append(arena.room()))
    first = arena.carve([(2, 3), (4,)])
    assert [tuple(part.shape) for part in first] == [(2, 3), (4,)] and arena.room() == 10 and arena.made == 1
    again = arena.carve([(2, 3), (4,)])
    assert [a.data_ptr() for a in first] == [b.data_ptr() for b in again] and arena.made == 1
    assert arena.holds([(10,)]) and not arena.holds([(11,)])
    arena.carve([(20,)])
    assert arena.room() == 20 and arena.made == 2
    for _ in range(16):
        arena.carve([(3,)])
        assert arena.room() == 20
    arena.carve([(3,)])
    assert arena.room() == 3 and arena.made == 3
    arena.free()
    assert arena.room() == 0 and moves == [0, 10, 20, 3]
