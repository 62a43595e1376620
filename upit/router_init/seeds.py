"""Seed data: draw it from the training set, and give each example to an expert (arXiv:2410.01610, Algorithm 3).

``S`` seed examples, ``N`` experts.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from upit.core.choice import Strategy


def draw_seed(num_examples: int, *, fraction: float = 0.01, seed: int = 0, minimum: int = 1) -> list[int]:
    """Indices of the seed examples, sorted.

    Args:
        num_examples: size of the training set.
        fraction: part to draw; 0.01 is the paper's.
        minimum: fewest that will do: one an expert.
    Raises: ValueError: the fraction gives fewer than ``minimum``.
    """
    count = round(num_examples * fraction)
    if count < minimum:
        raise ValueError(
            f"seed_fraction={fraction} of {num_examples} training examples gives {count} seed examples, fewer than "
            f"the {minimum} experts; raise it to {minimum / max(1, num_examples):.3g} or more"
        )
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(num_examples, generator=generator)[:count].tolist())


def assign(perplexity_SN: Tensor, *, capacity_factor: float | None = 1.0) -> Tensor:
    """Give each seed example to the expert with the lowest perplexity that still has room.

    Policy for full buckets (ours): examples choose in the order of what a second choice would cost them, the largest
    gap between their best and second-best log-perplexity first.

    Args:
        perplexity_SN: of every expert on every seed example.
        capacity_factor: an expert takes at most ``ceil(capacity_factor * S / N)`` examples; None for no limit.
    Returns: (S,) int64, the expert of each example.
    Raises: ValueError: capacity_factor below 1, or a perplexity that is no number.
    """
    num_seeds, num_experts = perplexity_SN.shape
    if perplexity_SN.isnan().any():
        raise ValueError("perplexity is NaN for some expert and seed example: an expert's weights are broken")
    check_capacity(capacity_factor)
    if capacity_factor is None or num_experts == 1:
        return perplexity_SN.argmin(dim=1)
    room = [math.ceil(capacity_factor * num_seeds / num_experts)] * num_experts
    ranked = perplexity_SN.double().log().sort(dim=1, stable=True)
    gap_S = ranked.values[:, 1] - ranked.values[:, 0]
    expert_S = torch.empty(num_seeds, dtype=torch.long)
    for s in gap_S.argsort(descending=True, stable=True).tolist():
        expert = next(e for e in ranked.indices[s].tolist() if room[e] > 0)
        expert_S[s] = expert
        room[expert] -= 1
    return expert_S


def check_capacity(capacity_factor: float | None) -> None:
    """Raises: ValueError: the buckets together can't hold every example."""
    if capacity_factor is not None and capacity_factor < 1.0:
        raise ValueError(
            f"capacity_factor={capacity_factor} leaves examples without an expert; at least 1, or null for no limit"
        )


class Assignment(Strategy):
    """Who gets which seed example."""

    @abstractmethod
    def __call__(self, perplexity_SN: Tensor, generator: torch.Generator) -> Tensor:
        """The expert of each example, (S,) int64."""


class LowestPerplexity(Assignment):
    """The expert with the lowest perplexity (arXiv:2410.01610, Algorithm 3) that still has room.

    Args:
        capacity_factor: room of an expert's bucket over an even share; null for no limit, and then the last checkpoint
            tends to win nearly every example. Ours, as is the policy of :func:`assign` for full buckets.
    """

    def __init__(self, capacity_factor: float | None = 1.0) -> None:
        check_capacity(capacity_factor)
        self.capacity_factor = capacity_factor

    def __call__(self, perplexity_SN, generator):
        return assign(perplexity_SN, capacity_factor=self.capacity_factor)


class RelativeLoss(Assignment):
    """The expert whose loss on the example is lowest against its own mean loss (ours).

    What counts is on which examples an expert is better than it is on average, so the best checkpoint does not take
    all.

    Args:
        capacity_factor: as for :class:`LowestPerplexity`.
    """

    def __init__(self, capacity_factor: float | None = None) -> None:
        check_capacity(capacity_factor)
        self.capacity_factor = capacity_factor

    def __call__(self, perplexity_SN, generator):
        typical_N = perplexity_SN.double().log().mean(0).exp()
        return assign(perplexity_SN / typical_N, capacity_factor=self.capacity_factor)


class RandomAssignment(Assignment):
    """Even buckets of random examples: the paper's negative control, worse than no initialisation at all."""

    def __call__(self, perplexity_SN, generator):
        num_seeds, num_experts = perplexity_SN.shape
        return (torch.arange(num_seeds) % num_experts)[torch.randperm(num_seeds, generator=generator)]
