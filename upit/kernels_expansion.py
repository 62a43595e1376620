"""Triton kernels of an expansion on a GPU: inner products of task vectors, and DARE.

Shapes: ``M`` experts, ``P`` parameters of one tensor, ``B`` blocks, ``R`` rows of a tile (M rounded up).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 128  # of a tile, whose products are summed in float32; the tiles' sums in float64
TILES = 32  # of one program
ROW_BLOCK = 4096  # products of a new row that are summed in float32; the blocks' sums in float64
QUARTERS = 16  # a quarter of a tensor is a multiple of it, so that all four are read in vectors


_LOCK = Lock()


@contextmanager
def _launching(tensor: Tensor) -> Iterator[None]:
    """For threads that launch kernels: each has a current device of its own, and one at a time may compile."""
    with _LOCK, torch.cuda.device_of(tensor):
        yield


@triton.jit
def _gram(
    experts, like, base, sums, size, num_experts,
    ROWS: tl.constexpr, FOLD: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, AGAINST_BASE: tl.constexpr,
):  # fmt: skip
    """sums[block]: products of all rows of a block. With few experts, FOLD stretches of each are rows of one tile."""
    rows = tl.arange(0, ROWS)
    expert = rows % (ROWS // FOLD)
    there = (expert < num_experts)[:, None]
    addresses = tl.load(experts + expert, mask=expert < num_experts, other=0).to(like.dtype)[:, None]
    stretch = (rows // (ROWS // FOLD) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, ROWS), dtype=tl.float64)
    for tile in range(TILES):
        columns = (tl.program_id(0) * TILES + tile) * (FOLD * COLUMNS) + stretch
        inside = there & (columns < size)
        deltas = tl.load(tl.multiple_of(addresses + columns, [1, 16]), mask=inside, other=0.0).to(tl.float32)
        if AGAINST_BASE:
            places = (tl.program_id(0) * TILES + tile) * (FOLD * COLUMNS) + tl.arange(0, FOLD * COLUMNS)
            origin = tl.load(base + places, mask=places < size, other=0.0).to(tl.float32).reshape(FOLD, 1, COLUMNS)
            deltas -= tl.broadcast_to(origin, (FOLD, ROWS // FOLD, COLUMNS)).reshape(ROWS, COLUMNS)
        total += tl.dot(deltas, tl.trans(deltas), input_precision="bf16x3").to(tl.float64)
    places = (tl.program_id(0) * ROWS + rows[:, None]) * ROWS + rows[None, :]
    tl.store(sums + places, total)


@triton.jit
def _row(
    experts, newest, base, sums, size, num_experts, BLOCK: tl.constexpr, AGAINST_BASE: tl.constexpr
):  # fmt: skip
    """sums[block, m]: products of the newest expert with expert m."""
    block = tl.program_id(0)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    own = tl.load(newest + columns, mask=inside, other=0.0).to(tl.float32)
    if AGAINST_BASE:
        origin = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
        own -= origin
    for m in range(num_experts):
        start = tl.multiple_of(tl.load(experts + m).to(newest.dtype), 16)
        delta = tl.load(start + columns, mask=inside, other=0.0).to(tl.float32)
        if AGAINST_BASE:
            delta -= origin
        tl.store(sums + block * num_experts + m, tl.sum(delta * own))


def products(tensors: Sequence[Tensor], base: Tensor | None, *, new: int) -> Tensor:
    """Inner products of one tensor's task vectors, of the last ``new`` experts with all, (new, M) float64.

    Each expert and the base are read once, whatever ``new`` is.

    Args:
        tensors: of M experts, of one shape.
        base: where the task vectors start; None the origin.
    """
    kind = tensors[0].dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32
    tensors = [tensor.to(kind) for tensor in tensors]
    count, size, device = len(tensors), tensors[0].numel(), tensors[0].device
    addresses_M = torch.tensor([tensor.data_ptr() for tensor in tensors], pin_memory=device.type == "cuda")
    table_M = addresses_M.to(device, non_blocking=True)  # else the host would wait for the tensor before
    given = (table_M, tensors[-1], tensors[-1] if base is None else base)
    if new == 1:
        blocks = triton.cdiv(size, ROW_BLOCK)
        sums_BM = torch.empty(blocks, count, dtype=torch.float32, device=device)
        with _launching(table_M):
            _row[(blocks,)](*given, sums_BM, size, count, BLOCK=ROW_BLOCK, AGAINST_BASE=base is not None, num_warps=8)
        return sums_BM.sum(0, dtype=torch.float64)[None]
    width = triton.next_power_of_2(count)
    rows = max(16, width)
    fold = rows // width
    blocks = triton.cdiv(size, COLUMNS * TILES * fold)
    shape = {"ROWS": rows, "FOLD": fold, "COLUMNS": COLUMNS, "TILES": TILES, "AGAINST_BASE": base is not None}
    sums_BRR = torch.empty(blocks, rows, rows, dtype=torch.float64, device=device)
    with _launching(table_M):
        _gram[(blocks,)](*given, sums_BRR, size, count, **shape, num_warps=rows // 16)
    among = sums_BRR.sum(0).view(fold, width, fold, width).diagonal(dim1=0, dim2=2).sum(-1)
    return among[count - new : count, :count]


@triton.jit(do_not_specialize=["seed"])
def _dare(base, one, other, out, size, quarter, seed, dropped, scale, other_scale, BLOCK: tl.constexpr):
    """Four 32-bit words of a counter serve the four elements at its place in each quarter of the tensor, 16 bits each
    parent.
    """
    counters = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.randint4x(seed, counters)
    for part in tl.static_range(4):
        places = part * quarter + counters
        inside = (counters < quarter) & (places < size)
        word = words[part].to(tl.uint32, bitcast=True)
        origin = tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
        delta = tl.load(one + places, mask=inside, other=0.0).to(tl.float32) - origin
        total = origin + tl.where((word & 0xFFFF) >= dropped, delta * scale, 0.0)
        delta = tl.load(other + places, mask=inside, other=0.0).to(tl.float32) - origin
        total += tl.where((word >> 16) >= dropped, delta * other_scale, 0.0)
        tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


def dare(tensors: Sequence[Tensor], weights: Sequence[float], base: Tensor, *, drop_rate: float, seed: int) -> Tensor:
    """:func:`upit.merging.dare_linear` of two parents, which draws its masks as it goes.

    Masks are those of Philox (Salmon et al. 2011) by the seed and an element's place, whatever runs first; they keep
    with probability ``1 - drop_rate`` to within 2**-17.
    """
    one, other = tensors
    out = torch.empty_like(one)
    quarter = triton.cdiv(one.numel(), 4 * QUARTERS) * QUARTERS
    scales = [weight / (1.0 - drop_rate) for weight in weights]
    block = 1024
    with _launching(base):
        _dare[(triton.cdiv(quarter, block),)](
            base, one, other, out, one.numel(), quarter, seed, round(drop_rate * 2**16), *scales, BLOCK=block
        )
    return out
