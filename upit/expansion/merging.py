"""Parameter merging: functions of tensors of any shape, and the strategies made of them.

All but :func:`slerp` and :func:`trim` are elementwise, so a shard merges as the whole does.
"DARE" and "TIES" differ between libraries. Here DARE is peft's (``peft.utils.merge_utils``) and TIES mergekit's with
``normalize: true``, both on task vectors.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from upit.core.choice import Strategy
from upit.core.gpu import CPU


def task_vector(tensor: Tensor, base: Tensor) -> Tensor:
    """What training added to the base (arXiv:2212.04089), in float32."""
    return tensor.to(torch.float32, copy=True).sub_(base)


def seed_from(generator: torch.Generator) -> int:
    """A seed for another generator."""
    return int(torch.randint(2**62, (), generator=generator))


def drop_mask(shape: torch.Size, drop_rate: float, generator: torch.Generator, device: torch.device = CPU) -> Tensor:
    """Random mask of DARE: True keeps a parameter, with probability ``1 - drop_rate`` to within 2**-17.

    On the CPU drawn 16 bits a parameter from a SFC64 stream that the generator seeds, since ``torch.rand`` is slow
    (docs/performance.md). Another device has a generator of its own, and so other masks.
    """
    seed = seed_from(generator)
    if device != CPU:
        own = torch.Generator(device).manual_seed(seed)
        return torch.rand(shape, generator=own, device=device, dtype=torch.float32) >= drop_rate
    bits = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4)).view(np.uint16)[: shape.numel()]
    return torch.from_numpy(bits >= round(drop_rate * 2**16)).view(shape)


def drop_and_rescale(delta: Tensor, drop_rate: float, mask: Tensor) -> Tensor:
    """DARE (arXiv:2311.03099, eq. 2-3): drop parameters of a task vector, rescale the rest by ``1 / (1 - p)``."""
    return delta * mask / (1.0 - drop_rate)


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the ``density`` share of largest magnitude, at least one; the rest is zero (arXiv:2306.01708, step 1)."""
    kept = delta.abs().flatten().topk(max(1, int(density * delta.numel()))).indices
    trimmed = torch.zeros_like(delta).flatten()
    trimmed[kept] = delta.flatten()[kept]
    return trimmed.view_as(delta)


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum, in float32."""
    return sum(
        (w * t.float() for w, t in zip(weights, tensors, strict=True)), start=torch.zeros((), dtype=torch.float32)
    )


def disjoint_merge(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Elect each parameter's sign by the weighted sum of the task vectors, then average those that agree with it.

    Steps 2 and 3 of TIES (arXiv:2306.01708) with weights, as mergekit 0.1.5 has them with ``normalize: true``: the
    weighted sum of the vectors that agree is divided by the sum of their weights. So a parameter that only one vector
    keeps is taken as it is, whatever that vector's weight. A vector that is zero there does not take part.
    """
    shape = (-1, *[1] * deltas[0].ndim)
    weights_M = torch.tensor(weights, dtype=deltas[0].dtype, device=deltas[0].device).view(shape)
    weighted = torch.stack(list(deltas)) * weights_M
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == sign
    total = (weights_M * agrees).sum(0)
    return (weighted * agrees).sum(0) / torch.where(total == 0, 1.0, total)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical interpolation from a to b over the whole tensor, in float32 (Shoemake 1985).

    Linear where the two point the same way (cosine above 0.9995, mergekit's threshold), or one of them is zero.
    """
    a, b = a.float(), b.float()
    norms = a.norm() * b.norm()
    cosine = (a * b).sum() / norms if norms > 0 else torch.ones((), dtype=torch.float32)
    if cosine.abs() > 0.9995:
        return linear([a, b], [1 - t, t])
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


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
    origin = base.float()
    total = origin.clone()
    for tensor, weight, mask in zip(tensors, weights, masks, strict=True):
        # torch multiplies by bytes six times as fast as by booleans
        total.add_(task_vector(tensor, origin).mul_(mask.view(torch.uint8)), alpha=weight / (1.0 - drop_rate))
    return total.to(tensors[0].dtype)


class Merge(Strategy):
    """How two parents become a child: expansion's crossover and mutation, one tensor at a time."""

    @abstractmethod
    def __call__(
        self, tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Merge one tensor of every parent.

        Args:
            tensors: the parents', of one shape.
            weights: alpha and beta, which sum to 1.
            base: the same tensor of the model that task vectors start from.
            generators: one a parent, seeded for this tensor.
        Returns: the child's tensor, in the dtype of the first parent.
        """


def check_drop_rate(owner: Merge, drop_rate: float) -> None:
    """Raises: ValueError: outside [0, 1)."""
    if not 0.0 <= drop_rate < 1.0:
        raise ValueError(f"{type(owner).__name__}.drop_rate={drop_rate} must lie in [0, 1)")


class Linear(Merge):
    """The parents' weighted sum: crossover without mutation."""

    def __call__(self, tensors, weights, base, generators):
        return linear(tensors, weights).to(tensors[0].dtype)


class Slerp(Merge):
    """Spherical interpolation of two parents.

    Args:
        against: "base" turns the task vectors; "zero" the parameters themselves, which for checkpoints of one run all
            but point the same way, so that the child is the linear one. Default ours.
    """

    def __init__(self, against: Literal["base", "zero"] = "base") -> None:
        self.against = against

    def __call__(self, tensors, weights, base, generators):
        origin = base.float() if self.against == "base" else torch.zeros((), dtype=torch.float32)
        a, b = (task_vector(tensor, origin) for tensor in tensors)
        return (origin + slerp(a, b, weights[1])).to(tensors[0].dtype)


class Ties(Merge):
    """TIES (arXiv:2306.01708): trim the task vectors, elect signs, average what agrees.

    mergekit's ``ties`` (``normalize: true``, its default). The paper has no weights: here they count in the election
    and in the average. Until November 2026 this was peft's ``ties`` with weights of mean 1, which multiplied a
    parameter that one parent alone keeps by twice that parent's weight.

    Args:
        density: share of each tensor's task vector that is kept, in (0, 1]; 0.2 is that paper's.
    """

    def __init__(self, density: float = 0.2) -> None:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"Ties.density={density} must lie in (0, 1]")
        self.density = density

    def __call__(self, tensors, weights, base, generators):
        deltas = [trim(task_vector(tensor, base), self.density) for tensor in tensors]
        return (base.float() + disjoint_merge(deltas, weights)).to(tensors[0].dtype)


class Dare(Merge):
    """DARE (arXiv:2311.03099), UpIT's mutation: drop and rescale the task vectors, then sum them by weight.

    Args:
        drop_rate: p, in [0, 1); 0.2 is ours, not the paper's.
    """

    def __init__(self, drop_rate: float = 0.2) -> None:
        check_drop_rate(self, drop_rate)
        self.drop_rate = drop_rate

    def __call__(self, tensors, weights, base, generators):
        if base.is_cuda:
            from upit.expansion.kernels import dare

            return dare(tensors, weights, base, drop_rate=self.drop_rate, seed=seed_from(generators[0]))
        masks = [drop_mask(base.shape, self.drop_rate, generator) for generator in generators]
        return dare_linear(tensors, weights, base, drop_rate=self.drop_rate, masks=masks)


class DareTies(Merge):
    """DARE's random drop in place of TIES' trim, then signs and average as in :class:`Ties`.

    mergekit's ``dare_ties`` with ``normalize: true`` (there off by default), but rescaled by ``1 / (1 - p)`` as DARE
    is, not by the L1 norm. What one parent alone keeps counts in full, so where both parents agree the child moves
    ``1 + p`` times as far as they do on average. Until November 2026 this was peft's ``dare_ties`` with weights of
    mean 1.

    Args:
        drop_rate: p, in [0, 1); ours.
    """

    def __init__(self, drop_rate: float = 0.2) -> None:
        check_drop_rate(self, drop_rate)
        self.drop_rate = drop_rate

    def __call__(self, tensors, weights, base, generators):
        masks = [drop_mask(base.shape, self.drop_rate, generator, base.device) for generator in generators]
        deltas = [
            drop_and_rescale(task_vector(t, base), self.drop_rate, m) for t, m in zip(tensors, masks, strict=True)
        ]
        return (base.float() + disjoint_merge(deltas, weights)).to(tensors[0].dtype)
