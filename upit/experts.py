"""The experts' forward: one grouped product over all experts, in the dtype that autocast asks for.

Shapes: ``T`` tokens, ``K`` experts a token, ``N = T * K`` assignments, ``H`` hidden, ``I`` intermediate.
Registered in transformers' experts interface, so any MoE with fused experts can use it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "upit_grouped"


def use(model: PreTrainedModel) -> None:
    """Let every MoE layer of ``model`` run :func:`grouped_forward`. Saved configs are left as they are."""
    model.config._experts_implementation = NAME


def grouped_forward(self: Any, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Dropless experts: sort assignments by expert, two grouped products, weighted sum per token.

    The stock grouped forward leaves fp32 weights in fp32 under autocast; this one casts them, as every
    ``nn.Linear`` does.

    Args:
        self: module with ``gate_up_proj`` (E, 2I, H), ``down_proj`` (E, H, I) and ``act_fn``.
        x_TH: hidden states.
        expert_ids_TK, weights_TK: the router's choice and its weights.
    Returns: (T, H), dtype of ``x_TH``.
    """
    device = x_TH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.gate_up_proj.dtype
    num_tokens, top_k = expert_ids_TK.shape
    expert_ids_N = expert_ids_TK.reshape(-1)
    order_N = torch.argsort(expert_ids_N, stable=True)
    counts_E = torch.zeros(self.gate_up_proj.shape[0], dtype=torch.int64, device=x_TH.device)
    counts_E.scatter_add_(0, expert_ids_N, torch.ones_like(expert_ids_N))
    ends_E = counts_E.cumsum(0).to(torch.int32)

    sorted_NH = x_TH.to(dtype)[order_N // top_k]
    gate_up = F.grouped_mm(sorted_NH, self.gate_up_proj.to(dtype).transpose(1, 2), offs=ends_E)
    gate_NI, up_NI = gate_up.chunk(2, dim=-1)
    out_NH = F.grouped_mm(self.act_fn(gate_NI) * up_NI, self.down_proj.to(dtype).transpose(1, 2), offs=ends_E)

    unsorted_NH = torch.empty_like(out_NH).index_copy(0, order_N, out_NH)
    weighted = unsorted_NH.view(num_tokens, top_k, -1) * weights_TK.unsqueeze(-1)
    return weighted.sum(dim=1).to(x_TH.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_forward)
