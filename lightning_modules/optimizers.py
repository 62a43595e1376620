"""The optimizer of a phase, and its learning rate over the phase's steps."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from upit.core.tensors import local
from upit.model.attention import HALF

SAMPLED_TENSORS, SAMPLED_WEIGHTS = 8, 4096  # of which lost updates are counted, and of each; ours
LOOKED_AT = 100  # steps in which they are; ours
MOST_LOST = 0.5  # part of them without a warning; ours


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


class LostUpdates:
    """Warns where weights of half precision barely move, because rounding swallows their updates.

    A bfloat16 weight has 8 significant bits: an update below about 0.2 % of it changes nothing. Counts the updates of
    a sample of the weights that change nothing, over the first steps after the warm-up, on the device.

    Args:
        optimizer: whose steps are looked at.
        warmup: steps of the warm-up, which are skipped.
        steps: steps to look at.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, warmup: int, steps: int) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        halves = [param for param in params if param.ndim > 1 and param.dtype in HALF]
        self._params = halves[:: -(-len(halves) // SAMPLED_TENSORS)] if halves else []
        self._skipped, self._left, self._steps = warmup, steps, steps
        self._counts: torch.Tensor | None = None  # updates that were lost, and all
        if self._params and steps > 0:
            self._hooks = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    def _before(self, optimizer: Any, args, kwargs) -> None:
        self._old = None if self._skipped else _sample(self._params)

    def _after(self, optimizer: Any, args, kwargs) -> None:
        if self._old is None:
            self._skipped -= 1
            return
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in self._params]
        updated = _sample(grads) != 0
        lost = updated & (_sample(self._params) == self._old)
        counts = torch.stack([lost.sum(), updated.sum()])
        self._counts = counts if self._counts is None else self._counts + counts
        self._left -= 1
        if not self._left:
            for hook in self._hooks:
                hook.remove()
            self._tell(optimizer)

    def _tell(self, optimizer: Any) -> None:
        lost, updates = self._counts.tolist()  # type: ignore[union-attr]
        group = optimizer.param_groups[0]
        if group["lr"] and updates and lost / updates > MOST_LOST:
            dtype, sample = str(self._params[0].dtype).removeprefix("torch."), updates // self._steps
            rank_zero_warn(
                f"{lost / updates:.0%} of the updates of {dtype} weights were lost to rounding in {self._steps} "
                f"optimizer steps at lr={group['initial_lr']:g} (a sample of {sample} weights): most weights barely "
                "move. Set trainer.precision=bf16-mixed, which keeps them in float32, or raise lr"
            )


def _sample(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The first values of each tensor, or of this rank's shard, one after the other."""
    return torch.cat([local(tensor.detach()).flatten()[:SAMPLED_WEIGHTS] for tensor in tensors])


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
    """AdamW that decays matrices and no norms, and a schedule with a horizon of ``steps``; warm-up is a part of it.

    Warns where most updates of half-precision weights are lost to rounding; see :class:`LostUpdates`.
    """
    trained = [p for p in params if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=lr, betas=betas, fused=trained[0].is_cuda or None)
    warmup = round(warmup_fraction * steps)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    LostUpdates(optimizer, warmup=warmup, steps=min(LOOKED_AT, steps - warmup))
    return optimizer, scheduler


def take_settings(
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    fresh: torch.optim.Optimizer,
    fresh_scheduler: LRScheduler,
) -> None:
    """Give a restored optimizer and its schedule the settings of fresh ones; moments and step stay.

    The learning rate becomes the one of the fresh schedule at the restored step.

    Raises: ValueError: the schedule is not a ``LambdaLR``, so its rate at a step is not known.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"{type(scheduler).__name__}: a resumed run takes other settings only with a schedule that is a LambdaLR; "
            "set them back as they were"
        )
    for group, wanted in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in wanted.items() if name not in ("params", "lr")})
    scheduler.base_lrs = fresh_scheduler.base_lrs
    rates = [
        lr * factor(scheduler.last_epoch) for lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates  # what get_last_lr tells
