"""Score examples under a model, and seed data under every expert.

Each expert's FFN is copied into the dense model in turn, which is borrowed from training, so no second model is
ever built (Algorithm 3 of UpIT, arXiv:2410.01610).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upit.core.batches import Batch, Example, collate, length_grouped, to_device
from upit.core.distributed import all_sum, on_rank_zero, own_share, rank
from upit.core.files import SEEDS_VERSION, read_sealed, seeded, write_sealed
from upit.core.finite import NotFiniteError
from upit.core.progress import Autocast
from upit.model.forward import ffn_inputs_of, response_losses, response_states
from upit.model.losses import grouped_losses
from upit.preparation.checks import checked_assignment
from upit.preparation.expert import Expert
from upit.preparation.placement import borrowed, load_experts
from upit.preparation.state_key import examples_key, state_key
from upit.router_init.seeds import Assignment

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BATCH_TOKENS = 8192  # of a batch of seed examples, its padding counted; ours
GPU_BATCH_TOKENS = 32768  # the same where the host takes longer to launch a pass than the GPU to run it; ours
MAX_LOSS = 700.0  # nats a token, of which the perplexity is still a float64


class SeedBatches:
    """This rank's share of some examples, collated once for all experts.

    Args:
        indices: S examples of ``dataset``.
        pad_id: token for padding.
        device: of the batches.
    """

    def __init__(
        self, indices: Sequence[int], dataset: Sequence[Example], *, pad_id: int, device: torch.device
    ) -> None:
        self.size, self.device = len(indices), device
        row_of = torch.full((max(indices) + 1,), -1)
        row_of[torch.tensor(indices)] = torch.arange(self.size)
        lengths = {index: len(dataset[index]["input_ids"]) for index in indices}
        most = GPU_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS
        self.batches: list[tuple[Batch, Tensor | None]] = []  # and the row in S of each response token, if they count
        for group, counts in own_share(length_grouped(indices, lengths, max_tokens=most)):
            batch = collate([[index] for index in group], dataset, pad_id=pad_id)
            rows_L = row_of[batch["example_ids"].flatten()[batch["predictors"]]].to(device) if counts else None
            self.batches.append((to_device(batch, device), rows_L))


@torch.no_grad()
def score_examples(
    model: PreTrainedModel, examples: SeedBatches, *, autocast: Autocast = nullcontext
) -> tuple[Tensor, Tensor]:
    """Response loss of each example under a model; the ranks share the batches.

    Args:
        model: a causal LM, in evaluation mode.
    Returns: ``loss_S`` (sum over response tokens, nats) and ``tokens_S``, float64, on every rank.
    """
    sums = torch.zeros(2, examples.size, dtype=torch.float64, device=examples.device)
    for batch, rows_L in examples.batches:
        with autocast():
            losses_L, targets_L, _ = response_losses(model, batch)
        if rows_L is not None:
            loss_S, tokens_S = grouped_losses(
                losses_L=losses_L, targets_L=targets_L, groups_L=rows_L, num_groups=examples.size
            )
            sums += torch.stack([loss_S, tokens_S]).to(sums)
    all_sum(sums)
    return sums[0].cpu(), sums[1].cpu()


@torch.no_grad()
def ffn_inputs_by_example(
    dense: PreTrainedModel,
    indices: Sequence[int],
    dataset: Sequence[Example],
    *,
    pad_id: int,
    autocast: Autocast = nullcontext,
    track: Callable[[Iterable], Iterable] = lambda batches: batches,
    inputs_of: Callable[[PreTrainedModel], AbstractContextManager[list[Tensor]]] = ffn_inputs_of,
) -> Iterator[tuple[int, Tensor]]:
    """What enters the FFN of each layer at each token of an example; a collective.

    Args: as for :class:`SeedBatches`; ``track`` wraps the batches, for a progress bar; ``inputs_of`` collects the
        states, by default those that enter the FFNs.
    Yields: the index of an example of this rank's share, and its (D, N, H) hidden states.
    """
    device = next(dense.parameters()).device
    lengths = {index: len(dataset[index]["input_ids"]) for index in indices}
    for group, counts in track(own_share(length_grouped(indices, lengths, max_tokens=BATCH_TOKENS))):
        batch = to_device(collate([[index] for index in group], dataset, pad_id=pad_id), device)
        with autocast(), inputs_of(dense) as inputs:
            response_states(dense, batch)
        for row, index in enumerate(group if counts else []):
            yield index, torch.stack([h_BTH[row, : lengths[index]] for h_BTH in inputs])


@dataclass
class Seeds:
    """Seed data, scored and assigned."""

    indices: list[int]  # into the training set
    perplexity_SN: Tensor  # (examples, experts), float64
    expert_S: Tensor  # the expert each example is assigned to

    def bucket(self, expert: int) -> list[int]:
        """The seed examples assigned to an expert."""
        return [index for index, owner in zip(self.indices, self.expert_S.tolist(), strict=True) if owner == expert]

    @property
    def counts(self) -> list[int]:
        """Examples of each expert."""
        return torch.bincount(self.expert_S, minlength=self.perplexity_SN.shape[1]).tolist()


class SeedScorer:
    """Perplexity of experts on the seed examples; a collective.

    Each expert is scored once, known by its sha256. ``file`` is rewritten after each. A later scorer takes from it
    what was found for the same tokens and labels of the examples, the same other weights of the dense model, and the
    same precision. A damaged file is not used, and a warning says so.

    Args:
        dense: borrowed while experts are scored, see :func:`upit.preparation.placement.borrowed`.
        indices: seed examples in ``data.train_set``.
        data: data module, for ``train_set`` and ``tokenizer``.
        file: JSON with example ids, domains, perplexity per expert, and the assigned expert.
    """

    def __init__(
        self, dense: PreTrainedModel, indices: Sequence[int], data, *, file: Path, autocast: Autocast = nullcontext
    ) -> None:
        self.dense, self.data, self.file, self.autocast = dense, data, file, autocast
        self.indices = list(indices)
        self.rows = [data.train_set[index] for index in indices]
        self.seen: dict[str, Any] = {
            "version": SEEDS_VERSION,
            "state": state_key(dense, autocast),
            "content": examples_key(self.rows),
            "columns": {},
        }
        self.seen["columns"] = on_rank_zero(self._finished)

    def _finished(self) -> dict[str, list[float]]:
        """Perplexities of an earlier scorer by the expert's sha256, where they are of the same examples and state."""
        if not self.file.exists():
            return {}
        try:
            found = read_sealed(self.file, SEEDS_VERSION, "the seed examples are scored again")
        except ValueError as error:
            warnings.warn(f"{error}. The seed examples are scored again", stacklevel=2)
            return {}
        same = all(found[key] == self.seen[key] for key in ("state", "content"))
        return found["columns"] if same else {}

    def perplexities(
        self, experts: Sequence[Expert], *, track: Callable[[Iterable], Iterable] = lambda experts: experts
    ) -> list[list[float]]:
        """Perplexity of each expert on each seed example."""
        columns = self.seen["columns"]
        missing = {expert.sha256: expert for expert in experts if expert.sha256 not in columns}
        with borrowed(self.dense) if missing else nullcontext():
            loading = load_experts(self.dense, list(missing.values()))
            for expert in track(experts):
                if expert.sha256 not in columns:
                    next(loading)
                    columns[expert.sha256] = self._perplexity(expert)
                    if rank() == 0:
                        write_sealed(self.file, self.seen, indent=None)
        return [columns[expert.sha256] for expert in experts]

    def _perplexity(self, expert: Expert) -> list[float]:
        """Perplexity on each seed example of the expert that stands in the dense model."""
        loss_S, tokens_S = score_examples(self.dense, self._batches, autocast=self.autocast)
        losses_S = loss_S / tokens_S
        if not losses_S.isfinite().all():
            raise NotFiniteError(
                f"{str(expert.file)!r}: this expert's loss on a seed example is NaN or infinite: its weights are "
                "broken, or trainer.precision is too narrow for it. Leave it out, or choose another merge"
            )
        return losses_S.clamp(max=MAX_LOSS).exp().tolist()

    @cached_property
    def _batches(self) -> SeedBatches:
        pad_id, device = self.data.tokenizer.pad_token_id, next(self.dense.parameters()).device
        return SeedBatches(self.indices, self.data.train_set, pad_id=pad_id, device=device)

    def losses(self, expert: Expert) -> Tensor:
        """Mean response loss of an expert on each seed example, nats a token, (S,) float64."""
        return torch.tensor(self.perplexities([expert])[0], dtype=torch.float64).log()

    def assign(
        self,
        experts: Sequence[Expert],
        assignment: Assignment,
        *,
        seed: int = 0,
        track: Callable[[Iterable], Iterable] = lambda experts: experts,
    ) -> Seeds:
        """Who gets which seed example; writes the whole of ``file``."""
        perplexity_SN = torch.tensor(self.perplexities(experts, track=track), dtype=torch.float64).T
        expert_S = assignment(perplexity_SN, seeded(seed, "assignment"))
        expert_S = checked_assignment(assignment, expert_S, *perplexity_SN.shape)
        seeds = Seeds(self.indices, perplexity_SN, expert_S)
        without = [expert for expert, count in enumerate(seeds.counts) if not count]
        if without and rank() == 0:
            warnings.warn(f"{assignment.class_path} gives no seed example to the experts {without}", stacklevel=2)
        if rank() == 0:
            examples = [
                {"id": row["id"], "domain": row["domain"], "perplexity": perplexity, "expert": owner}
                for row, perplexity, owner in zip(
                    self.rows, perplexity_SN.tolist(), seeds.expert_S.tolist(), strict=True
                )
            ]
            about = {"counts": seeds.counts, "assignment": assignment.describe()}
            write_sealed(self.file, {**self.seen, "examples": examples, **about})
        return seeds
