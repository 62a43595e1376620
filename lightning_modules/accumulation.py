"""Gradient accumulation by tokens: an optimizer step weighs every response token alike."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from upit.distributed import world_size
from upit.sharding import local


class TokenWindow:
    """The micro-batches of one optimizer step.

    Each loss is a mean over the micro-batch's response tokens. It is weighted by their number, relative to the first
    micro-batch of the window, and the gradients are scaled once at the window's end, when the number of all tokens is
    known. They are then those of the mean over all tokens of the window, on all ranks. Counts stay on the device.
    """

    def __init__(self) -> None:
        self._reference: Tensor | None = None  # tokens of the first micro-batch
        self._tokens: Tensor | None = None  # of all so far

    def add(self, tokens: Tensor, *, first: bool) -> Tensor:
        """Count a micro-batch.

        Args:
            tokens: its response tokens, the mean of the ranks' counts, so the same on every rank.
            first: it begins a window.
        Returns: what its loss is multiplied by.
        """
        if first or self._reference is None or self._tokens is None:
            self._reference, self._tokens = _at_least_one(tokens), torch.zeros_like(tokens)
        self._tokens = self._tokens + tokens
        return tokens / self._reference

    def close(self, params: Iterable[nn.Parameter], *, divided_by: int) -> None:
        """Scale the gradients of a window whose last micro-batch was added.

        Args:
            params: those with gradients; shards are scaled by each rank.
            divided_by: number that each loss was divided by, as Lightning does by ``accumulate_grad_batches``.
        """
        assert self._reference is not None and self._tokens is not None
        factor = divided_by * self._reference / _at_least_one(self._tokens)
        grads = [local(param.grad) for param in params if param.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
        self._reference = self._tokens = None


def _at_least_one(tokens: Tensor) -> Tensor:
    """At least one token on one rank: a mean over no tokens is 0, not NaN."""
    return tokens.clamp(min=1 / world_size())
