"""Gradient accumulation by tokens: an optimizer step weighs every response token alike."""

from collections.abc import Mapping
from typing import Any

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

    reference: Tensor  # tokens of the first micro-batch
    tokens: Tensor  # of all so far
    weight: Tensor  # of the micro-batch that was added last

    def __init__(self) -> None:
        self.is_open = False  # within a window, some micro-batches are done
        self._is_whole = True  # the gradients are those of the counted micro-batches

    def add(self, tokens: Tensor, *, first: bool) -> None:
        """Count a micro-batch and set its weight; its backward pass comes next, then :meth:`added`.

        Args:
            tokens: its response tokens, the mean of the ranks' counts, so the same on every rank.
            first: it begins a window.
        """
        if first or not self.is_open:
            self.reference, self.tokens = _at_least_one(tokens), torch.zeros_like(tokens)
        self.tokens = self.tokens + tokens
        self.weight = tokens / self.reference
        self.is_open, self._is_whole = True, False

    def added(self) -> None:
        """The micro-batch's gradients are complete."""
        self._is_whole = True

    def scale(self, module: nn.Module, *, divided_by: int) -> None:
        """Scale the gradients once the last micro-batch is added; the optimizer's step comes next, then :meth:`close`.

        Args:
            divided_by: number that each loss was divided by, as Lightning does by ``accumulate_grad_batches``.
        """
        self._is_whole = False
        factor = divided_by * self.reference / _at_least_one(self.tokens)
        grads = [local(param.grad) for param in module.parameters() if param.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)

    def close(self) -> None:
        """The optimizer has stepped."""
        self.is_open, self._is_whole = False, True

    # --- checkpoints within a window -----------------------------------------------------------------

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The open window for a checkpoint, its gradients included; without them where they can't be restored."""
        if world_size() > 1 or not self._is_whole:
            return {"gradients": None}
        grads = {name: param.grad.cpu() for name, param in module.named_parameters() if param.grad is not None}
        return {"gradients": grads, "tokens": self.tokens.cpu(), "reference": self.reference.cpu()}

    def load_state_dict(self, state: Mapping[str, Any], module: nn.Module) -> None:
        """Go on within the window of a checkpoint."""
        for name, param in module.named_parameters():
            if name in state["gradients"]:
                param.grad = state["gradients"][name].to(param.device)
                self.tokens, self.reference = (state[key].to(param.device) for key in ("tokens", "reference"))
        self.is_open = True


def _at_least_one(tokens: Tensor) -> Tensor:
    """At least one token on one rank: a mean over no tokens is 0, not NaN."""
    return tokens.clamp(min=1 / world_size())
