"""Routers from hidden states of the seed data, without training: their mean, or a ridge regression on them.

``D`` layers, ``E`` experts, ``H`` hidden, ``N`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from upit.distributed import all_sum, own_share
from upit.examples import PADDING, collate, length_grouped
from upit.families import is_expert
from upit.forward import ffn_inputs_of, response_states
from upit.pool import Expert
from upit.router_init.base import RouterInit
from upit.scoring import Autocast, Seeds, to_device
from upit.sharding import local, local_slices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 8192  # with padding


@torch.no_grad()
def load_mean(dense: PreTrainedModel, experts: Sequence[Expert]) -> None:
    """Copy the mean of the experts' FFNs into a dense model, each rank its own shard."""
    for name, param in dense.named_parameters():
        if is_expert(name):
            where = local_slices(param)
            local(param).copy_(torch.stack([expert.get_slice(name)[where].float() for expert in experts]).mean(0))


@torch.no_grad()
def _visit(
    dense: PreTrainedModel,
    seeds: Seeds,
    data,
    consume: Callable[[Sequence[Tensor], Tensor], None],
    *,
    autocast: Autocast,
    track: Callable[[Iterable], Iterable],
) -> None:
    """Hand over the FFN inputs of the seed data, batch by batch, each rank its own share.

    Args:
        consume: takes one (N, H) float32 tensor a layer and the expert of each token, (N,).
    """
    device = next(dense.parameters()).device
    owner = dict(zip(seeds.indices, seeds.expert_S.tolist(), strict=True))
    lengths = {index: len(data.train_set[index]["input_ids"]) for index in seeds.indices}
    for group, counts in track(own_share(length_grouped(seeds.indices, lengths, max_tokens=BATCH_TOKENS))):
        batch = collate([[index] for index in group], data.train_set, pad_id=data.tokenizer.pad_token_id)
        batch = to_device(batch, device)
        with autocast(), ffn_inputs_of(dense) as inputs:
            response_states(dense, batch)
        if counts:
            mask_BT = batch["example_ids"] != PADDING
            owner_BT = torch.tensor([owner[index] for index in group], device=device)[:, None].expand_as(mask_BT)
            consume([h_BTH[mask_BT].float() for h_BTH in inputs], owner_BT[mask_BT])


class HiddenMean(RouterInit):
    """Each expert's row is the direction of its bucket's mean hidden state (mergekit-moe's "hidden" mode).

    The hidden states are those that enter each FFN, of the dense model with the mean of the experts' FFNs: the same
    model for every bucket (ours). Rows have unit norm; an expert without seed examples gets zeros.
    """

    def __call__(self, dense, experts, seeds, data, *, directory, seed=0, autocast=nullcontext, track=iter):
        load_mean(dense, experts)
        shape = (dense.config.num_hidden_layers, len(experts), dense.config.hidden_size)
        sums_DEH = torch.zeros(shape, dtype=torch.float32, device=next(dense.parameters()).device)

        def consume(inputs: Sequence[Tensor], expert_N: Tensor) -> None:
            for sums_EH, h_NH in zip(sums_DEH, inputs, strict=True):
                sums_EH.index_add_(0, expert_N, h_NH)

        _visit(dense, seeds, data, consume, autocast=autocast, track=track)
        return list(experts), F.normalize(all_sum(sums_DEH), dim=-1).cpu()


class Ridge(RouterInit):
    """Ridge regression from hidden states to the expert of their example, in closed form (DUME, arXiv:2603.29765).

    ``W = (X^T X + penalty * I)^-1 X^T Y`` in each layer, Y one-hot. The hidden states are as for :class:`HiddenMean`.
    Keeps one (H, H) float64 matrix a layer on the model's device.

    Args:
        strength: of the penalty, relative to the mean of ``X^T X``'s diagonal; ours.
    """

    def __init__(self, strength: float = 1e-3) -> None:
        if strength <= 0:
            raise ValueError(f"Ridge.strength={strength} must be positive")
        self.strength = strength

    def __call__(self, dense, experts, seeds, data, *, directory, seed=0, autocast=nullcontext, track=iter):
        load_mean(dense, experts)
        num_layers, hidden = dense.config.num_hidden_layers, dense.config.hidden_size
        shape = (num_layers, hidden, hidden + len(experts))  # X^T [X Y] of every layer
        products = torch.zeros(shape, dtype=torch.float64, device=next(dense.parameters()).device)

        def consume(inputs: Sequence[Tensor], expert_N: Tensor) -> None:
            targets_NE = F.one_hot(expert_N, len(experts)).double()
            for own, h_NH in zip(products, inputs, strict=True):
                own += h_NH.double().T @ torch.cat([h_NH.double(), targets_NE], dim=1)

        _visit(dense, seeds, data, consume, autocast=autocast, track=track)
        gram_DHH, cross_DHE = all_sum(products).split([hidden, len(experts)], dim=-1)
        return list(experts), ridge(gram_DHH, cross_DHE, strength=self.strength).float().cpu()


def ridge(gram_DHH: Tensor, cross_DHE: Tensor, *, strength: float) -> Tensor:
    """Ridge regression of every layer, from ``X^T X`` and ``X^T Y``; see :class:`Ridge`. Returns: (D, E, H)."""
    penalty_D = strength * gram_DHH.diagonal(dim1=1, dim2=2).mean(-1)
    eye = torch.eye(gram_DHH.shape[-1], dtype=gram_DHH.dtype, device=gram_DHH.device)
    return torch.linalg.solve(gram_DHH + penalty_D[:, None, None] * eye, cross_DHE).transpose(1, 2)
