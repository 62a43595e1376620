"""Seed data: draw it from the training set, and give each example to an expert (arXiv:2410.01610, Algorithm 3)."""

import math

import torch
from torch import Tensor


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

    Without a capacity the last checkpoint tends to win nearly every example. Policy for full buckets (ours): examples
    choose in the order of what a second choice would cost them, the largest gap between their best and second-best
    log-perplexity first.

    Args:
        perplexity_SN: (seed examples, experts).
        capacity_factor: an expert takes at most ``ceil(capacity_factor * S / N)`` examples; None for no limit. Ours.
    Returns: (S,) int64, the expert of each example.
    Raises: ValueError: capacity_factor below 1, or a perplexity that is no number.
    """
    num_seeds, num_experts = perplexity_SN.shape
    if perplexity_SN.isnan().any():
        raise ValueError("perplexity is NaN for some expert and seed example: an expert's weights are broken")
    if capacity_factor is None or num_experts == 1:
        return perplexity_SN.argmin(dim=1)
    if capacity_factor < 1.0:
        raise ValueError(f"capacity_factor={capacity_factor} leaves examples without an expert; use at least 1")
    room = [math.ceil(capacity_factor * num_seeds / num_experts)] * num_experts
    logs_SN = perplexity_SN.double().log()
    ranked = logs_SN.sort(dim=1, stable=True)
    gap_S = ranked.values[:, 1] - ranked.values[:, 0]
    expert_S = torch.empty(num_seeds, dtype=torch.long)
    for s in gap_S.argsort(descending=True, stable=True).tolist():
        expert = next(e for e in ranked.indices[s].tolist() if room[e] > 0)
        expert_S[s] = expert
        room[expert] -= 1
    return expert_S
