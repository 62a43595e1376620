"""Numbers that are not finite: found in weights before they are saved, and in losses without waiting for a GPU."""

import math
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from upit.core.gpu import host_copy, wait_for_copies
from upit.core.tensors import local

LAG = 4  # values that may be on their way from a GPU; ours


class NotFiniteError(ValueError):
    """A loss, a gradient or a weight is NaN or infinite."""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; of shards, this rank's part is looked at.

    One pass over the values. The host waits once, and a second time for the names.
    """
    parts = {name: local(tensor.detach()) for name, tensor in tensors.items() if tensor.is_floating_point()}
    parts = {name: part for name, part in parts.items() if part.numel()}
    largest = torch.nn.utils.get_total_norm(parts.values(), math.inf)
    return [] if math.isfinite(largest) else [name for name, part in parts.items() if not part.isfinite().all()]


class FiniteWatch:
    """Looks at scalars for NaN and infinity. On a GPU the host reads them a little later and so does not wait.

    Args:
        fail: called with a value's name and step if it is not finite; raises.
    """

    def __init__(self, fail: Callable[[str, int], None]) -> None:
        self._fail = fail
        self._pending: deque[tuple[str, int, Tensor, Callable[[], None]]] = deque()
        self._failed: tuple[str, int] | None = None

    def add(self, name: str, step: int, value: Tensor) -> None:
        """Look at a value: at once on a CPU, on a GPU when ``LAG`` more were added.

        All processes read the same values at the same time, so they fail together.
        """
        self._pending.append((name, step, host_copy(value.detach(), torch.float32), wait_for_copies()))
        self._read(down_to=LAG if value.is_cuda else 0)

    def settle(self) -> None:
        """Look at all values so far; waits for them. Fails again where one was not finite before."""
        self._read(down_to=0)
        if self._failed is not None:
            self._fail(*self._failed)

    def _read(self, *, down_to: int) -> None:
        while len(self._pending) > down_to:
            name, step, value, wait = self._pending.popleft()
            wait()
            if not math.isfinite(value):
                self._failed = self._failed or (name, step)
                self._fail(*self._failed)
