"""The optimizer of a phase, and its learning rate over the phase's steps."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


def adamw(
    params: Iterable[nn.Parameter],
    steps: int,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    schedule: str,
    warmup_fraction: float,
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW that decays matrices and no norms, and a schedule with a horizon of ``steps``; warm-up is a part of it."""
    trained = [p for p in params if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=trained[0].is_cuda or None)
    # let Lightning unscale: under mixed precision it refuses to clip for optimizers that do it themselves
    optimizer._step_supports_amp_scaling = False
    warmup = round(warmup_fraction * steps)
    return optimizer, get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def clips_in_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether :func:`clip_in_step` can clip for this optimizer: fused AdamW of tensors that are no shards."""
    fused = isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
    return fused and not any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])


def clip_in_step(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Clip gradients by their norm, as ``torch.nn.utils.clip_grad_norm_``, where the next step reads them anyway.

    A fused optimizer divides gradients by its ``grad_scale``, which is how torch's GradScaler has it unscale them.

    Returns: the norm, not clipped.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
    return norm
