"""Parameter merging as functions of tensors of any shape; elementwise, so a shard merges as the whole does."""

from collections.abc import Sequence

import torch
from torch import Tensor


def task_vector(tensor: Tensor, base: Tensor) -> Tensor:
    """What training added to the base (arXiv:2212.04089), in float32."""
    return tensor.float() - base.float()


def drop_mask(shape: torch.Size, drop_rate: float, generator: torch.Generator) -> Tensor:
    """Random mask of DARE: True keeps a parameter, with probability ``1 - drop_rate``."""
    return torch.rand(shape, generator=generator, dtype=torch.float32) >= drop_rate


def drop_and_rescale(delta: Tensor, drop_rate: float, mask: Tensor) -> Tensor:
    """DARE (arXiv:2311.03099, eq. 2-3): drop parameters of a task vector, rescale the rest by ``1 / (1 - p)``."""
    return delta * mask / (1.0 - drop_rate)


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum, in float32."""
    return sum(
        (w * t.float() for w, t in zip(weights, tensors, strict=True)), start=torch.zeros((), dtype=torch.float32)
    )


def dare_linear(
    tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor, *, drop_rate: float, masks: Sequence[Tensor]
) -> Tensor:
    """DARE, then a weighted sum of the task vectors, added to the base.

    UpIT's mutation ``E_new = DARE(alpha * E_j, beta * E_k)`` (arXiv:2410.01610, Algorithm 2). On the task vectors it
    is peft's ``dare_linear``, which rescales by the density too.

    Args:
        tensors: parents' parameters, of one shape.
        weights: alpha, beta.
        base: where the task vectors start.
        drop_rate: p, in [0, 1).
        masks: one a parent, True keeps.
    Returns: in the dtype of the first parent.
    """
    deltas = [drop_and_rescale(task_vector(t, base), drop_rate, mask) for t, mask in zip(tensors, masks, strict=True)]
    return (base.float() + linear(deltas, weights)).to(tensors[0].dtype)
