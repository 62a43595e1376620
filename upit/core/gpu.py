"""What is there of a GPU, and copies from it that the host does not wait for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

CPU = torch.device("cpu")
HAS_TRITON = find_spec("triton") is not None


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """On a GPU, what is done within waits for none of its other work, and is complete at the end."""
    if device.type != "cuda":
        yield
        return
    stream = _stream_beside(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@lru_cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def host_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the host's memory, pinned for a GPU's tensor, which then still is on its way.

    What changes the tensor later in the same stream changes it after the copy.
    """
    copy = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def wait_for_copies() -> Callable[[], None]:
    """What to call, in any thread, before the copies made so far are read."""
    if not torch.cuda.is_available():
        return lambda: None
    copied = torch.cuda.Event()
    copied.record()
    return copied.synchronize
