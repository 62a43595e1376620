"""The optimizer of a phase, and its learning rate over the phase's steps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler


class AdamW(torch.optim.AdamW):
    """torch's; fused, it can clip gradients by their norm within its step, where it reads them anyway.

    A fused optimizer divides gradients by its ``grad_scale``, which is how torch's GradScaler has it unscale them; of
    this one, Lightning unscales them before.
    """

    grad_scale: torch.Tensor | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._step_supports_amp_scaling = False
        self.register_step_post_hook(_forget_scale)

    @property
    def clips(self) -> bool:
        """Whether :meth:`clip` works."""
        return all(group["fused"] for group in self.param_groups)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Let the next step clip as ``torch.nn.utils.clip_grad_norm_`` does. Not for shards.

        Returns: the norm, not clipped.
        """
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0)  # float32 is all that fused steps take
        return norm


def _forget_scale(optimizer: Any, args, kwargs) -> None:
    optimizer.grad_scale = None


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
    optimizer = AdamW(groups, lr=lr, betas=betas, fused=trained[0].is_cuda or None)
    warmup = round(warmup_fraction * steps)
    return optimizer, get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
