"""Seed data: what is drawn, and who gets which example."""

import math

import pytest
import torch

from upit.router_init.seeds import assign, draw_seed


@pytest.mark.parametrize("capacity_factor", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("seeds", "experts"), [(12, 4), (13, 4), (5, 5), (30, 7)])
def test_no_bucket_is_over_its_capacity(capacity_factor, seeds, experts):
    generator = torch.Generator().manual_seed(seeds)
    perplexity = torch.rand(seeds, experts, generator=generator) + 1
    perplexity[:, -1] *= 0.1  # the last checkpoint wins everywhere
    expert_S = assign(perplexity, capacity_factor=capacity_factor)
    counts = torch.bincount(expert_S, minlength=experts)
    assert counts.max() <= math.ceil(capacity_factor * seeds / experts)
    assert counts.sum() == seeds
    assert counts[-1] == counts.max(), "the best expert's bucket is full"


def test_without_capacity_the_lowest_perplexity_wins():
    perplexity = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) + 1
    assert torch.equal(assign(perplexity, capacity_factor=None), perplexity.argmin(dim=1))


def test_room_for_all_is_no_capacity():
    perplexity = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) + 1
    assert torch.equal(assign(perplexity, capacity_factor=4.0), perplexity.argmin(dim=1))


def test_who_loses_most_by_its_second_choice_chooses_first():
    perplexity = torch.tensor([[1.0, 1.1], [1.0, 9.0], [1.0, 1.2], [1.0, 5.0]])
    assert assign(perplexity, capacity_factor=1.0).tolist() == [1, 0, 1, 0]


def test_the_assignment_depends_on_no_order_of_the_examples():
    perplexity = torch.rand(24, 4, generator=torch.Generator().manual_seed(0)) + 1
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(assign(perplexity[order]), assign(perplexity)[order])


def test_a_perplexity_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        assign(torch.tensor([[1.0, float("nan")]]))


def test_a_capacity_that_leaves_examples_out_is_refused():
    with pytest.raises(ValueError, match=r"capacity_factor=0\.5"):
        assign(torch.ones(4, 2), capacity_factor=0.5)


def test_the_draw_is_sorted_distinct_and_its_seeds():
    drawn = draw_seed(1000, fraction=0.05, seed=3)
    assert len(drawn) == len(set(drawn)) == 50
    assert drawn == sorted(drawn)
    assert drawn[0] >= 0
    assert drawn[-1] < 1000
    assert drawn == draw_seed(1000, fraction=0.05, seed=3)
    assert drawn != draw_seed(1000, fraction=0.05, seed=4)


def test_a_draw_smaller_than_the_experts_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match=r"seed_fraction=0.01 of 400 .* 4 seed examples.*8 experts.*0.02"):
        draw_seed(400, fraction=0.01, minimum=8)
    assert len(draw_seed(400, fraction=0.02, minimum=8)) == 8
