"""Which metrics there will be, and when: told before the fit, so that a callback does not wait for one in vain."""

import math
from typing import Any

import lightning as L

ALWAYS = ("epoch", "step")  # what ModelCheckpoint knows without anyone logging it


def logged(module: Any, trainer: L.Trainer) -> dict[str, set[str]]:
    """Names of the metrics of each phase, in the order of the phases.

    A callback of one's own that logs metrics says which in its attribute ``metrics``, ``{phase: names}``.
    """
    phases = {part.phase: part.training_metrics() | part.validation_metrics() for part in module.phases}
    for callback in trainer.callbacks:
        for phase, names in getattr(callback, "metrics", {}).items():
            phases.setdefault(phase, set()).update(names)
    return phases


def check_monitors(module: Any, trainer: L.Trainer) -> None:
    """Refuse a callback that monitors what no phase logs, or that would fail for want of it in the first phase.

    Raises: ValueError: names the callback, its metric, and those there will be.
    """
    phases = logged(module, trainer)
    for callback in trainer.callbacks:
        name = getattr(callback, "monitor", None)
        if name is None or name in ALWAYS:
            continue
        field = f"{type(callback).__name__}.monitor={name!r}"
        found = [phase for phase, names in phases.items() if name in names]
        if not found:
            raise ValueError(
                f"{field}: nothing logs it, only {sorted(set().union(*phases.values()))}; a callback of your own that "
                "logs it says so in its attribute metrics"
            )
        if found[0] != next(iter(phases)) and getattr(callback, "strict", True) and trainer.ckpt_path is None:
            remedy = "set its strict to false, or " if hasattr(callback, "strict") else ""
            raise ValueError(f"{field} is logged in the {found[0]} phase alone: {remedy}monitor val/loss")


def first_validation(trainer: L.Trainer, batches: int) -> float:
    """Optimizer step that the first validation comes after; infinity where there is none.

    Args:
        batches: training batches an epoch.
    """
    if not trainer.limit_val_batches:
        return math.inf
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    within = interval if isinstance(interval, int) else max(1, int(batches * interval))
    before = 0 if epochs is None else (epochs - 1) * batches
    return (before + within) / trainer.accumulate_grad_batches
