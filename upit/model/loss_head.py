"""Cross entropy behind the head, whose logits never exist for more than ``HEAD_TOKENS`` tokens at a time.

``L`` response tokens, ``C`` of them in a chunk, ``H`` hidden, ``V`` vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upit.core.gpu import HAS_TRITON

HEAD_TOKENS = 2048  # ours


def head_losses(head: nn.Module, states_LH: Tensor, targets_L: Tensor) -> Tensor:
    """Cross entropy of each token, (L,) float32 nats; 0 for a target of ``IGNORE``.

    The logits are computed again in the backward pass.
    """
    chunks = [
        checkpoint(_losses, head, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(states_LH.split(HEAD_TOKENS), targets_L.split(HEAD_TOKENS), strict=True)
    ]
    return torch.cat(chunks)


def _losses(head: nn.Module, states_LH: Tensor, targets_L: Tensor) -> Tensor:
    return F.cross_entropy(head(states_LH).float(), targets_L, reduction="none")


def head_loss(head: nn.Module, states_LH: Tensor, targets_L: Tensor) -> Tensor:
    """The sum of :func:`head_losses`.

    On GPUs, in half precision, the gradients are computed with the loss, so that no logits are computed twice.
    """
    from upit.model.attention import HALF, compute_dtype  # with transformers' models, which take seconds to import

    dtype = compute_dtype(states_LH)
    fused = HAS_TRITON and states_LH.is_cuda and dtype in HALF and type(head) is nn.Linear and head.bias is None
    if not (fused and torch.is_grad_enabled()):
        return head_losses(head, states_LH, targets_L).sum()
    return _HeadLoss.apply(states_LH, head.weight, targets_L, dtype)


class _HeadLoss(torch.autograd.Function):
    """Logits, losses and both gradients chunk by chunk, in one pass."""

    @staticmethod
    def forward(ctx, states_LH: Tensor, weight_VH: Tensor, targets_L: Tensor, dtype: torch.dtype) -> Tensor:
        from upit.model.loss_kernel import cross_entropy_

        ctx.dtypes = states_LH.dtype, weight_VH.dtype
        states_LH, weight_VH = states_LH.to(dtype), weight_VH.to(dtype)
        grad_LH = torch.empty_like(states_LH)
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=states_LH.device)
        for states_CH, targets_C, grad_CH in zip(
            states_LH.split(HEAD_TOKENS), targets_L.split(HEAD_TOKENS), grad_LH.split(HEAD_TOKENS), strict=True
        ):
            logits_CV = states_CH @ weight_VH.T
            total += cross_entropy_(logits_CV, targets_C).sum()
            torch.mm(logits_CV, weight_VH, out=grad_CH)
            if grad_VH is not None:
                grad_VH += torch.mm(logits_CV.T, states_CH, out_dtype=torch.float32)
        ctx.save_for_backward(grad_LH, grad_VH)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_LH, grad_VH = ctx.saved_tensors
        states_dtype, weight_dtype = ctx.dtypes
        of_weight = None if grad_VH is None else (grad_VH * grad).to(weight_dtype)
        return (grad_LH * grad).to(states_dtype), of_weight, None, None
