"""Triton kernels around the experts' grouped products: routing order, gather, SwiGLU, weighted combine.

What the profile of the plain path shows beside the products: sorting, and the scatter in the gather's backward pass.
Here assignments are put in order by counting, and each gather's backward pass is a gather itself, by the inverse
order. All of it is deterministic: no atomics.

Shapes: ``T`` tokens, ``K`` experts a token, ``N = T * K`` assignments, ``E`` experts, ``F = E + 1`` bounds of the
experts' rows, ``H`` hidden, ``I`` inner, ``J = 2 * I``.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from upit.model.experts.op_names import op_name

ASSIGNMENTS = 256  # of one program when they are put in order


@triton.jit
def _count(expert_ids, counts, size, E: tl.constexpr, BLOCK: tl.constexpr):
    """counts[block, e]: assignments of a block to expert e."""
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, E)
    ids = tl.load(expert_ids + n, mask=n < size, other=-1).to(tl.int32)
    hits = (ids[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts + block * E + experts, tl.sum(hits, axis=0))


@triton.jit
def _place(
    expert_ids,
    counts,
    order,
    tokens,
    inverse,
    bounds,
    size,
    num_blocks,
    num_experts,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stable counting sort: where each assignment of a block goes, and where each expert's rows start and end."""
    block = tl.program_id(0)
    experts = tl.arange(0, E)
    totals = tl.zeros((E,), dtype=tl.int32)
    before = tl.zeros((E,), dtype=tl.int32)
    for first in range(0, num_blocks, 32):
        others = first + tl.arange(0, 32)
        rows = tl.load(counts + others[:, None] * E + experts[None, :], mask=(others < num_blocks)[:, None], other=0)
        totals += tl.sum(rows, axis=0)
        before += tl.sum(tl.where((others < block)[:, None], rows, 0), axis=0)
    ends_E = tl.cumsum(totals, axis=0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(expert_ids + n, mask=n < size, other=-1).to(tl.int32)
    hits = (ids[:, None] == experts[None, :]).to(tl.int32)
    places = tl.cumsum(hits, axis=0) - 1 + (ends_E - totals + before)[None, :]
    place = tl.sum(places * hits, axis=1)
    tl.store(order + place, n.to(tl.int32), mask=n < size)
    tl.store(tokens + place, (n // K).to(tl.int32), mask=n < size)
    tl.store(inverse + n, place, mask=n < size)
    if block == 0:
        tl.store(bounds, 0)
        tl.store(bounds + 1 + experts, ends_E, mask=experts < num_experts)


class Sorted(NamedTuple):
    """The assignments sorted by expert, stable; all int32."""

    order_N: Tensor  # assignment at each sorted row
    tokens_N: Tensor  # its token
    inverse_N: Tensor  # sorted row of each assignment
    bounds_F: Tensor  # where each expert's rows start, and the end of the last


def sort_by_expert(expert_ids_TK: Tensor, num_experts: int) -> Sorted:
    """Order of the assignments by expert."""
    size, top_k = expert_ids_TK.numel(), expert_ids_TK.shape[1]
    width = triton.next_power_of_2(num_experts)
    blocks = triton.cdiv(size, ASSIGNMENTS)
    ids_N = expert_ids_TK.contiguous()
    make: dict[str, Any] = {"dtype": torch.int32, "device": ids_N.device}
    counts = torch.empty(blocks, width, **make)
    order_N, tokens_N, inverse_N = (torch.empty(size, **make) for _ in range(3))
    found = Sorted(order_N, tokens_N, inverse_N, torch.empty(num_experts + 1, **make))
    wrap_triton(_count)[(blocks,)](ids_N, counts, size, E=width, BLOCK=ASSIGNMENTS)
    wrap_triton(_place)[(blocks,)](
        ids_N, counts, *found, size, blocks, num_experts, K=top_k, E=width, BLOCK=ASSIGNMENTS
    )
    return found


@triton.jit
def _gather_tokens(source, tokens, out, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(source + token.to(tl.int64) * stride + columns, mask=inside)
    tl.store(out + row * width + columns, values, mask=inside)


def gather_tokens(source_TH: Tensor, tokens_N: Tensor) -> Tensor:
    """Each sorted row's token, (N, H)."""
    source_TH = source_TH if source_TH.stride(-1) == 1 else source_TH.contiguous()
    width = source_TH.shape[1]
    out_NH = torch.empty(len(tokens_N), width, dtype=source_TH.dtype, device=source_TH.device)
    block = min(4096, triton.next_power_of_2(width))
    grid = (len(tokens_N), triton.cdiv(width, block))
    wrap_triton(_gather_tokens)[grid](source_TH, tokens_N, out_NH, width, source_TH.stride(0), BLOCK=block)
    return out_NH


@triton.jit
def _sum_by_token(source, inverse, weights, out, width, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse + token * K + k).to(tl.int64)
        values = tl.load(source + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if weights is not None:
            values *= tl.load(weights + token * K + k).to(tl.float32)
        total += values
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)


def sum_by_token(source_NH: Tensor, inverse_N: Tensor, top_k: int, weights_TK: Tensor | None = None) -> Tensor:
    """Sum of each token's K sorted rows, times ``weights_TK`` if given, in float32, (T, H)."""
    num_tokens, width = len(inverse_N) // top_k, source_NH.shape[1]
    out_TH = torch.empty(num_tokens, width, dtype=source_NH.dtype, device=source_NH.device)
    block = min(4096, triton.next_power_of_2(width))
    grid = (num_tokens, triton.cdiv(width, block))
    weights_N = None if weights_TK is None else weights_TK.contiguous()
    wrap_triton(_sum_by_token)[grid](source_NH, inverse_N, weights_N, out_TH, width, K=top_k, BLOCK=block)
    return out_TH


def combine(source_NH: Tensor, inverse_N: Tensor, top_k: int, weights_TK: Tensor | None = None) -> Tensor:
    """:func:`sum_by_token` in a forward pass: in plain torch for the compiler, which fuses it with the residual's sum.

    Not in a backward pass, where it would become a part of the norm's gradient and slow that down.
    """
    if type(source_NH) is Tensor:
        return sum_by_token(source_NH, inverse_N, top_k, weights_TK)
    rows_TKH = source_NH[inverse_N.view(-1, top_k)].float()
    weighted_TKH = rows_TKH if weights_TK is None else rows_TKH * weights_TK.float().unsqueeze(-1)
    return weighted_TKH.sum(1).to(source_NH.dtype)


@triton.jit
def _swiglu(gate_up, weights, order, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = gate_up + row * 2 * width + columns
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + tl.load(order + row)).to(tl.float32)
    hidden = gate * tl.sigmoid(gate) * up * weight
    tl.store(out + row * width + columns, hidden.to(out.dtype.element_ty), mask=inside)


def weighted_swiglu(gate_up_NJ: Tensor, weights_N: Tensor, order_N: Tensor) -> Tensor:
    """``silu(gate) * up * weight``, (N, I); the router's weight goes in here, before the down projection.

    Args:
        gate_up_NJ: (N, 2I), gate first, sorted.
        weights_N: by assignment, not sorted.
    """
    width = gate_up_NJ.shape[1] // 2
    out_NI = torch.empty(len(order_N), width, dtype=gate_up_NJ.dtype, device=gate_up_NJ.device)
    block = min(2048, triton.next_power_of_2(width))
    grid = (len(order_N), triton.cdiv(width, block))
    wrap_triton(_swiglu)[grid](gate_up_NJ, weights_N, order_N, out_NI, width, BLOCK=block)
    return out_NI


@triton.jit
def _swiglu_backward(gate_up, weights, order, grad_out, out, grad_gate_up, grad_weights, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    assignment = tl.load(order + row)
    weight = tl.load(weights + assignment).to(tl.float32)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < width
        start = row * 2 * width + columns
        gate = tl.load(gate_up + start, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + start + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dot += grad * silu * up
        kind = out.dtype.element_ty
        tl.store(out + row * width + columns, (silu * up * weight).to(kind), mask=inside)
        grad = grad * weight
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(grad_gate_up + start, (grad * up * slope).to(kind), mask=inside)
        tl.store(grad_gate_up + start + width, (grad * silu).to(kind), mask=inside)
    tl.store(grad_weights + assignment, tl.sum(dot, axis=0))


def weighted_swiglu_backward(
    gate_up_NJ: Tensor, weights_N: Tensor, order_N: Tensor, grad_NI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`weighted_swiglu`: its output again, the gradient of ``gate_up_NJ``, and float32 of ``weights_N``."""
    width = grad_NI.shape[1]
    out_NI, grad_gate_up_NJ = torch.empty_like(grad_NI), torch.empty_like(gate_up_NJ)
    grad_weights_N = torch.empty(len(order_N), dtype=torch.float32, device=grad_NI.device)
    block = min(1024, triton.next_power_of_2(width))
    wrap_triton(_swiglu_backward)[(len(order_N),)](
        gate_up_NJ, weights_N, order_N, grad_NI, out_NI, grad_gate_up_NJ, grad_weights_N, width, BLOCK=block
    )
    return out_NI, grad_gate_up_NJ, grad_weights_N


def differentiable(forward, backward):
    """A differentiable function of the parameters as they are, of two ops that take them in the dtype of the tokens.

    So gradients of float32 parameters are float32 from the start, in place of half precision and a cast.

    Args:
        forward, backward: with the arguments and results of :func:`_forward` and :func:`_backward`.
    """

    def gradients(ctx, grad_TH, *_):
        weights_TK = ctx.saved_tensors[3]
        grad_x_TH, *grads, grad_weights_TK = backward(grad_TH, *ctx.saved_tensors, ctx.dtype)
        return grad_x_TH, None, None, None, grad_weights_TK.to(weights_TK.dtype), *grads

    def call(x_TH: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Dropless SwiGLU experts in half precision, the dtype of ``x_TH``; parameters in any. Returns: (T, H)."""
        halves = [param.detach().to(x_TH.dtype) for param in (gate_up_EJH, down_EHI)]
        return forward(x_TH, *halves, expert_ids_TK, weights_TK, gate_up_EJH, down_EHI)[0]

    forward.register_autograd(gradients, setup_context=_save)
    return call


def _save(ctx, inputs, output) -> None:
    x_TH, gate_up_EJH, down_EHI, _, weights_TK, *params = inputs
    ctx.dtype = params[0].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TH, gate_up_EJH, down_EHI, weights_TK, *output[1:])


@triton_op(op_name("experts", __file__), mutates_args={})
def _forward(
    x_TH: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_param: Tensor,
    down_param: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The compiler sees through it and launches the kernels itself.

    Args:
        gate_up_param, down_param: what ``gate_up_EJH`` and ``down_EHI`` were cast from, for their gradients only.
    Returns: ``out_TH``, and for the backward pass ``gate_up_NJ`` and the fields of :class:`Sorted`.
    """
    order_N, tokens_N, inverse_N, bounds_F = sort_by_expert(expert_ids_TK, len(gate_up_EJH))
    x_NH = gather_tokens(x_TH, tokens_N)
    gate_up_NJ = F.grouped_mm(x_NH, gate_up_EJH.transpose(1, 2), offs=bounds_F[1:])
    hidden_NI = weighted_swiglu(gate_up_NJ, weights_TK.contiguous(), order_N)
    out_NH = F.grouped_mm(hidden_NI, down_EHI.transpose(1, 2), offs=bounds_F[1:])
    out_TH = combine(out_NH, inverse_N, expert_ids_TK.shape[1])
    return out_TH, gate_up_NJ, order_N, tokens_N, inverse_N, bounds_F


@triton_op(op_name("experts_backward", __file__), mutates_args={})
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
    """Gradients of ``x_TH``, of both parameters in ``dtype``, and (float32) of ``weights_TK``."""
    ends_E = bounds_F[1:]
    grad_NH = gather_tokens(grad_TH, tokens_N)
    grad_hidden_NI = F.grouped_mm(grad_NH, down_EHI, offs=ends_E)
    hidden_NI, grad_gate_up_NJ, grad_weights_N = weighted_swiglu_backward(
        gate_up_NJ, weights_TK.contiguous(), order_N, grad_hidden_NI
    )
    grad_down_EHI = F.grouped_mm(grad_NH.t(), hidden_NI, offs=ends_E).to(dtype)
    grad_x_NH = F.grouped_mm(grad_gate_up_NJ, gate_up_EJH, offs=ends_E)
    x_NH = gather_tokens(x_TH, tokens_N)
    grad_gate_up_EJH = F.grouped_mm(grad_gate_up_NJ.t(), x_NH, offs=ends_E).to(dtype)
    grad_x_TH = sum_by_token(grad_x_NH, inverse_N, weights_TK.shape[1])
    return grad_x_TH, grad_gate_up_EJH, grad_down_EHI, grad_weights_N.view_as(weights_TK)


experts = differentiable(_forward, _backward)
