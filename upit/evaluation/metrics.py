"""Metrics of torchmetrics: weighted means, and who gets which tokens, with what is read off the counts.

Shapes: ``N`` named means; ``D`` layers, ``E`` experts, ``C`` domains, ``S`` held-out examples, ``T`` tokens,
``K`` experts a token, ``R`` labellings of the examples, the true one first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from upit.model.losses import assignment_counts

DEAD_BELOW = 0.01  # of an even share; ours


class WeightedMeans(Metric):
    """Weighted mean of each of N named values over batches and ranks: terms of a loss, losses of the domains.

    An update adds to sums on the device and waits for nothing. The ranks exchange them at ``compute``, all names in
    one tensor; N metrics would exchange two each.
    """

    full_state_update = False
    totals_2N: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        self.add_state("totals_2N", torch.zeros(2, len(names), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn, exclude_state=""):
        # under bf16-true Lightning casts the whole module, by a call that torchmetrics' own guard does not know
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    def update(self, sums_N: Tensor, weights_N: Tensor) -> None:
        """Add values, each times its weight, and the weights."""
        self.totals_2N += torch.stack([sums_N, weights_N])

    def compute(self) -> dict[str, Tensor]:
        """Returns: the mean of each name that has a weight on any rank, on the CPU."""
        sums_N, weights_N = self.totals_2N.cpu()
        return {name: sums_N[n] / weights_N[n] for n, name in enumerate(self.names) if weights_N[n] > 0}

    def totals(self, earlier_2N: Tensor | None = None) -> dict[str, list[float]]:
        """Sum and weight of each name so far, or as they were earlier, of this rank, for a checkpoint."""
        totals_2N = self.totals_2N if earlier_2N is None else earlier_2N
        return dict(zip(self.names, totals_2N.T.tolist(), strict=True))

    def restore(self, totals: Mapping[str, Sequence[float]]) -> None:
        """Go on from :meth:`totals`; a name that is not there starts at nothing."""
        found = torch.tensor([totals.get(name, (0.0, 0.0)) for name in self.names], dtype=torch.float64)
        self.totals_2N = found.T.to(self.totals_2N.device)


def load(counts: Tensor) -> Tensor:
    """Each expert's load over an even one, (..., E) from counts (..., E, C): 1.0 is even."""
    total = counts.double().sum(-1)
    return total * total.shape[-1] / total.sum(-1, keepdim=True).clamp(min=1)


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the load over ``log E``, (...) from counts (..., E, C): 1.0 is even, 0.0 is one expert for all."""
    share = load(counts) / counts.shape[-2]
    return torch.special.entr(share).sum(-1) / torch.tensor(max(2, counts.shape[-2]), dtype=torch.float64).log()


def dead_experts(counts: Tensor) -> Tensor:
    """Number of experts that get less than ``DEAD_BELOW`` of an even share, (...) from counts (..., E, C)."""
    return (load(counts) < DEAD_BELOW).sum(-1)


def domain_shares(counts: Tensor) -> Tensor:
    """Share of each domain's assignments that an expert gets; sums to 1 over the experts (dimension -2)."""
    return counts.double() / counts.sum(-2, keepdim=True).clamp(min=1)


def mutual_information(counts: Tensor) -> Tensor:
    """Mutual information of expert and domain in bits, (...) from counts (..., E, C).

    0 where every domain uses the experts alike. Between few examples it is above 0 by chance: compare it with the
    shuffled baseline of :class:`DomainRouting`.
    """
    joint = counts.double() / counts.sum((-2, -1), keepdim=True).clamp(min=1)
    entropies = [torch.special.entr(p).sum(-1) for p in (joint.sum(-1), joint.sum(-2), joint.flatten(-2))]
    return (entropies[0] + entropies[1] - entropies[2]) / torch.tensor(2.0, dtype=torch.float64).log()


class ExpertLoad(Metric):
    """Assignments by layer and expert, summed over the ranks; counted on the device, read at ``compute``."""

    full_state_update = False
    counts_DE: Tensor

    def __init__(self, num_layers: int, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        counts_DE = torch.zeros(num_layers, num_experts, dtype=torch.float64)
        self.add_state("counts_DE", counts_DE, dist_reduce_fx="sum")

    def update(self, expert_ids_DTK: Tensor, weight_T: Tensor) -> None:
        """Count a batch; a token counts by its weight."""
        self.counts_DE += assignment_counts(expert_ids_DTK, weight_T, self.counts_DE.shape[1])

    def compute(self) -> Tensor:
        """Returns: the counts, (D, E), on the CPU."""
        return self.counts_DE.cpu()


class DomainRouting(Metric):
    """Assignments by layer, expert and domain, summed over the ranks; counted on the device, read at ``compute``.

    The baseline shuffles the domains of whole examples, not of tokens: tokens of one example go together, so only
    that says what examples that have nothing in common would give.

    Args:
        num_layers, num_experts: D, E.
        domains: domain of each of the S examples, 0 to C - 1.
        num_domains: C.
        shuffles: shuffled labellings to average over; ours.
        seed: of the shuffles, the same on every rank.
    """

    full_state_update = False
    counts_RDEC: Tensor
    onehot_RSC: Tensor

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        domains: Sequence[int],
        num_domains: int,
        shuffles: int = 8,
        seed: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        generator = torch.Generator().manual_seed(seed)
        true_S = torch.tensor(domains)
        orders = [torch.randperm(len(domains), generator=generator) for _ in range(shuffles)]
        labels_RS = torch.stack([true_S, *[true_S[order] for order in orders]])
        # the last column is padding's (example -1): a domain of none
        self.register_buffer("onehot_RSC", F.pad(F.one_hot(labels_RS, num_domains).float(), (0, 0, 0, 1)), False)
        shape = (1 + shuffles, num_layers, num_experts, num_domains)
        self.add_state("counts_RDEC", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, expert_ids: Sequence[Tensor], example_ids_T: Tensor) -> None:
        """Count a batch.

        Args:
            expert_ids: one (T, K) tensor a layer, the router's choice.
            example_ids_T: index of each token's example; ``PADDING`` (-1) does not count.
        """
        labels_RTC = self.onehot_RSC[:, example_ids_T]
        num_experts = self.counts_RDEC.shape[2]
        for layer, ids_TK in enumerate(expert_ids):
            hits_TE = torch.zeros(len(ids_TK), num_experts, dtype=torch.float32, device=ids_TK.device)
            hits_TE.scatter_(1, ids_TK, 1.0)
            self.counts_RDEC[:, layer] += torch.einsum("te,rtc->rec", hits_TE, labels_RTC).round().long()

    def compute(self) -> dict[str, Tensor]:
        """Returns: ``counts_DEC``, and ``shuffled_D``: mean mutual information of the shuffled labellings, in bits."""
        return {
            "counts_DEC": self.counts_RDEC[0],
            "shuffled_D": mutual_information(self.counts_RDEC[1:]).mean(0),
        }


def summary(counts_DEC: Tensor, shuffled_D: Tensor) -> dict[str, float]:
    """The routing in a few numbers: means over the layers, the dead experts summed, the highest load of all."""
    return {name: float(number(counts_DEC, shuffled_D)) for name, number in SUMMARY.items()}


SUMMARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "load_entropy": lambda counts_DEC, _: load_entropy(counts_DEC).mean(),
    "max_load": lambda counts_DEC, _: load(counts_DEC).max(),
    "dead_experts": lambda counts_DEC, _: dead_experts(counts_DEC).sum(),
    "mutual_information": lambda counts_DEC, _: mutual_information(counts_DEC).mean(),
    "mutual_information_shuffled": lambda _, shuffled_D: shuffled_D.mean(),
}
