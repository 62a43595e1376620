"""UpIT's router initialisation: routing vectors pre-optimised on each expert's own seed bucket (arXiv:2410.01610)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upit.core.batches import IGNORE, PADDING, Batch, Example, collate, to_device
from upit.core.distributed import all_sum, barrier, on_rank_zero, own_share, rank, world_size
from upit.core.files import digest
from upit.core.progress import Autocast
from upit.core.tensor_files import TensorFiles
from upit.core.tensors import average_gradients
from upit.model.families import is_expert
from upit.model.forward import ffn_inputs_of, response_losses
from upit.preparation.expert import Expert
from upit.preparation.placement import borrowed, load_experts, write_ffn
from upit.preparation.pool import finished, record, write_expert
from upit.preparation.state_key import examples_key, state_key
from upit.router_init.base import RouterInit
from upit.router_init.scoring import Seeds, ffn_inputs_by_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATES_BYTES = 4 * 2**30  # of hidden states kept for a bucket, over all ranks; ours


class RoutingVectors(RouterInit):
    """Routing vectors pre-optimised on each expert's own seed bucket (arXiv:2410.01610).

    ``L = alpha * L_lm + (1 - alpha) * BCE(sigmoid(h . r), 1)``, h the hidden state that enters the FFN. Every finished
    expert is kept in ``directory`` under a fingerprint of all it depends on, and reused.

    Args:
        alpha, epochs: 0.5 and 4 are the paper's.
        lr: of the vectors, AdamW; ours.
        expert_lr: train each expert along with its vectors, at this rate; null trains the vectors alone, and then
            ``L_lm`` has nothing to move. Ours; the paper's text can be read both ways.
        batch_size: seed examples a step, over all ranks; ours.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        epochs: int = 4,
        lr: float = 1e-3,
        expert_lr: float | None = None,
        batch_size: int = 8,
    ) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"RoutingVectors.alpha={alpha} must lie in [0, 1]")
        for field, value in (("epochs", epochs), ("lr", lr), ("batch_size", batch_size), ("expert_lr", expert_lr)):
            if value is not None and value <= 0:
                raise ValueError(f"RoutingVectors.{field}={value} must be positive")
        self.alpha = alpha
        self.epochs = epochs
        self.lr = lr
        self.expert_lr = expert_lr
        self.batch_size = batch_size

    @property
    def trains_experts(self):
        return self.expert_lr is not None

    def __call__(self, dense, experts, seeds, data, *, directory, seed=0, autocast=nullcontext, track=iter):
        with borrowed(dense):
            return self._initialise(dense, experts, seeds, data, directory, seed, autocast, track)

    def _initialise(self, dense, experts, seeds, data, directory, seed, autocast, track):
        keys, done, vectors = self._keys(dense, experts, seeds, data, seed, autocast), [], []
        found = [on_rank_zero(partial(self._finished, directory, i, key)) for i, key in enumerate(keys)]
        loading = load_experts(dense, [expert for expert, sha256 in zip(experts, found, strict=True) if not sha256])
        for i, expert in enumerate(track(experts)):
            file, sha256 = directory / f"expert_{i:02d}.safetensors", found[i]
            if sha256:
                vectors.append(TensorFiles(_vector_file(directory, i)).read("vectors"))
            else:
                next(loading)
                vectors.append(self._optimise(dense, seeds.bucket(i), data, seed + i, autocast))
                if self.expert_lr:
                    sha256 = write_ffn(dense, file, keys[i])
                if rank() == 0:
                    _keep(vectors[-1], _vector_file(directory, i), keys[i])
                barrier()
            done.append(replace(expert, file=file, sha256=sha256) if self.expert_lr else expert)
        return done, torch.stack(vectors, dim=1)

    def _keys(self, dense, experts: Sequence[Expert], seeds: Seeds, data, seed: int, autocast: Autocast) -> list[str]:
        """All that each expert's vectors depend on; a collective."""
        common = [self.key(), seed, state_key(dense, autocast)]
        buckets = [[data.train_set[index] for index in seeds.bucket(i)] for i in range(len(experts))]
        return [digest([e.sha256, examples_key(rows), *common]) for e, rows in zip(experts, buckets, strict=True)]

    def _finished(self, directory: Path, i: int, key: str) -> str | None:
        """sha256 of the finished expert, or of its vectors where only they are trained; None if a file is missing."""
        vectors = finished(_vector_file(directory, i), key)
        return finished(directory / f"expert_{i:02d}.safetensors", key) if vectors and self.expert_lr else vectors

    def _optimise(self, dense, bucket: list[int], data, seed: int, autocast: Autocast) -> Tensor:
        return optimise_routing_vectors(
            dense,
            bucket,
            data.train_set,
            pad_id=data.tokenizer.pad_token_id,
            alpha=self.alpha,
            epochs=self.epochs,
            lr=self.lr,
            expert_lr=self.expert_lr,
            batch_size=self.batch_size,
            seed=seed,
            autocast=autocast,
        ).cpu()


def _vector_file(directory: Path, i: int) -> Path:
    return directory / f"vectors_{i:02d}.safetensors"


def _keep(vectors_DH: Tensor, file: Path, key: str) -> None:
    specs = {"vectors": (vectors_DH.dtype, tuple(vectors_DH.shape))}
    record(file, key, write_expert(file, [("vectors", vectors_DH)], specs))


def routing_loss(states_DNH: Tensor, vectors_DH: Tensor, *, denominator: Tensor | float) -> Tensor:
    """``L_aux = BCE(sigmoid(h . r), 1)``, mean over tokens and layers (arXiv:2410.01610).

    Args:
        states_DNH: what enters the FFN of each layer at N real tokens.
        vectors_DH: the expert's routing vector in each layer.
        denominator: number of real tokens to average over.
    """
    scores_DN = torch.einsum("dnh,dh->dn", states_DNH.float(), vectors_DH)
    return F.softplus(-scores_DN).sum() / (denominator * len(vectors_DH))


def optimise_routing_vectors(
    dense: PreTrainedModel,
    bucket: Sequence[int],
    dataset: Sequence[Example],
    *,
    pad_id: int,
    alpha: float = 0.5,
    epochs: int = 4,
    lr: float = 1e-3,
    expert_lr: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Pre-optimise one expert's routing vectors on its own seed bucket.

    ``L = alpha * L_lm + (1 - alpha) * L_aux``. The expert's FFN already stands in ``dense``. While the expert stays as
    it is, so do the hidden states: they are computed once for all epochs where they fit in ``STATES_BYTES``.

    Args:
        bucket: indices of the seed examples that the expert got; empty gives the starting vectors.
        alpha, epochs: 0.5 and 4 are the paper's.
        lr: of the vectors, AdamW; ours, not the paper's.
        expert_lr: train the expert's FFN too, in place, at this rate; None leaves it as it is (the paper's
            text can be read both ways), and then ``L_lm`` has nothing to move.
        batch_size: examples a step over all ranks; ours.
        seed: starting vectors (normal, std 0.02, Mixtral's own) and order of the examples.
    Returns: (layers, H) float32, on the model's device.
    """
    config: Any = dense.config
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_hidden_layers, config.hidden_size)
    start = torch.randn(shape, generator=generator, dtype=torch.float32) * config.initializer_range
    vectors_DH = nn.Parameter(start.to(next(dense.parameters()).device))
    groups: list[dict[str, Any]] = [{"params": [vectors_DH], "lr": lr}]
    experts = [param for name, param in dense.named_parameters() if is_expert(name)] if expert_lr else []
    if experts:
        groups.append({"params": experts, "lr": expert_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=False)

    def states_of(indices: Sequence[int]) -> dict[int, Tensor]:
        return dict(ffn_inputs_by_example(dense, indices, dataset, pad_id=pad_id, autocast=autocast))

    tokens = sum(len(dataset[index]["input_ids"]) for index in bucket)
    kept = states_of(bucket) if not experts and 4 * tokens * vectors_DH.numel() <= STATES_BYTES else None
    for _ in range(epochs):
        order = [bucket[i] for i in torch.randperm(len(bucket), generator=generator).tolist()]
        for start_at in range(0, len(order), batch_size):
            indices = order[start_at : start_at + batch_size]
            dense.zero_grad()  # every parameter gets a gradient, FSDP2 can't freeze some mid-run; only experts step
            vectors_DH.grad = None
            if experts:
                batch = to_device(_rank_rows(indices, dataset, pad_id), vectors_DH.device)
                loss = _joint_loss(dense, batch, vectors_DH, alpha=alpha, autocast=autocast)
            else:
                states = states_of(indices) if kept is None else {i: kept[i] for i in indices if i in kept}
                states_DNH = torch.cat([vectors_DH.new_empty(shape[0], 0, shape[1]), *states.values()], dim=1)
                count = sum(len(dataset[index]["input_ids"]) for index in indices) / world_size()
                loss = (1 - alpha) * routing_loss(states_DNH, vectors_DH, denominator=count)
            loss.backward()
            average_gradients([vectors_DH, *experts])
            optimizer.step()
    dense.zero_grad()
    return vectors_DH.detach()


def _joint_loss(
    dense: PreTrainedModel, batch: Batch, vectors_DH: Tensor, *, alpha: float, autocast: Autocast
) -> Tensor:
    """``L`` of an expert that trains along with its vectors; its mean over the ranks is that of all their tokens."""
    mask_BT = batch["example_ids"] != PADDING
    with autocast(), ffn_inputs_of(dense) as inputs:
        losses_L, targets_L, _ = response_losses(dense, batch)
    share = all_sum(torch.stack([mask_BT.sum(), (targets_L != IGNORE).sum()])) / world_size()
    states_DNH = torch.stack([h_BTH[mask_BT] for h_BTH in inputs])
    auxiliary = routing_loss(states_DNH, vectors_DH, denominator=share[0])
    return alpha * losses_L.sum() / share[1] + (1 - alpha) * auxiliary


def _rank_rows(indices: Sequence[int], dataset: Sequence[Example], pad_id: int) -> Batch:
    """This rank's rows of a batch; the rows repeated to keep the ranks in step are fully masked."""
    share = own_share(indices)
    batch = collate([[index] for index, _ in share], dataset, pad_id=pad_id)
    for row, (_, counts) in enumerate(share):
        if not counts:
            batch["labels"][row] = IGNORE
            batch["example_ids"][row] = PADDING
    return batch
