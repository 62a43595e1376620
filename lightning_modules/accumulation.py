"""Gradient accumulation by tokens: an optimizer step weighs every response token alike."""

import torch
from torch import Tensor, nn

from upit.core.distributed import world_size
from upit.core.tensors import local


class TokenWindow:
    """The micro-batches of one optimizer step.

    Each loss is a mean over the micro-batch's response tokens. It is weighted by their number, relative to the first
    micro-batch of the window, and the gradients are scaled once at the window's end, when the number of all tokens is
    known. They are then those of the mean over all tokens of the window, on all ranks. Counts stay on the device.
    """

    reference: Tensor  # tokens of the first micro-batch
    tokens: Tensor  # of all so far
    weight: Tensor  # of the micro-batch that was added last

    def __init__(self) -> None:
        self.is_open = False  # within a window, some micro-batches are done

    def add(self, tokens: Tensor, *, first: bool) -> None:
        """Count a micro-batch and set its weight; its backward pass comes next.

        Args:
            tokens: its response tokens, the mean of the ranks' counts, so the same on every rank.
            first: it begins a window.
        """
        if first or not self.is_open:
            self.reference, self.tokens = _at_least_one(tokens), torch.zeros_like(tokens)
        self.tokens = self.tokens + tokens
        self.weight = tokens / self.reference
        self.is_open = True

    def scale(self, module: nn.Module, *, divided_by: int) -> None:
        """Scale the gradients once the last micro-batch is added; the optimizer's step comes next, then :meth:`close`.

        Args:
            divided_by: number that each loss was divided by, as Lightning does by ``accumulate_grad_batches``.
        """
        factor = divided_by * self.reference / _at_least_one(self.tokens)
        grads = [local(param.grad) for param in module.parameters() if param.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)

    def close(self) -> None:
        """The optimizer has stepped."""
        self.is_open = False


def _at_least_one(tokens: Tensor) -> Tensor:
    """At least one token on one rank: a mean over no tokens is 0, not NaN."""
    return tokens.clamp(min=1 / world_size())
