"""Losses as functions of tensors. ``L`` response tokens, ``D`` layers, ``T`` tokens, ``E`` experts, ``K`` chosen."""

from collections.abc import Callable

import torch
from torch import Tensor

from upit.core.batches import IGNORE


def grouped_losses(*, losses_L: Tensor, targets_L: Tensor, groups_L: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Summed loss and number of response tokens of each group (an example, a domain), two float32 (num_groups,)."""
    empty = torch.zeros(num_groups, dtype=torch.float32, device=losses_L.device)
    return empty.index_add(0, groups_L, losses_L), empty.index_add(0, groups_L, (targets_L != IGNORE).float())


def assignment_counts(expert_ids_DTK: Tensor, weight_T: Tensor, num_experts: int) -> Tensor:
    """Assignments that each expert of each layer got, (D, E) float32; a token counts by its weight."""
    num_layers, num_tokens, _ = expert_ids_DTK.shape
    chosen_DTE = torch.zeros(num_layers, num_tokens, num_experts, dtype=torch.float32, device=weight_T.device)
    return torch.einsum("dte,t->de", chosen_DTE.scatter_(-1, expert_ids_DTK, 1.0), weight_T)


def load_balancing_loss(
    *,
    router_logits_DTE: Tensor,
    expert_ids_DTK: Tensor,
    mask_T: Tensor | None = None,
    reduce_counts: Callable[[Tensor], Tensor] | None = None,
    world_size: int = 1,
) -> Tensor:
    """Load-balancing loss ``n * sum_i f_i P_i`` (Switch Transformer, arXiv:2101.03961, eq. 4-6), mean over layers.

    ``f_i`` is the share of the assignments that expert i got, ``P_i`` its mean router probability. Unlike
    transformers' function of the same name, each layer is balanced by itself (that one pools the layers), and f sums
    to 1, not to top_k.

    Args:
        router_logits_DTE: of each layer.
        expert_ids_DTK: the K experts of each token.
        mask_T: True for tokens that count; default all.
        reduce_counts: sums a tensor over the ranks in place of this rank's; the mean over ranks of what is returned is
            then the loss of all their tokens together, and so are the gradients.
        world_size: number of ranks that ``reduce_counts`` sums over.
    Returns: scalar; 1.0 at perfect balance.
    """
    probs_DTE = router_logits_DTE.float().softmax(-1)
    num_layers, num_tokens, num_experts = probs_DTE.shape
    top_k = expert_ids_DTK.shape[-1]
    weight_T = (
        torch.ones(num_tokens, dtype=torch.float32, device=probs_DTE.device) if mask_T is None else mask_T.float()
    )
    with torch.no_grad():
        counts_DE = assignment_counts(expert_ids_DTK, weight_T, num_experts)
        totals = torch.cat([counts_DE.flatten(), weight_T.sum()[None]])
        if reduce_counts is not None:
            totals = reduce_counts(totals)
        tokens = totals[-1].clamp(min=1.0)
        f_DE = totals[:-1].view(num_layers, num_experts) / (tokens * top_k)
    p_DE = torch.einsum("dte,t->de", probs_DTE, weight_T) / (tokens / world_size)
    return num_experts * (f_DE * p_DE).sum(-1).mean()


def router_z_loss(*, router_logits_DTE: Tensor, mask_T: Tensor, tokens: Tensor) -> Tensor:
    """Mean over tokens and layers of ``logsumexp(logits)^2`` (ST-MoE, arXiv:2202.08906, eq. 5).

    Args:
        mask_T: True for tokens that count.
        tokens: how many to average over: those of the mask, or the mean of the ranks' counts.
    """
    squares_DT = router_logits_DTE.float().logsumexp(-1).square()
    return (squares_DT * mask_T).sum() / (tokens * len(squares_DT))
