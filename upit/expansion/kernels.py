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

FEW = 8  # experts at most, whose products a warp holds in registers
LANES, EACH = 32, 4  # of a warp, and the columns that a thread reads at a time
STEPS = 32  # of one warp, whose products a thread sums in float32; the threads' sums in float64
STAGES = 4  # steps whose loads are under way together
COLUMNS = 128  # of a tile of more experts, whose products are summed in float32; the tiles' sums in float64
TILES = 32  # of a program
ROW_BLOCK = 1024  # products of a new row that a warp sums in float32; the blocks' sums in float64
QUARTERS = 16  # a quarter of a tensor is a multiple of it, so that all four are read in vectors


_LOCK = Lock()


@contextmanager
def _launching(tensor: Tensor) -> Iterator[None]:
    """For threads that launch kernels: each has a current device of its own, and one at a time may compile."""
    with _LOCK, torch.cuda.device_of(tensor):
        yield


@triton.jit
def _few(
    experts, base, sums, size, LANES: tl.constexpr, EACH: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr
):
    """sums[block]: products of all experts; each thread sums those of its own columns until the end."""
    M: tl.constexpr = len(experts)
    totals = (tl.zeros((LANES,), dtype=tl.float32),) * (M * (M + 1) // 2)
    own = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    for step in tl.range(STEPS, num_stages=STAGES):
        columns = (tl.program_id(0) * STEPS + step) * (LANES * EACH) + own
        inside = columns < size
        deltas = [tl.load(expert + columns, mask=inside, other=0.0).to(tl.float32) for expert in experts]
        if base is not None:
            origin = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
            deltas = [delta - origin for delta in deltas]
        before = totals
        totals = ()
        for a in tl.static_range(M):
            for b in tl.static_range(a + 1):
                totals += (before[len(totals)] + tl.sum(deltas[a] * deltas[b], axis=1),)
    totals = [tl.sum(total.to(tl.float64)) for total in totals]
    sums += tl.program_id(0) * M * M
    for a in tl.static_range(M):
        for b in tl.static_range(a + 1):
            tl.store(sums + a * M + b, totals[a * (a + 1) // 2 + b])
            tl.store(sums + b * M + a, totals[a * (a + 1) // 2 + b])


@triton.jit
def _gram(experts, base, sums, size, num_experts, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """sums[block]: products of all experts, on tensor cores.

    Each factor is the sum of two of bfloat16. Low times high is the transpose of high times low, and low times low is
    left out, which is 3e-6 of a squared norm for float32 experts; so two products a tile do. The mixed ones, 2**-8 of
    the others, stay in float32 over a program.
    """
    ROWS: tl.constexpr = len(experts)
    rows = tl.arange(0, ROWS)
    there = (rows < num_experts)[:, None]
    addresses = tl.zeros((ROWS,), dtype=tl.int64)
    for m in tl.static_range(ROWS):
        addresses = tl.where(rows == m, experts[m].to(tl.int64), addresses)
    starts = addresses.to(experts[0].dtype)[:, None]
    total = tl.zeros((ROWS, ROWS), dtype=tl.float64)
    mixed = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for tile in range(TILES):
        columns = (tl.program_id(0) * TILES + tile) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = columns < size
        places = tl.multiple_of(starts + columns, [1, 16])
        deltas = tl.load(places, mask=there & inside, other=0.0).to(tl.float32)
        if base is not None:
            deltas -= tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
        high = deltas.to(tl.bfloat16)
        low = (deltas - high.to(tl.float32)).to(tl.bfloat16)
        total += tl.dot(high, tl.trans(high)).to(tl.float64)
        mixed = tl.dot(low, tl.trans(high), mixed)
    total += (mixed + tl.trans(mixed)).to(tl.float64)
    places = (tl.program_id(0) * ROWS + rows[:, None]) * ROWS + rows[None, :]
    tl.store(sums + places, total)


@triton.jit
def _row(experts, newest, base, sums, size, num_experts, BLOCK: tl.constexpr):
    """sums[block, m]: products of the newest expert with expert m."""
    block = tl.program_id(0)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    own = tl.load(newest + columns, mask=inside, other=0.0).to(tl.float32)
    if base is not None:
        origin = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
        own -= origin
    for m in tl.static_range(len(experts)):
        if m < num_experts:
            delta = tl.load(experts[m] + columns, mask=inside, other=0.0).to(tl.float32)
            if base is not None:
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
    if new == 1:
        return _newest(tensors, base)
    return (_among_few if len(tensors) <= FEW else _among_many)(tensors, base)[-new:]


def _newest(tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    newest, count = tensors[-1], len(tensors)
    blocks = triton.cdiv(newest.numel(), ROW_BLOCK)
    sums_BM = torch.empty(blocks, count, dtype=torch.float32, device=newest.device)
    with _launching(newest):
        _row[(blocks,)](
            _filled_up(tensors), newest, base, sums_BM, newest.numel(), count, BLOCK=ROW_BLOCK, num_warps=1
        )
    return sums_BM.sum(0, dtype=torch.float64)[None]


def _among_few(tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    count, size = len(tensors), tensors[0].numel()
    shape = {"LANES": LANES, "EACH": EACH, "STEPS": STEPS, "STAGES": STAGES}
    blocks = triton.cdiv(size, LANES * EACH * STEPS)
    sums_BMM = torch.empty(blocks, count, count, dtype=torch.float64, device=tensors[0].device)
    with _launching(sums_BMM):
        _few[(blocks,)](tuple(tensors), base, sums_BMM, size, **shape, num_warps=1)
    return sums_BMM.sum(0)


def _among_many(tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    count, size, filled = len(tensors), tensors[0].numel(), _filled_up(tensors)
    blocks, rows = triton.cdiv(size, COLUMNS * TILES), len(filled)
    sums_BRR = torch.empty(blocks, rows, rows, dtype=torch.float64, device=tensors[0].device)
    with _launching(sums_BRR):
        _gram[(blocks,)](filled, base, sums_BRR, size, count, COLUMNS=COLUMNS, TILES=TILES, num_warps=rows // 16)
    return sums_BRR.sum(0)[:count, :count]


def _filled_up(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """To a power of two, so that few kernels are compiled as experts come; 16 is what tensor cores take at least."""
    return (*tensors, *[tensors[0]] * (max(16, triton.next_power_of_2(len(tensors))) - len(tensors)))


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
    """:func:`upit.expansion.merging.dare_linear` of two parents, which draws its masks as it goes.

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
