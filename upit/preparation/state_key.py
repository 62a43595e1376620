"""Keys of what a result depends on beside choices and experts: the state of a model in training, and examples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from upit import __version__
from upit.core.distributed import all_sum
from upit.core.files import digest
from upit.core.tensors import counts_once, local, local_slices
from upit.model.families import is_expert

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upit.core.batches import Example

PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements hashed at a time; ours
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
ROW, COLUMN = -7046029254386353131, -4417276706812531889  # odd 64-bit constants of splitmix64 and xxHash
FACTORS = (-4658895280553007687, -7723592293110705685)  # of splitmix64


def state_key(model: PreTrainedModel, autocast: Callable[[], AbstractContextManager] = nullcontext) -> str:
    """Key of all parameters of a dense model that belong to no expert, and of the precision of its passes.

    The same for equal values on any number of processes, sharded or not. A collective where it is sharded.

    Args:
        autocast: context of the passes.
    """
    params = {name: param for name, param in model.named_parameters() if not is_expert(name)}
    kind = next(model.parameters()).device.type
    with autocast():
        precision = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
    about = {name: [str(param.dtype), *param.shape] for name, param in params.items()}
    return digest([__version__, precision, about, content_sums(params)])


def content_sums(params: Mapping[str, Tensor]) -> dict[str, int]:
    """A weighted sum of each parameter's elements, computed on its device; a collective where they are sharded.

    Elements are their bits as integers, weights are 64-bit numbers that depend on the place, and the sum is modulo
    2**64. It is exact, so it depends on no order of addition, and the sums of shards add up to that of the whole.
    """
    sums = torch.stack([_content_sum(param) for param in params.values()])
    whole = torch.tensor([local(param) is param for param in params.values()], device=sums.device)
    if not whole.all():
        sums = torch.where(whole, sums, all_sum(torch.where(whole, 0, sums)))
    return dict(zip(params, sums.tolist(), strict=True))


@torch.no_grad()
def _content_sum(param: Tensor) -> Tensor:
    """The sum over this rank's shard."""
    own, where = local(param).detach(), local_slices(param) or (slice(0, 1),)
    total = torch.zeros((), dtype=torch.int64, device=own.device)
    if not own.numel() or not counts_once(param):
        return total
    bits_RC = own.contiguous().view(-1).view(BITS[own.element_size()]).view(where[0].stop - where[0].start, -1)
    column_C = torch.zeros(1, dtype=torch.int64, device=own.device)
    for size, part in zip(param.shape[1:], where[1:], strict=True):
        column_C = (column_C[:, None] * size + torch.arange(part.start, part.stop, device=own.device)).flatten()
    weight_R = _weights(torch.arange(where[0].start, where[0].stop, device=own.device), ROW)
    weight_C = _weights(column_C, COLUMN)
    rows = max(1, PIECE.get(own.device.type, PIECE["cpu"]) // len(column_C))
    for piece_RC, piece_R in zip(bits_RC.split(rows), weight_R.split(rows), strict=True):
        total += (piece_RC.to(torch.int64, copy=True).mul_(weight_C).sum(1) * piece_R).sum()
    return total


def _weights(place: Tensor, factor: int) -> Tensor:
    """Odd 64-bit numbers that look random (the steps of splitmix64)."""
    mixed = (place + 1) * factor
    mixed = (mixed ^ (mixed >> 30)) * FACTORS[0]
    mixed = (mixed ^ (mixed >> 27)) * FACTORS[1]
    return mixed ^ (mixed >> 31) | 1


def examples_key(examples: Iterable[Example]) -> str:
    """Key of the token ids and labels of examples, in their order."""
    content = hashlib.sha256()
    for example in examples:
        columns: Sequence[Any] = (example["input_ids"], example["labels"])
        for column in columns:
            content.update(len(column).to_bytes(8, "little"))
            content.update(np.asarray(column, dtype=np.int64).tobytes())
    return content.hexdigest()
