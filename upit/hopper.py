"""The experts on Hopper GPUs: QuACK's grouped products, which gather their rows and apply SwiGLU themselves.

The scheme is SonicMoE's (arXiv 2512.14080): no gathered copy of the tokens, forward or backward, and no pass over
gate and up of its own. Needs ``quack-kernels`` (``pip install "upit[hopper]"``) and widths that are multiples of 8;
elsewhere :mod:`upit.kernels` does the same. QuACK keeps gate and up interleaved between its kernels; the parameters
and their gradients stay gate first.

Shapes: ``T`` tokens, ``K`` experts a token, ``N = T * K`` assignments, ``E`` experts, ``F = E + 1`` bounds of the
experts' rows, ``H`` hidden, ``I`` inner, ``J = 2 * I``.
"""

import torch
import torch.nn.functional as F
from quack.gemm_interface import gemm, gemm_dgated, gemm_gated
from torch import Tensor
from torch.library import custom_op, triton_op

from upit.kernels import differentiable, sort_by_expert, sum_by_token

# QuACK's own choice of tiles: a search for them would synchronise, which capture in a CUDA graph forbids.
FIXED = {"tuned": False, "dynamic_scheduler": False}


def gate_and_up(x_TH: Tensor, gate_up_EJH: Tensor, tokens_N: Tensor, bounds_F: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of each row, interleaved, (N, J), and ``silu(gate) * up``, (N, I)."""
    rows = {"cu_seqlens_m": bounds_F, "A_idx": tokens_N}
    return gemm_gated(x_TH, gate_up_EJH.mT, activation="swiglu", concat_layout=("B",), **rows, **FIXED)


def down(hidden_NI: Tensor, down_EHI: Tensor, bounds_F: Tensor) -> Tensor:
    """(N, H)."""
    return gemm(hidden_NI, down_EHI.mT, cu_seqlens_m=bounds_F, **FIXED)


def down_input_gradient(
    grad_TH: Tensor, down_EHI: Tensor, gate_up_NJ: Tensor, weights_N: Tensor, tokens_N: Tensor, bounds_F: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``gate_up_NJ``; ``silu(gate) * up * weight`` again, (N, I); gradient of ``weights_N``, float32."""
    rows = {"cu_seqlens_m": bounds_F, "A_idx": tokens_N}
    scale = {"colvec_scale": weights_N, "colvec_reduce": True}
    return gemm_dgated(grad_TH, down_EHI, gate_up_NJ, activation="swiglu", **scale, **rows, **FIXED)


def down_weight_gradient(grad_TH: Tensor, hidden_NI: Tensor, tokens_N: Tensor, bounds_F: Tensor) -> Tensor:
    """(E, H, I)."""
    return gemm(grad_TH.T, hidden_NI, cu_seqlens_k=bounds_F, A_idx=tokens_N, **FIXED)


def gate_and_up_input_gradient(grad_NJ: Tensor, gate_up_EJH: Tensor, bounds_F: Tensor) -> Tensor:
    """(N, H)."""
    return gemm(grad_NJ, gate_up_EJH, cu_seqlens_m=bounds_F, concat_layout=("B",), **FIXED)


def gate_and_up_weight_gradient(
    x_TH: Tensor, grad_NJ: Tensor, gate_up_EJH: Tensor, tokens_N: Tensor, bounds_F: Tensor
) -> Tensor:
    """(E, J, H), gate first. Worked out transposed: only the left operand can be gathered."""
    grad_EJH = torch.empty_like(gate_up_EJH)
    rows = {"cu_seqlens_k": bounds_F, "A_idx": tokens_N}
    gemm(x_TH.T, grad_NJ, out=grad_EJH.mT, concat_layout=("out",), **rows, **FIXED)
    return grad_EJH


@custom_op("upit::hopper_products", mutates_args=())
def _products(
    x_TH: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor, tokens_N: Tensor, bounds_F: Tensor
) -> tuple[Tensor, Tensor]:
    """Gate and up, interleaved, (N, J), and the experts' outputs, not weighted, (N, H)."""
    gate_up_NJ, hidden_NI = gate_and_up(x_TH, gate_up_EJH, tokens_N, bounds_F)
    return gate_up_NJ, down(hidden_NI, down_EHI, bounds_F)


@_products.register_fake
def _(x_TH, gate_up_EJH, down_EHI, tokens_N, bounds_F):
    rows = tokens_N.shape[0]
    return x_TH.new_empty(rows, gate_up_EJH.shape[1]), x_TH.new_empty(rows, x_TH.shape[1])


@custom_op("upit::hopper_gradients", mutates_args=())
def _gradients(
    grad_TH: Tensor,
    x_TH: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    gate_up_NJ: Tensor,
    weights_N: Tensor,
    tokens_N: Tensor,
    bounds_F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of each row's token (N, H), of both parameters, and of the sorted ``weights_N``, float32."""
    grad_NJ, hidden_NI, grad_weights_N = down_input_gradient(
        grad_TH, down_EHI, gate_up_NJ, weights_N, tokens_N, bounds_F
    )
    grad_down_EHI = down_weight_gradient(grad_TH, hidden_NI, tokens_N, bounds_F)
    grad_x_NH = gate_and_up_input_gradient(grad_NJ, gate_up_EJH, bounds_F)
    grad_gate_up_EJH = gate_and_up_weight_gradient(x_TH, grad_NJ, gate_up_EJH, tokens_N, bounds_F)
    return grad_x_NH, grad_gate_up_EJH, grad_down_EHI, grad_weights_N


@_gradients.register_fake
def _(grad_TH, x_TH, gate_up_EJH, down_EHI, gate_up_NJ, weights_N, tokens_N, bounds_F):
    grad_x_NH = x_TH.new_empty(tokens_N.shape[0], x_TH.shape[1])
    return grad_x_NH, torch.empty_like(gate_up_EJH), torch.empty_like(down_EHI), torch.empty_like(weights_N)


@triton_op("upit::hopper_experts", mutates_args={})
def experts(
    x_TH: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`upit.kernels.experts` does; the router's weight goes in behind the down projection.

    Returns: ``out_TH``, and for the backward pass ``gate_up_NJ``, ``order_N``, ``inverse_N``, ``bounds_F``.
    """
    top_k = expert_ids_TK.shape[1]
    order_N, inverse_N, ends_E = sort_by_expert(expert_ids_TK, len(gate_up_EJH))
    bounds_F = F.pad(ends_E, (1, 0))
    given = x_TH.contiguous(), gate_up_EJH.contiguous(), down_EHI.contiguous()
    gate_up_NJ, out_NH = _products(*given, order_N // top_k, bounds_F)
    return sum_by_token(out_NH, inverse_N, top_k, weights_TK), gate_up_NJ, order_N, inverse_N, bounds_F


@triton_op("upit::hopper_experts_backward", mutates_args={})
def experts_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    weights_TK: Tensor,
    gate_up_NJ: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    bounds_F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x_TH``, ``gate_up_EJH``, ``down_EHI`` and (float32) ``weights_TK``."""
    top_k = weights_TK.shape[1]
    given = grad_TH.contiguous(), x_TH.contiguous(), gate_up_EJH.contiguous(), down_EHI.contiguous()
    weights_N = weights_TK.float().flatten().index_select(0, order_N)
    grad_x_NH, *grads, grad_weights_N = _gradients(*given, gate_up_NJ, weights_N, order_N // top_k, bounds_F)
    grad_weights_TK = grad_weights_N.index_select(0, inverse_N).view_as(weights_TK)
    return sum_by_token(grad_x_NH, inverse_N, top_k), *grads, grad_weights_TK


differentiable(experts, experts_backward)
