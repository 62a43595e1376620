"""How alike two experts are, by their parameters or by what they get wrong; the paper leaves the measure open.

``M`` experts so far. Every measure is made from inner products, so a new expert adds one row of them.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from upit.core.choice import Strategy
from upit.core.prefetch import ahead
from upit.core.progress import Track, untracked
from upit.preparation.expert import Expert

Score = Callable[[Expert], Tensor]  # losses of an expert on the seed examples, (S,); a collective
PIECE = 1 << 16  # products summed in float32; ours


class Similarity(Strategy):
    """A measure of similarity between experts; higher is more alike."""

    needs_losses = False

    @abstractmethod
    def products(
        self,
        experts: Sequence[Expert],
        new: int,
        base: Expert,
        *,
        score: Score | None = None,
        track: Track = untracked,
    ) -> Tensor:
        """Inner products of the last ``new`` experts with all of them, (new, M) float64."""

    @abstractmethod
    def matrix(self, products: Tensor) -> Tensor:
        """Similarities, (M, M), from all inner products."""


def cosine(products: Tensor) -> Tensor:
    """Cosine similarity; a zero vector is similar to nothing but itself."""
    norms = products.diagonal().clamp(min=0).sqrt()
    return (products / (norms[:, None] * norms[None, :]).clamp(min=1e-30)).fill_diagonal_(1.0)


def negative_distance(products: Tensor) -> Tensor:
    """Minus the Euclidean distance; 0 for equal vectors."""
    squares = products.diagonal()
    return -(squares[:, None] + squares[None, :] - 2 * products).clamp(min=0).sqrt()


def inner_products(experts: Sequence[Expert], names: Iterable[str], *, new: int, base: Expert | None = None) -> Tensor:
    """Inner products of the last ``new`` experts with all of them, (new, M) float64.

    Streams tensor by tensor and reads each expert once. On the CPU holds one float32 tensor of every new expert and of
    one other, twice over; on a GPU two tensors of all experts.

    Args:
        names: the tensors to compare.
        base: compares task vectors from here; None the parameters themselves.
    """

    first, device = len(experts) - new, experts[0].device

    def on_gpu(name: str) -> Tensor:
        from upit.expansion.kernels import products

        tensors = [expert.read(name) for expert in experts]
        return products(tensors, None if base is None else base.read(name), new=new).tril(first)

    def on_cpu(name: str) -> Tensor:
        raw = experts[0].read(name)
        origin_P = torch.zeros((), dtype=torch.float32) if base is None else base.read(name).flatten().float()
        recent_NP = torch.empty(new, raw.numel(), dtype=torch.float32)
        one_P = torch.empty(raw.numel(), dtype=torch.float32)

        def delta(expert: Expert, room_P: Tensor) -> Tensor:
            room = raw if expert.tensors[name].dtype == raw.dtype else None  # of checkpoints from elsewhere
            return room_P.copy_(expert.read(name, out=room).flatten()).sub_(origin_P)

        for expert, room_P in zip(experts[first:], recent_NP, strict=True):
            delta(expert, room_P)
        products = torch.zeros(new, len(experts), dtype=torch.float64)
        for i, expert in enumerate(experts):
            other_P = delta(expert, one_P) if i < first else recent_NP[i - first]
            for row in range(max(0, i - first), new):
                products[row, i] = _dot(recent_NP[row], other_P)
        return products

    zero = torch.zeros(new, len(experts), dtype=torch.float64, device=device)
    products = sum(ahead(on_gpu if device.type == "cuda" else on_cpu, names), start=zero).cpu()
    among_new = products[:, first:]
    among_new += among_new.tril(-1).T
    return products


def _dot(a_P: Tensor, b_P: Tensor) -> float:
    """Inner product, summed in float32 over a piece and in float64 over the pieces.

    For a few long vectors one matrix product of all of them is slower, and less exact (docs/performance.md).
    """
    return sum(float(torch.dot(a, b)) for a, b in zip(a_P.split(PIECE), b_P.split(PIECE), strict=True))


class _OfParameters(Similarity):
    """Of all expert parameters."""

    against: Literal["base", "zero"] = "base"

    def products(self, experts, new, base, *, score=None, track=untracked):
        names = track(base.shapes, "(similarity)")
        return inner_products(experts, names, new=new, base=base if self.against == "base" else None)


class Cosine(_OfParameters):
    """Cosine of the experts' task vectors over all their parameters; default ours, not the paper's.

    Args:
        against: "base" compares the task vectors, "zero" the parameters themselves.
    """

    def __init__(self, against: Literal["base", "zero"] = "base") -> None:
        self.against = against

    def matrix(self, products):
        return cosine(products)


class Euclidean(_OfParameters):
    """Minus the Euclidean distance of the experts' parameters, which is that of their task vectors."""

    def matrix(self, products):
        return negative_distance(products)


class Functional(Similarity):
    """Agreement in function: minus the root mean square difference of two experts' losses over the seed examples.

    Losses are in nats a response token. Scores every expert and every new child on the seed data.
    """

    needs_losses = True

    def products(self, experts, new, base, *, score=None, track=untracked):
        if score is None:
            raise ValueError("similarity Functional compares losses on seed data, and there is no model to score here")
        losses_MS = torch.stack([score(expert) for expert in track(experts, "(similarity)")]).double()
        return losses_MS[-new:] @ losses_MS.T / losses_MS.shape[1]

    def matrix(self, products):
        return negative_distance(products)
