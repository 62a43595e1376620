"""Triton kernel of the loss head: losses of a block of logits, and their gradient in the logits' place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from upit.core.batches import IGNORE

BLOCK = 4096


@triton.jit
def _cross_entropy(logits, targets, losses, width, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width
    target = tl.load(targets + row)
    counts = (target != IGNORE).to(tl.float32)
    chosen = tl.load(start + tl.maximum(target, 0)).to(tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(start + columns, mask=columns < width, other=-1e30).to(tl.float32)
        larger = tl.maximum(largest, values)
        total = total * tl.exp(largest - larger) + tl.exp(values - larger)
        largest = larger
    most = tl.max(largest, axis=0)
    log_sum = most + tl.log(tl.sum(total * tl.exp(largest - most), axis=0))
    tl.store(losses + row, (log_sum - chosen) * counts)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(start + columns, mask=columns < width, other=0.0).to(tl.float32)
        grads = (tl.exp(values - log_sum) - (columns == target).to(tl.float32)) * counts
        tl.store(start + columns, grads.to(logits.dtype.element_ty), mask=columns < width)


def cross_entropy_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Losses of each row, (C,) float32; ``logits_CV`` then holds the gradient of their sum."""
    losses_C = torch.empty(len(targets_C), dtype=torch.float32, device=logits_CV.device)
    _cross_entropy[(len(targets_C),)](
        logits_CV, targets_C, losses_C, logits_CV.shape[1], IGNORE=IGNORE, BLOCK=BLOCK, num_warps=8
    )
    return losses_C
