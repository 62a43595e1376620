"""Who gets which seed example."""

import pytest
import torch

from upit.router_init.seeds import LowestPerplexity, RandomAssignment, RelativeLoss


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def perplexity_SN():
    """Expert 2 is the best at everything; each expert is at its own best on a third of the examples."""
    base = torch.tensor([4.0, 3.0, 1.1]).expand(12, 3).clone()
    for s in range(12):
        base[s, s % 3] *= 0.7 if s % 3 < 2 else 0.95
    return base.double()


def test_without_a_capacity_the_best_expert_takes_all(perplexity_SN, generator):
    assert LowestPerplexity(None)(perplexity_SN, generator).tolist() == [2] * 12


def test_capacity_makes_even_buckets(perplexity_SN, generator):
    assert LowestPerplexity()(perplexity_SN, generator).bincount().tolist() == [4, 4, 4]
    assert LowestPerplexity(1.5)(perplexity_SN, generator).bincount(minlength=3).max() == 6


def test_relative_loss_gives_each_what_it_is_at_its_best_on(perplexity_SN, generator):
    assert RelativeLoss()(perplexity_SN, generator).tolist() == [0, 1, 2] * 4


def test_random_is_even_and_blind(perplexity_SN, generator):
    found = RandomAssignment()(perplexity_SN, generator)
    assert found.bincount().tolist() == [4, 4, 4]
    again = RandomAssignment()(perplexity_SN.flip(0), torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


@pytest.mark.parametrize("kind", [LowestPerplexity, RelativeLoss])
def test_refuses(kind, generator):
    with pytest.raises(ValueError, match=r"capacity_factor=0.5 leaves examples without an expert"):
        kind(0.5)
    with pytest.raises(ValueError, match="perplexity is NaN"):
        kind()(torch.tensor([[1.0, torch.nan]]), generator)
