"""Experts whose tensors stay on a GPU from one pass of an expansion to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from upit.pool import Expert

CPU = torch.device("cpu")


class Residence:
    """Tensors of experts that stay on a device.

    Args:
        device: where they go.
        budget: bytes to keep there; what is beyond them is read from its file each time, as on the CPU.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device = device
        self._free = budget
        self._kept: dict[tuple[Path, str], Tensor] = {}  # by file and name in it
        self._lock = Lock()

    def read(self, expert: Expert, name: str) -> Tensor:
        """One tensor on the device; if it is not there yet, by way of pinned memory."""
        key = (expert.file, expert.names[name] if expert.names else name)
        if key in self._kept:
            return self._kept[key]
        entry = expert.tensors[name]
        tensor = expert.tensors.read(name, out=self._staging(entry.shape, entry.dtype), device=self.device)
        self._keep(key, tensor)
        return tensor

    def write(self, file: Path, name: str, tensor: Tensor) -> Tensor:
        """Keep a tensor that is going to be in a file.

        Returns: the same on the host.
        """
        self._keep((file, name), tensor)
        return self._staging(tensor.shape, tensor.dtype).copy_(tensor)

    def _keep(self, key: tuple[Path, str], tensor: Tensor) -> None:
        with self._lock:
            if tensor.nbytes <= self._free:
                self._free -= tensor.nbytes
                self._kept[key] = tensor

    def _staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory to copy from and to; torch keeps what was pinned for the next tensor."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")


def checked_device(name: str, field: str) -> torch.device:
    """The device of that name; a bare "cuda" is the process's own GPU.

    Raises: ValueError: it is neither the CPU nor a GPU that is there, or Triton is missing; names the field.
    """
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"{field}={name!r} is no device that experts can be expanded on; use cpu, cuda or cuda:N")
    if kind == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise ValueError(f"{field}={name!r}: no CUDA device is here; use cpu")
    if int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{field}={name!r}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if find_spec("triton") is None:
        raise ValueError(f"{field}={name!r} needs Triton: pip install triton, or use cpu")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def residence_on(device: torch.device, shapes: Mapping[str, tuple[int, ...]], num_experts: int) -> Residence | None:
    """A GPU's residence for as many tensors as its free memory holds beside the work on two; None on the CPU."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Residence(device, free - working_memory(shapes, num_experts))


def working_memory(shapes: Mapping[str, tuple[int, ...]], num_experts: int) -> int:
    """Bytes of two tensors at a time: the task vectors of all experts in float32, or what a merge holds (TIES: twelve
    times one).
    """
    largest = max(math.prod(shape) for shape in shapes.values())
    return 2 * 4 * largest * max(num_experts + 3, 12)
