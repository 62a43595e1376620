"""Parameters that may be shards: plain tensors and FSDP2's DTensors alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from upit.core.distributed import all_sum, world_size

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _is_sharded(param: Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor  # takes most of a second, which plain files need not wait for

    return isinstance(param, DTensor)


def local_slices(param: Tensor) -> tuple[slice, ...]:
    """Which part of the whole parameter this rank holds, one slice a dimension."""
    if not _is_sharded(param):
        return tuple(slice(0, size) for size in param.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def local(param: Tensor) -> Tensor:
    """The tensor this rank holds; shares memory with ``param``."""
    return param.to_local() if _is_sharded(param) else param


def with_local(param: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that is sharded as ``param`` is, of which this rank holds ``tensor``; shares its memory if it can."""
    if not _is_sharded(param):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def counts_once(param: Tensor) -> bool:
    """Whether this rank's part counts in a sum over all ranks: of equal replicas of a shard, the first one does."""
    if not _is_sharded(param):
        return True
    place = zip(param.device_mesh.get_coordinate() or (), param.placements, strict=True)
    return all(rank == 0 for rank, placement in place if placement.is_replicate())


def full(param: Tensor) -> Tensor:
    """The whole parameter, detached. A collective for a DTensor: every rank must call it in the same order."""
    param = param.detach()
    return param.full_tensor() if _is_sharded(param) else param


def average_gradients(params: Iterable[Tensor]) -> None:
    """Average gradients over the ranks; FSDP2 has done so for its shards. A collective."""
    for param in params:
        if not _is_sharded(param):
            all_sum(param.grad).div_(world_size())  # type: ignore[arg-type]
