"""Losses as functions of tensors. ``L`` response tokens, ``V`` vocabulary, ``T`` tokens, ``E`` experts."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def response_loss(*, logits_LV: Tensor, targets_L: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Cross entropy summed over the response tokens, in float32, over ``denominator`` (default L)."""
    total = F.cross_entropy(logits_LV.float(), targets_L, reduction="sum")
    return total / (max(1, len(targets_L)) if denominator is None else denominator)


def example_losses(
    *, logits_LV: Tensor, targets_L: Tensor, example_ids_L: Tensor, num_examples: int
) -> tuple[Tensor, Tensor]:
    """Summed response loss (nats) and number of response tokens of each example, two float32 (num_examples,)."""
    loss_L = F.cross_entropy(logits_LV.float(), targets_L, reduction="none")
    empty = torch.zeros(num_examples, dtype=torch.float32, device=logits_LV.device)
    return empty.index_add(0, example_ids_L, loss_L), empty.index_add(0, example_ids_L, torch.ones_like(loss_L))


def load_balancing_loss(
    *,
    router_logits: Sequence[Tensor],
    top_k: int,
    mask_T: Tensor | None = None,
    reduce_counts: Callable[[Tensor], Tensor] | None = None,
    world_size: int = 1,
) -> Tensor:
    """Load-balancing loss ``n * sum_i f_i P_i`` (Switch Transformer, arXiv:2101.03961, eq. 4-6), mean over layers.

    ``f_i`` is the share of the assignments that expert i got, ``P_i`` its mean router probability. Unlike
    transformers' function of the same name, each layer is balanced by itself (that one pools the layers), and f sums
    to 1, not to top_k.

    Args:
        router_logits: one (T, E) tensor a layer.
        top_k: experts a token.
        mask_T: True for tokens that count; default all.
        reduce_counts: sums a tensor over the ranks in place of this rank's; the mean over ranks of what is returned is
            then the loss of all their tokens together, and so are the gradients.
        world_size: number of ranks that ``reduce_counts`` sums over.
    Returns: scalar; 1.0 at perfect balance.
    """
    probs_DTE = torch.stack(tuple(router_logits)).float().softmax(-1)
    num_layers, num_tokens, num_experts = probs_DTE.shape
    weight_T = (
        torch.ones(num_tokens, dtype=torch.float32, device=probs_DTE.device) if mask_T is None else mask_T.float()
    )
    with torch.no_grad():
        chosen_DTK = probs_DTE.topk(top_k, dim=-1).indices
        counts_DE = torch.zeros_like(probs_DTE[:, 0])
        counts_DE.scatter_add_(1, chosen_DTK.flatten(1), weight_T.repeat_interleave(top_k).expand(num_layers, -1))
        totals = torch.cat([counts_DE.flatten(), weight_T.sum()[None]])
        if reduce_counts is not None:
            totals = reduce_counts(totals)
        tokens = totals[-1].clamp(min=1.0)
        f_DE = totals[:-1].view(num_layers, num_experts) / (tokens * top_k)
    p_DE = torch.einsum("dte,t->de", probs_DTE, weight_T) / (tokens / world_size)
    return num_experts * (f_DE * p_DE).sum(-1).mean()
