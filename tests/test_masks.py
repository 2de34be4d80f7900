"""Rates, nested masks, selection: properties of eqs. 1-6 and of the slot layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dyrate_lib import InputError, masks


def test_first_rate_keeps_all_and_rates_are_even():
    assert masks.rates(10).tolist() == pytest.approx([k / 10 for k in range(10)])
    with pytest.raises(InputError, match="n_rates"):
        masks.rates(0)


@given(n=st.integers(0, 3000), n_rates=st.integers(1, 40))
def test_kept_counts_follow_the_floor_of_exact_rates(n, n_rates):
    from fractions import Fraction
    from math import floor

    counts = masks.kept_counts(torch.tensor(n), n_rates).tolist()
    assert counts == [n - floor(Fraction(k, n_rates) * n) for k in range(n_rates)]
    assert counts[0] == n and counts == sorted(counts, reverse=True)


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**31))
def test_masks_are_nested_in_ranking_and_in_raster_order(n, n_rates, seed):
    generator = torch.Generator().manual_seed(seed)
    ranking = masks.rank_tokens(torch.rand(1, n, generator=generator))
    counts = masks.kept_counts(torch.tensor([n]), n_rates)
    raster = masks.ranking_to_tokens(masks.prefix_masks(counts, n), ranking[:, None])
    assert raster.sum(-1).tolist() == counts.tolist()
    assert bool((raster[:, 1:] <= raster[:, :-1]).all())  # a higher rate keeps a subset
    for k, count in enumerate(counts[0].tolist()):
        assert set(raster[0, k].nonzero()[:, 0].tolist()) == set(ranking[0, :count].tolist())


def test_equal_scores_keep_raster_order_and_absent_tokens_come_last():
    assert masks.rank_tokens(torch.tensor([[1.0, 2.0, 1.0, 2.0]])).tolist() == [[1, 3, 0, 2]]
    ranked = masks.rank_tokens(torch.tensor([[1.0, 9.0, 5.0]]), torch.tensor([[True, False, True]]))
    assert ranked.tolist() == [[2, 0, 1]]


def test_gumbel_samples_follow_the_distribution_and_pass_a_gradient():
    logits = torch.tensor([0.0, 1.0, -1.0]).repeat(40_000, 1).requires_grad_()
    drawn = masks.gumbel_one_hot(logits, tau=1.0, generator=torch.Generator().manual_seed(0))
    hard = drawn.detach().round()
    assert bool((hard.sum(-1) == 1).all()) and bool((hard.max(-1).values == 1).all())
    assert (drawn.detach() - hard).abs().max() < 1e-6
    expected = torch.softmax(logits[0].detach(), -1)
    # 40,000 draws: five standard errors of a proportion are below 0.0125
    assert torch.allclose(drawn.detach().mean(0), expected, atol=0.0125)
    (drawn @ torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_selection_is_monotone_and_final():
    one_hot = torch.nn.functional.one_hot(torch.tensor([[0, 2, 1, 3]]), 4).float()
    rate_masks = masks.prefix_masks(masks.kept_counts(torch.tensor([8]), 4), 8).float()
    selected = masks.select_masks(one_hot, rate_masks)
    assert selected.sum(-1).tolist() == [[8.0, 4.0, 4.0, 2.0]]


def test_running_rate_distribution_is_that_of_the_highest_draw():
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.softmax(torch.randn(1, 3, 4, generator=generator), -1)
    exact = torch.zeros(3, 4)
    for a in range(4):
        for b in range(4):
            for c in range(4):
                weight = probabilities[0, 0, a] * probabilities[0, 1, b] * probabilities[0, 2, c]
                for t, path in enumerate((a, max(a, b), max(a, b, c))):
                    exact[t, path] += weight
    assert torch.allclose(masks.running_rate_distribution(probabilities)[0], exact, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31))
def test_response_mask_by_its_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    types = torch.tensor([[-1, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]])
    index = torch.tensor([[2, 3, 4], [1, 2, -1]])
    keep = (torch.rand(2, 4, 3, generator=generator) < 0.5).float()
    mask = masks.response_mask(keep, index, types, 3)
    for b in range(2):
        for i in range(9):
            for j in range(9):
                row = max(0, i - 5)
                allowed = j <= i
                if j < 6 and i != j:
                    allowed &= types[b, j] != masks.PAD
                    where = (index[b] == j).nonzero()
                    if len(where):
                        allowed &= bool(keep[b, row, where[0, 0]])
                assert bool(mask[b, i, j]) == bool(allowed), (b, i, j)


def test_tail_order_puts_the_least_important_first_and_text_last():
    types = torch.tensor([[-1, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]])
    index = torch.tensor([[2, 3, 4], [1, 2, 3]])
    ranking = torch.tensor([[2, 0, 1], [0, 1, 2]])
    columns, valid = masks.tail_order(types, index, ranking, 2)
    assert columns[:, :2].tolist() == [[2, 4], [2, 1]]
    assert columns[1, 2:].tolist() == [0, 4, 5] and columns[0, -2:].tolist() == [1, 5]
    assert valid.tolist() == [[True, True, False, True, True], [True] * 5]
