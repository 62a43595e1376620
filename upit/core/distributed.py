"""Collectives that are nothing in a single process."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gathered(value: T) -> list[T]:
    """Every rank's value, on every rank, by rank."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank; the others wait."""
    return broadcast(compute() if rank() == 0 else None)  # type: ignore[return-value]


def own_share(batches: Sequence[T]) -> list[tuple[T, bool]]:
    """This rank's part of ``batches``, the same number on every rank.

    Returns: (batch, counts): ``counts`` is False for a batch repeated only to keep the ranks in step.
    """
    size, own = world_size(), rank()
    rounds = -(-len(batches) // size)
    picks = [step * size + own for step in range(rounds)]
    return [(batches[min(i, len(batches) - 1)], i < len(batches)) for i in picks]
