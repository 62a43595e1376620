"""How long a fit is, in batches and optimizer steps, told from the trainer's settings before it starts."""

import math

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def batches_per_epoch(trainer: L.Trainer) -> int:
    """Training batches of one epoch on this rank.

    Raises: ValueError: trainer.limit_train_batches leaves none.
    """
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    kept = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if kept < 1:
        raise ValueError(f"trainer.limit_train_batches={limit} leaves none of the epoch's {batches} batches; raise it")
    return kept


def steps_per_epoch(trainer: L.Trainer) -> int:
    """Optimizer steps of one epoch.

    Not ``trainer.estimated_stepping_batches``: that sets up the loader before a checkpoint's loops are restored, and a
    mid-epoch resume would then start the epoch's data anew (seen with lightning 2.6.6).

    Raises: ValueError: trainer.accumulate_grad_batches is below 1, or changes within the fit.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise ValueError(
            "GradientAccumulationScheduler gives each epoch another number of steps, and no schedule or swap could be "
            "planned: remove it from trainer.callbacks and set trainer.accumulate_grad_batches"
        )
    accumulate = trainer.accumulate_grad_batches
    if accumulate < 1:
        raise ValueError(f"trainer.accumulate_grad_batches={accumulate} must be at least 1")
    return math.ceil(batches_per_epoch(trainer) / accumulate)


def total_steps(trainer: L.Trainer) -> int:
    """Optimizer steps of the whole fit.

    Raises: ValueError: neither max_epochs nor max_steps bounds the fit; see also :func:`steps_per_epoch`.
    """
    epochs, steps, each = trainer.max_epochs, trainer.max_steps, steps_per_epoch(trainer)
    if epochs in (None, -1) and steps == -1:
        raise ValueError("set trainer.max_epochs or trainer.max_steps: the schedule needs a horizon")
    by_epochs = math.inf if epochs in (None, -1) else each * epochs
    return int(min(by_epochs, math.inf if steps == -1 else steps))


def described(trainer: L.Trainer) -> str:
    """How much training data there is and how many optimizer steps it gives, as one line."""
    data = trainer.datamodule
    parts = [f"{len(data.train_set)} training examples"]
    if hasattr(data, "rows"):  # a user's own data module may have none
        parts.append(f"{len(data.rows)} {'packed rows' if data.packing else 'batches of similar length'}")
    parts.append(f"{steps_per_epoch(trainer)} optimizer steps an epoch")
    return ", ".join([*parts, f"{total_steps(trainer)} optimizer steps in all"])


def check_validation(trainer: L.Trainer) -> None:
    """Raises: ValueError: trainer.val_check_interval is not positive, of which Lightning finds out in training."""
    if not _by_clock(trainer) and trainer.val_check_interval <= 0:
        raise ValueError(
            f"trainer.val_check_interval={trainer.val_check_interval} must be positive; to turn validation off, set "
            "trainer.limit_val_batches to 0"
        )


def first_validation(trainer: L.Trainer) -> float:
    """Optimizer step that the first validation comes after; infinity where there is none, or the clock says when."""
    if _by_clock(trainer) or not trainer.limit_val_batches:
        return math.inf
    batches = batches_per_epoch(trainer)
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    within = interval if isinstance(interval, int) else max(1, int(batches * interval))
    before = 0 if epochs is None else (epochs - 1) * batches
    return (before + within) / trainer.accumulate_grad_batches


def _by_clock(trainer: L.Trainer) -> bool:
    """Whether trainer.val_check_interval is a time, which Lightning keeps elsewhere."""
    return not hasattr(trainer, "val_check_interval")
