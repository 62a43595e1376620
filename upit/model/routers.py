"""The routers of a MoE of transformers: how they choose in compiled layers, and what they said last.

Shapes: ``T`` tokens, ``E`` experts, ``K`` experts a token, ``D`` layers, ``H`` hidden.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upit.model.families import ROUTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEW = 8  # experts a token up to which they are picked one after the other; ours


def moe_routers(model: PreTrainedModel) -> list:
    """The router of each MoE layer, in order."""
    body: Any = model.model
    return [layer.get_submodule(ROUTER) for layer in body.layers]


def prepare_routers(model: PreTrainedModel) -> None:
    """Let every router choose by :func:`route`, and keep what it said last as ``last_logits`` and ``last_experts``.

    Attributes, not a list that a passing hook fills: compiled layers keep writing to them.
    """
    for router in moe_routers(model):
        kind: Any = type(router)
        if not hasattr(kind, "stock_forward"):
            router.__class__ = _routed(kind)
            router.register_forward_hook(_keep_routing)


@cache
def _routed(stock: Any) -> type:
    """The same kind of router with another forward; a forward of the object's own would keep the model alive."""
    return type(stock.__name__, (stock,), {"forward": route, "stock_forward": stock.forward})


def _keep_routing(router, _, output: tuple[Tensor, Tensor, Tensor]) -> None:
    router.last_logits, _, router.last_experts = output


def last_routing(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Of the last forward pass: router logits (D, T, E) and chosen experts (D, T, K), layer by layer."""
    routers = moe_routers(model)
    return torch.stack([r.last_logits for r in routers]), torch.stack([r.last_experts for r in routers])


def route(router: nn.Module, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The router's own forward; in compiled layers the same without ``topk``, which stays a slow kernel of its own.

    Args:
        router: a softmax router of transformers, prepared.
        states: (..., H).
    Returns: logits (T, E), weights (T, K) and experts (T, K).
    """
    stock: Any = router
    if stock.top_k > FEW or not torch.compiler.is_compiling():
        return stock.stock_forward(states)
    logits_TE = F.linear(states.reshape(-1, stock.hidden_dim), stock.weight)
    probs_TE = logits_TE.softmax(-1, dtype=torch.float32)
    weights_TK, experts_TK = few_largest(probs_TE, stock.top_k, normalize=getattr(stock, "norm_topk_prob", True))
    # Mixtral's, which always normalises, leaves them in float32
    dtype = logits_TE.dtype if hasattr(stock, "norm_topk_prob") else torch.float32
    return logits_TE, weights_TK.to(dtype), experts_TK


def few_largest(probs_TE: Tensor, k: int, *, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """``probs_TE.topk(k)`` of positive numbers by ``k`` passes over each row, which fuse with what comes before.

    Args:
        normalize: divide the values by their sum; done here, before they are put together, so that it fuses.
    """
    every_E = torch.arange(probs_TE.shape[1], device=probs_TE.device)
    left_TE, values, indices = probs_TE.detach(), [], []
    for _ in range(k):
        index_T1 = left_TE.argmax(-1, keepdim=True)
        hit_TE = every_E == index_T1
        values.append((probs_TE * hit_TE).sum(-1, keepdim=True))
        indices.append(index_T1)
        left_TE = left_TE.masked_fill(hit_TE, -1.0)
    if normalize:
        total_T1 = torch.stack(values).sum(0)
        values = [value_T1 / total_T1 for value_T1 in values]
    return torch.cat(values, -1), torch.cat(indices, -1)
