"""Routers from hidden states of the seed data, without training: their mean, or a ridge regression on them.

``D`` layers, ``E`` experts, ``H`` hidden, ``N`` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from upit.core.distributed import all_sum
from upit.core.progress import Autocast
from upit.core.tensors import local, local_slices
from upit.model.families import is_expert
from upit.model.forward import ffn_inputs_of, layer_inputs_of
from upit.preparation.expert import Expert
from upit.preparation.placement import borrowed
from upit.router_init.base import RouterInit
from upit.router_init.scoring import Seeds, ffn_inputs_by_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def load_mean(dense: PreTrainedModel, experts: Sequence[Expert]) -> None:
    """Copy the mean of the experts' FFNs into a borrowed model, each rank its own shard."""
    for name, param in dense.named_parameters():
        if is_expert(name):
            where = local_slices(param)
            local(param).copy_(torch.stack([expert.get_slice(name)[where].float() for expert in experts]).mean(0))


def _visit(
    dense: PreTrainedModel,
    seeds: Seeds,
    data,
    *,
    autocast: Autocast,
    track: Callable[[Iterable], Iterable],
    inputs_of: Callable = ffn_inputs_of,
) -> Iterator[tuple[int, Tensor]]:
    """The expert of each seed example of this rank's share, and its hidden states in each layer, (D, N, H)."""
    owner = dict(zip(seeds.indices, seeds.expert_S.tolist(), strict=True))
    pad_id = data.tokenizer.pad_token_id
    for index, states_DNH in ffn_inputs_by_example(
        dense,
        seeds.indices,
        data.train_set,
        pad_id=pad_id,
        autocast=autocast,
        track=track,
        inputs_of=inputs_of,
    ):
        yield owner[index], states_DNH


_MODES: dict[str, tuple[Callable, Callable[[Tensor], Tensor]]] = {  # which states, and what is summed of an example's
    "ffn": (ffn_inputs_of, lambda states_DNH: states_DNH.sum(1)),
    "hidden": (layer_inputs_of, lambda states_DNH: states_DNH[:, -1]),
    "hidden_avg": (layer_inputs_of, lambda states_DNH: states_DNH.mean(1)),
}


class HiddenMean(RouterInit):
    """Each expert's row is the direction of its bucket's mean hidden state.

    The model is the dense one with the mean of the experts' FFNs: the same for every bucket (ours). Rows have unit
    norm; an expert without seed examples gets zeros.

    Args:
        mode: which hidden states. "ffn", ours, takes those that the router will see: they enter the FFN, behind its
            norm, and every token of the bucket counts alike. "hidden" and "hidden_avg" are mergekit-moe's (0.1.5),
            with a bucket's seed examples for its positive prompts and without negative ones: the residual stream that
            enters the layer, at the last token or as the mean over the tokens, and every example counts alike. With
            "hidden" the first layer sees no more than the last token's embedding; where all examples end alike, its
            rows are alike too.
    Raises: ValueError: an unknown mode.
    """

    def __init__(self, mode: Literal["ffn", "hidden", "hidden_avg"] = "ffn") -> None:
        if mode not in _MODES:
            raise ValueError(f"HiddenMean.mode={mode!r} must be one of {sorted(_MODES)}")
        self.mode = mode

    def __call__(self, dense, experts, seeds, data, *, directory, seed=0, autocast=nullcontext, track=iter):
        inputs_of, pooled = _MODES[self.mode]
        shape = (dense.config.num_hidden_layers, len(experts), dense.config.hidden_size)
        sums_DEH = torch.zeros(shape, dtype=torch.float32, device=next(dense.parameters()).device)
        with borrowed(dense):
            load_mean(dense, experts)
            for expert, states_DNH in _visit(dense, seeds, data, autocast=autocast, track=track, inputs_of=inputs_of):
                sums_DEH[:, expert] += pooled(states_DNH.float())
        return list(experts), F.normalize(all_sum(sums_DEH), dim=-1).cpu()


class Ridge(RouterInit):
    """Ridge regression from hidden states to the expert of their example, in closed form (DUME, arXiv:2603.29765).

    ``W = (X^T X + penalty * I)^-1 X^T Y`` in each layer, Y one-hot. The hidden states are those of
    :class:`HiddenMean`'s mode "ffn".
    Keeps one (H, H) float64 matrix a layer on the model's device.

    Args:
        strength: of the penalty, relative to the mean of ``X^T X``'s diagonal; ours.
    """

    def __init__(self, strength: float = 1e-3) -> None:
        if strength <= 0:
            raise ValueError(f"Ridge.strength={strength} must be positive")
        self.strength = strength

    def __call__(self, dense, experts, seeds, data, *, directory, seed=0, autocast=nullcontext, track=iter):
        num_layers, hidden = dense.config.num_hidden_layers, dense.config.hidden_size
        shape = (num_layers, hidden, hidden + len(experts))  # X^T [X Y] of every layer
        products = torch.zeros(shape, dtype=torch.float64, device=next(dense.parameters()).device)
        with borrowed(dense):
            load_mean(dense, experts)
            for expert, states_DNH in _visit(dense, seeds, data, autocast=autocast, track=track):
                for own, h_NH in zip(products, states_DNH.double(), strict=True):
                    own[:, :hidden] += h_NH.T @ h_NH
                    own[:, hidden + expert] += h_NH.sum(0)
        gram_DHH, cross_DHE = all_sum(products).split([hidden, len(experts)], dim=-1)
        return list(experts), ridge(gram_DHH, cross_DHE, strength=self.strength).float().cpu()


def ridge(gram_DHH: Tensor, cross_DHE: Tensor, *, strength: float) -> Tensor:
    """Ridge regression of every layer, from ``X^T X`` and ``X^T Y``; see :class:`Ridge`. Returns: (D, E, H)."""
    penalty_D = strength * gram_DHH.diagonal(dim1=1, dim2=2).mean(-1)
    eye = torch.eye(gram_DHH.shape[-1], dtype=gram_DHH.dtype, device=gram_DHH.device)
    return torch.linalg.solve(gram_DHH + penalty_D[:, None, None] * eye, cross_DHE).transpose(1, 2)
