"""The experts on Hopper GPUs: QuACK's grouped products, which gather their rows and apply SwiGLU themselves.

The scheme is SonicMoE's (arXiv 2512.14080): no gathered copy of the tokens, forward or backward, and no pass over
gate and up of its own. Needs ``quack-kernels`` (``pip install ".[hopper]"``) and widths that are multiples of 8;
elsewhere :mod:`upit.model.experts.triton_kernels` does the same. QuACK keeps gate and up interleaved between its
kernels; the parameters and their gradients stay gate first.

Shapes: ``T`` tokens, ``K`` experts a token, ``N = T * K`` assignments, ``E`` experts, ``F = E + 1`` bounds of the
experts' rows, ``H`` hidden, ``I`` inner, ``J = 2 * I``.
"""

from typing import NamedTuple

import torch
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_dgated, gemm_gated, gemm_tuned
from torch import Tensor
from torch.library import custom_op, triton_op

from upit.model.experts import triton_kernels as kernels
from upit.model.experts.op_names import op_name
from upit.model.experts.triton_kernels import combine, differentiable, sort_by_expert, sum_by_token

SOURCES = __file__, kernels.__file__  # of the code that torch.compile sees in the ops below


class Tiles(NamedTuple):
    """Which tile of the output a block of each product computes."""

    gate_and_up: GemmConfig
    down: GemmConfig
    down_input: GemmConfig
    down_weight: GemmConfig
    gate_and_up_input: GemmConfig
    gate_and_up_weight: GemmConfig


def _tile(rows: int, columns: int, blocks: int = 1, *, uneven: bool = False) -> GemmConfig:
    """``blocks`` share what they load; small tiles take turns in a block (ping-pong).

    Of ``uneven`` tiles, which sum over an expert's tokens, be they many or few, a block takes the next when it is done
    with one; else each has its own from the start.
    """
    alternate = rows * columns <= 128 * 192
    return GemmConfig(tile_m=rows, tile_n=columns, pingpong=alternate, cluster_m=blocks, is_dynamic_persistent=uneven)


# The fastest of those tried at 576 x 1536 (docs/performance.md), and at 2048 x 5632 and 4096 x 11008. Fixed, since a
# search would synchronise, which the capture of a CUDA graph forbids; constants, since QuACK knows a tile by identity.
NARROW_TILES = Tiles(
    gate_and_up=_tile(128, 192, 2),
    down=_tile(128, 192, 2),
    down_input=_tile(128, 128),
    down_weight=_tile(128, 256, uneven=True),
    gate_and_up_input=_tile(256, 192),
    gate_and_up_weight=_tile(128, 256, uneven=True),
)
WIDE_TILES = Tiles(
    gate_and_up=_tile(128, 192, 2),
    down=_tile(128, 256, 2),
    down_input=_tile(128, 128, 2),
    down_weight=_tile(256, 192, 2, uneven=True),
    gate_and_up_input=_tile(128, 256, 2),
    gate_and_up_weight=_tile(256, 192, uneven=True),
)


def tiles(hidden: int) -> Tiles:
    """For experts of this hidden width."""
    return NARROW_TILES if hidden <= 1024 else WIDE_TILES


def gate_and_up(x_TH: Tensor, gate_up_EJH: Tensor, tokens_N: Tensor, bounds_F: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up of each row, interleaved, (N, J), and ``silu(gate) * up``, (N, I)."""
    given = {"cu_seqlens_m": bounds_F, "A_idx": tokens_N, "concat_layout": ("B",)}
    return gemm_gated(x_TH, gate_up_EJH.mT, activation="swiglu", config=tiles(x_TH.shape[1]).gate_and_up, **given)


def down(hidden_NI: Tensor, down_EHI: Tensor, bounds_F: Tensor) -> Tensor:
    """(N, H)."""
    hidden = down_EHI.shape[1]
    out_NH = hidden_NI.new_empty(len(hidden_NI), hidden)
    gemm_tuned.fn(hidden_NI, down_EHI.mT, out_NH, cu_seqlens_m=bounds_F, config=tiles(hidden).down)
    return out_NH


def down_input_gradient(
    grad_TH: Tensor, down_EHI: Tensor, gate_up_NJ: Tensor, weights_N: Tensor, tokens_N: Tensor, bounds_F: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of ``gate_up_NJ``; ``silu(gate) * up * weight`` again, (N, I); gradient of ``weights_N``, float32."""
    given = {"cu_seqlens_m": bounds_F, "A_idx": tokens_N, "colvec_scale": weights_N, "colvec_reduce": True}
    how = {"activation": "swiglu", "dynamic_scheduler": False, "config": tiles(grad_TH.shape[1]).down_input}
    return gemm_dgated(grad_TH, down_EHI, gate_up_NJ, **given, **how)


def down_weight_gradient(
    grad_TH: Tensor, hidden_NI: Tensor, tokens_N: Tensor, bounds_F: Tensor, dtype: torch.dtype
) -> Tensor:
    """(E, H, I)."""
    hidden = grad_TH.shape[1]
    grad_EHI = hidden_NI.new_empty(len(bounds_F) - 1, hidden, hidden_NI.shape[1], dtype=dtype)
    given = {"cu_seqlens_k": bounds_F, "A_idx": tokens_N}
    gemm_tuned.fn(grad_TH.T, hidden_NI, grad_EHI, config=tiles(hidden).down_weight, **given)
    return grad_EHI


def gate_and_up_input_gradient(grad_NJ: Tensor, gate_up_EJH: Tensor, bounds_F: Tensor) -> Tensor:
    """(N, H)."""
    hidden = gate_up_EJH.shape[2]
    out_NH = grad_NJ.new_empty(len(grad_NJ), hidden)
    given = {"cu_seqlens_m": bounds_F, "concat_layout": ("B",)}
    gemm_tuned.fn(grad_NJ, gate_up_EJH, out_NH, config=tiles(hidden).gate_and_up_input, **given)
    return out_NH


def gate_and_up_weight_gradient(
    x_TH: Tensor, grad_NJ: Tensor, tokens_N: Tensor, bounds_F: Tensor, dtype: torch.dtype
) -> Tensor:
    """(E, J, H), gate first. Worked out transposed: only the left operand can be gathered."""
    hidden = x_TH.shape[1]
    grad_EJH = grad_NJ.new_empty(len(bounds_F) - 1, grad_NJ.shape[1], hidden, dtype=dtype)
    given = {"cu_seqlens_k": bounds_F, "A_idx": tokens_N, "concat_layout": ("out",)}
    gemm_tuned.fn(x_TH.T, grad_NJ, grad_EJH.mT, config=tiles(hidden).gate_and_up_weight, **given)
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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of each row's token (N, H), of both parameters in ``dtype``, and (float32) of ``weights_N``."""
    grad_NJ, hidden_NI, grad_weights_N = down_input_gradient(
        grad_TH, down_EHI, gate_up_NJ, weights_N, tokens_N, bounds_F
    )
    grad_down_EHI = down_weight_gradient(grad_TH, hidden_NI, tokens_N, bounds_F, dtype)
    grad_x_NH = gate_and_up_input_gradient(grad_NJ, gate_up_EJH, bounds_F)
    grad_gate_up_EJH = gate_and_up_weight_gradient(x_TH, grad_NJ, tokens_N, bounds_F, dtype)
    return grad_x_NH, grad_gate_up_EJH, grad_down_EHI, grad_weights_N


@_gradients.register_fake
def _(grad_TH, x_TH, gate_up_EJH, down_EHI, gate_up_NJ, weights_N, tokens_N, bounds_F, dtype):
    grad_x_NH = x_TH.new_empty(tokens_N.shape[0], x_TH.shape[1])
    grads = (torch.empty_like(param, dtype=dtype) for param in (gate_up_EJH, down_EHI))
    return grad_x_NH, *grads, torch.empty_like(weights_N)


@triton_op(op_name("hopper_experts", *SOURCES), mutates_args={})
def _forward(
    x_TH: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_param: Tensor,
    down_param: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What :func:`upit.model.experts.triton_kernels.experts` does; the router's weight goes in behind the down
    projection.
    """
    order_N, tokens_N, inverse_N, bounds_F = sort_by_expert(expert_ids_TK, len(gate_up_EJH))
    given = x_TH.contiguous(), gate_up_EJH.contiguous(), down_EHI.contiguous()
    gate_up_NJ, out_NH = _products(*given, tokens_N, bounds_F)
    out_TH = combine(out_NH, inverse_N, expert_ids_TK.shape[1], weights_TK)
    return out_TH, gate_up_NJ, order_N, tokens_N, inverse_N, bounds_F


@triton_op(op_name("hopper_experts_backward", *SOURCES), mutates_args={})
def _backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    weights_TK: Tensor,
    gate_up_NJ: Tensor,
    order_N: Tensor,
    tokens_N: Tensor,
    inverse_N: Tensor,
    bounds_F: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = grad_TH.contiguous(), x_TH.contiguous(), gate_up_EJH.contiguous(), down_EHI.contiguous()
    weights_N = weights_TK.float().flatten().index_select(0, order_N)
    grad_x_NH, *grads, grad_weights_N = _gradients(*given, gate_up_NJ, weights_N, tokens_N, bounds_F, dtype)
    grad_weights_TK = grad_weights_N.index_select(0, inverse_N).view_as(weights_TK)
    return sum_by_token(grad_x_NH, inverse_N, weights_TK.shape[1]), *grads, grad_weights_TK


experts = differentiable(_forward, _backward)
