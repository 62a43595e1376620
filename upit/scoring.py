"""Score examples under a model, and seed data under every expert.

The dense model in training is the vehicle: each expert's FFN is copied into it in turn, so no second model is
ever built (Algorithm 3 of UpIT, arXiv:2410.01610).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upit.distributed import all_sum, own_share, rank
from upit.examples import Example, collate, length_grouped
from upit.families import is_expert
from upit.files import read_json, write_json
from upit.forward import response_losses
from upit.losses import grouped_losses
from upit.pool import Expert
from upit.seed_data import assign
from upit.sharding import fill, full

Autocast = Callable[[], AbstractContextManager]


def load_expert(dense: PreTrainedModel, expert: Expert) -> None:
    """Copy an expert's FFN weights into a dense model, each rank its own shard."""
    for name, param in dense.named_parameters():
        if is_expert(name):
            fill(param, expert.get_slice(name))


@torch.no_grad()
def score_examples(
    model: PreTrainedModel,
    indices: Sequence[int],
    dataset: Sequence[Example],
    *,
    pad_id: int,
    max_tokens: int = 8192,
    autocast: Autocast = nullcontext,
    track: Callable[[Iterable], Iterable] = lambda batches: batches,
) -> tuple[Tensor, Tensor]:
    """Response loss of each example under a model; the ranks share the batches.

    Args:
        model: a causal LM, in evaluation mode.
        indices: S examples of ``dataset``.
        pad_id: token for padding.
        max_tokens: size of a batch with its padding.
        track: wraps the batches, for a progress bar.
    Returns: ``loss_S`` (sum over response tokens, nats) and ``tokens_S``, float64, on every rank.
    """
    device = next(model.parameters()).device
    row_of = {index: row for row, index in enumerate(indices)}
    sums = torch.zeros(2, len(indices), dtype=torch.float64, device=device)
    lengths = {index: len(dataset[index]["input_ids"]) for index in indices}
    for group, counts in track(own_share(length_grouped(indices, lengths, max_tokens=max_tokens))):
        batch = to_device(collate([[index] for index in group], dataset, pad_id=pad_id), device)
        with autocast():
            losses_L, targets_L, ids_L = response_losses(model, batch)
        if counts:
            rows_L = torch.tensor([row_of[i] for i in ids_L.tolist()], device=device, dtype=torch.long)
            loss_S, tokens_S = grouped_losses(
                losses_L=losses_L, targets_L=targets_L, groups_L=rows_L, num_groups=len(indices)
            )
            sums += torch.stack([loss_S, tokens_S]).to(sums)
    all_sum(sums)
    return sums[0].cpu(), sums[1].cpu()


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


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


def score_seeds(
    dense: PreTrainedModel,
    experts: Sequence[Expert],
    indices: Sequence[int],
    data,
    *,
    capacity_factor: float | None,
    file: Path,
    autocast: Autocast = nullcontext,
    track: Callable[[Iterable], Iterable] = lambda experts: experts,
) -> Seeds:
    """Perplexity of every expert on every seed example, and who gets which.

    ``file`` is rewritten after each expert, and a later call takes the finished ones from it: experts are known
    by their sha256, the dense model's other weights by their fingerprint.

    Args:
        dense: model in evaluation mode; its FFN is overwritten.
        indices: seed examples in ``data.train_set``.
        data: data module, for ``train_set`` and ``tokenizer``.
        capacity_factor: see :func:`upit.seed_data.assign`.
        file: JSON with example ids, domains, perplexity per expert, and the assigned expert.
    """
    rows = {index: data.train_set[index] for index in indices}
    ids = [rows[index]["id"] for index in indices]
    state = fingerprint(dense)
    finished = _finished_columns(file, ids, state)
    columns: dict[str, list[float]] = {}
    for expert in track(experts):
        if expert.sha256 in columns:
            continue
        if expert.sha256 in finished:
            columns[expert.sha256] = finished[expert.sha256]
            continue
        load_expert(dense, expert)
        loss_S, tokens_S = score_examples(
            dense, indices, data.train_set, pad_id=data.tokenizer.pad_token_id, autocast=autocast
        )
        columns[expert.sha256] = (loss_S / tokens_S).exp().tolist()
        if rank() == 0:
            write_json(file, {"state": state, "ids": ids, "columns": columns})
    perplexity_SN = torch.tensor([columns[expert.sha256] for expert in experts], dtype=torch.float64).T
    expert_S = assign(perplexity_SN, capacity_factor=capacity_factor)
    seeds = Seeds(list(indices), perplexity_SN, expert_S)
    if rank() == 0:
        examples = [
            {"id": rows[i]["id"], "domain": rows[i]["domain"], "perplexity": perplexity, "expert": owner}
            for i, perplexity, owner in zip(indices, perplexity_SN.tolist(), expert_S.tolist(), strict=True)
        ]
        seen = {"state": state, "ids": ids, "columns": columns}
        write_json(file, {"examples": examples, "counts": seeds.counts, **seen})
    return seeds


def _finished_columns(file: Path, ids: list[str], state: str) -> dict[str, list[float]]:
    if not file.exists():
        return {}
    found = read_json(file)
    return found["columns"] if found["ids"] == ids and found["state"] == state else {}


def fingerprint(dense: PreTrainedModel) -> str:
    """Names a state of training by its final norm, which every optimizer step moves. A collective when sharded."""
    norm: Any = dense.model.norm
    content = full(norm.weight).float().cpu().clone()  # numpy would pin a storage that FSDP2 must free
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
