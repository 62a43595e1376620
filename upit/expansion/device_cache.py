"""Experts whose tensors stay on a GPU from one pass of an expansion to the next."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from upit.core.gpu import CPU, HAS_TRITON
from upit.core.prefetch import ahead
from upit.core.tensor_files import Specs, size_of
from upit.preparation.expert import Expert
from upit.preparation.pool import recorded, write_once

WRITERS = 4  # files at a time; a file's sha256 takes one core longer than merging takes the GPU; ours


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
        self._writers = ThreadPoolExecutor(WRITERS)
        self._files: dict[Path, Future[str]] = {}

    def read(self, expert: Expert, name: str) -> Tensor:
        """One tensor on the device; if it is not there yet, by way of pinned memory."""
        key = (expert.file, expert.names[name] if expert.names else name)
        if key in self._kept:
            return self._kept[key]
        tensor = expert.tensors.read(name, device=self.device)
        with self._lock:
            if tensor.nbytes <= self._free:
                self._free -= tensor.nbytes
                self._kept[key] = tensor
        return tensor

    def write_once(self, file: Path, tensors: Iterable[tuple[str, Tensor]], specs: Specs, fingerprint: str) -> None:
        """:func:`upit.preparation.pool.write_once` of tensors on the device, in the background; they stay there if all
        can.
        """
        if size_of(specs) <= self._free and not recorded(file, fingerprint):
            tensors = list(tensors)
            with self._lock:
                self._free -= size_of(specs)
                self._kept |= {(file, name): tensor for name, tensor in tensors}
        content = ahead(lambda pair: (pair[0], self._on_host(pair[1])), tensors)
        self._files[file] = self._writers.submit(write_once, file, content, specs, fingerprint)

    def wait_for(self, file: Path) -> None:
        """Wait until a file of :meth:`write_once` is complete."""
        if file in self._files:
            self._files[file].result()

    def written(self, track: Callable[..., Iterable[Path]]) -> dict[Path, str]:
        """sha256 of all files of :meth:`write_once`, once they are complete."""
        return {file: self._files[file].result() for file in track(self._files, "(writing)")}

    def close(self) -> None:
        """Let the files be complete."""
        self._writers.shutdown()

    def _on_host(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)


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
    if not HAS_TRITON:
        raise ValueError(f"{field}={name!r} needs Triton: pip install triton, or use cpu")
    return torch.device("cuda", int(index) if index else torch.cuda.current_device())


def usual_device(training_on: torch.device, shapes: Mapping[str, tuple[int, ...]], num_experts: int) -> str:
    """The GPU that trains, where experts of these shapes can be expanded on it; else the CPU."""
    if training_on.type != "cuda" or not HAS_TRITON:
        return "cpu"
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(training_on)
    return "cuda" if free > working_memory(shapes, num_experts) else "cpu"


@contextmanager
def residence_on(
    device: torch.device, shapes: Mapping[str, tuple[int, ...]], num_experts: int, *, alone: bool
) -> Iterator[Residence | None]:
    """A GPU's residence for as many tensors as its free memory holds beside the work on two; None on the CPU.

    Args:
        alone: nothing else needs memory in the meantime; else no tensor stays.
    """
    if device.type == "cpu":
        yield None
        return
    torch.cuda.empty_cache()  # what is left to the allocator then is the CUDA graphs', and no one else's
    free, _ = torch.cuda.mem_get_info(device)
    budget = free - working_memory(shapes, num_experts) if alone else 0
    with closing(Residence(device, budget)) as residence:
        yield residence


def working_memory(shapes: Mapping[str, tuple[int, ...]], num_experts: int) -> int:
    """Bytes of two tensors at a time: the task vectors of all experts in float32, or what a merge holds (TIES: twelve
    times one).
    """
    largest = max(math.prod(shape) for shape in shapes.values())
    return 2 * 4 * largest * max(num_experts + 3, 12)
