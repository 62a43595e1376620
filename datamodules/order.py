"""The order of the rows in an epoch. Every order takes each row once, and follows from seed and epoch alone."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from typing_extensions import override


class Order(ABC):
    """An order of ``count`` rows, another in each epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed

    @abstractmethod
    def __call__(self, epoch: int) -> np.ndarray:
        """The places of the rows, in order. At most the last incomplete batch of a domain is left out."""

    def __len__(self) -> int:
        return self.count


class Shuffled(Order):
    """All rows at random: the order of torch's ``DistributedSampler``."""

    @override
    def __call__(self, epoch: int) -> np.ndarray:
        return torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()


class DomainBlocks(Order):
    """One domain after the other, the domains permuted anew in each epoch, the rows of a domain shuffled.

    A block is whole batches, so that no step mixes two domains and blocks of equal size end at harvest points that
    divide the epoch by the number of domains. The rows that fill no batch of their domain are left out, others in each
    epoch.

    Args:
        domains: domain of each row.
        batch_rows: rows of a batch over all devices.
    """

    def __init__(self, domains: np.ndarray, seed: int, *, batch_rows: int) -> None:
        counts = np.bincount(domains)
        super().__init__(int((counts // batch_rows * batch_rows).sum()), seed)
        self.domains = domains
        self.batch_rows = batch_rows

    @override
    def __call__(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        blocks = []
        for domain in generator.permutation(np.unique(self.domains)):
            own = generator.permutation(np.flatnonzero(self.domains == domain))
            blocks.append(own[: len(own) // self.batch_rows * self.batch_rows])
        return np.concatenate([np.empty(0, np.int64), *blocks])


class Drifting(Order):
    """The mixture changes linearly: each domain's weight rises to its peak and falls again, one peak after the other.

    The domains' peaks are permuted anew in each epoch and spread evenly over it. A part ``floor`` of each domain's
    rows is spread over the whole epoch, so that no domain is ever absent.

    Args:
        domains: domain of each row.
        floor: 1 is the shuffled order; ours.
    """

    def __init__(self, domains: np.ndarray, seed: int, *, floor: float) -> None:
        super().__init__(len(domains), seed)
        self.domains = domains
        self.floor = floor

    @override
    def __call__(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        names = generator.permutation(np.unique(self.domains))
        times = generator.random(len(self.domains))
        width = 1 / max(1, len(names) - 1)
        for number, domain in enumerate(names if len(names) > 1 else []):
            drifts = np.flatnonzero((self.domains == domain) & (generator.random(len(self.domains)) >= self.floor))
            times[drifts] = _tent(generator, len(drifts), peak=number * width, width=width)
        return np.argsort(times, kind="stable")


def _tent(generator: np.random.Generator, count: int, *, peak: float, width: float) -> np.ndarray:
    """Times within (0, 1) whose density falls linearly from ``peak`` to nothing at ``width`` from it."""
    offsets = (1 - np.sqrt(generator.random(count))) * width
    if peak - width < 0:
        return peak + offsets
    if peak + width > 1 + 1e-9:
        return peak - offsets
    return peak + offsets * generator.choice([-1, 1], count)
