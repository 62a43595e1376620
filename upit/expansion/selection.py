"""Which experts become parents, and which checkpoints become experts when there are more of them than experts.

``M`` experts so far.
"""

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from upit.core.choice import Strategy
from upit.preparation.expert import Expert

Pair = tuple[int, int]


class Parents(Strategy):
    """Choose the next two parents from the growing pool.

    A pair has one child (ours: else the same pair would be chosen for ever); once every pair has one, all are free
    again.
    """

    def check(self, metrics: Sequence[Collection[str]]) -> None:
        """Refuse settings that could not choose; called before the run.

        Args:
            metrics: for each expert, the names of the metrics that it comes with.
        Raises: ValueError: too few experts come with what the choice is made by.
        """
        return

    def choose(
        self,
        similarity: Tensor,
        experts: Sequence[Expert],
        *,
        used: set[Pair] | frozenset[Pair] = frozenset(),
        generator: torch.Generator,
    ) -> Pair:
        """The free pair of lowest cost, j < k.

        Args:
            similarity: (M, M).
            used: pairs that have a child.
        """
        cost = self.cost(similarity, experts, generator)
        size = len(experts), len(experts)
        if tuple(cost.shape) != size or cost.isnan().any():
            found = f"shape {tuple(cost.shape)}, or NaN"
            raise ValueError(f"{self.class_path}.cost returned {found}: expected a number for each pair, {size}")
        pairs = [(j, k) for k in range(len(experts)) for j in range(k)]
        free = [pair for pair in pairs if pair not in used] or pairs
        return min(free, key=lambda pair: (float(cost[pair]), pair))

    @abstractmethod
    def cost(self, similarity: Tensor, experts: Sequence[Expert], generator: torch.Generator) -> Tensor:
        """Cost of each pair, (M, M)."""


class MostDissimilar(Parents):
    """The two that differ most (arXiv:2410.01610, Algorithm 2)."""

    def cost(self, similarity, experts, generator):
        return similarity


class MostSimilar(Parents):
    """The two most alike: the control."""

    def cost(self, similarity, experts, generator):
        return -similarity


class RandomParents(Parents):
    """Any two, each free pair as likely as the next (the paper's "random parents")."""

    def cost(self, similarity, experts, generator):
        return torch.rand(similarity.shape, generator=generator, dtype=torch.float64)


class BestParents(Parents):
    """The two with the best mean of a metric noted at their harvest.

    A pair of which one has no such metric, as merged experts have none, comes after all pairs that have it, in the
    order of the other's; a pair without any comes last.

    Args:
        metric: name of a logged metric, such as "val/loss".
        mode: whether a low or a high one is good.
    """

    def __init__(self, metric: str, mode: Literal["min", "max"] = "min") -> None:
        self.metric = metric
        self.mode = mode

    def check(self, metrics):
        found, others = sum(self.metric in names for names in metrics), sorted(set().union(*metrics))
        if found < 2:
            who = f"only 1 of {len(metrics)} experts comes" if found else "no expert comes"
            raise ValueError(
                f"BestParents.metric={self.metric!r}: {who} with it, only with {others}. At least 2 experts need it: "
                "choose another metric, or validate before the second harvest"
            )

    def cost(self, similarity, experts, generator):
        sign = 1.0 if self.mode == "min" else -1.0
        cost = torch.tensor(
            [sign * expert.metrics.get(self.metric, math.nan) for expert in experts], dtype=torch.float64
        )
        known = cost[cost.isfinite()]
        if len(known) < 2:
            raise ValueError(
                f"BestParents.metric={self.metric!r}: {len(known)} of {len(experts)} experts have it; 2 are needed"
            )
        behind = known.max() + 2 * (known.max() - known.min()) + 1  # behind every pair that has it
        cost = torch.where(cost.isfinite(), cost, behind)
        return cost[:, None] + cost[None, :]


class Selection(Strategy):
    """Which of M checkpoints become experts when fewer are wanted; the paper leaves it open."""

    @abstractmethod
    def choose(self, similarity: Tensor, num_experts: int) -> list[int]:
        """Positions of ``num_experts`` of the M checkpoints, in order.

        Args:
            similarity: (M, M), checkpoints by step.
        """


class Even(Selection):
    """Evenly spaced, the last included."""

    def choose(self, similarity, num_experts):
        return [round((i + 1) * len(similarity) / num_experts) - 1 for i in range(num_experts)]


class LastCheckpoints(Selection):
    """The last ones."""

    def choose(self, similarity, num_experts):
        return list(range(len(similarity) - num_experts, len(similarity)))


class MostDiverse(Selection):
    """The last, then each time the one whose highest similarity to those chosen is lowest."""

    def choose(self, similarity, num_experts):
        chosen = [len(similarity) - 1]
        while len(chosen) < num_experts:
            rest = [i for i in range(len(similarity)) if i not in chosen]
            chosen.append(min(rest, key=lambda i: float(similarity[i, chosen].max())))
        return sorted(chosen)
