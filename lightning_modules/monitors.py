"""Which metrics there will be, and when: told before the fit, so that a callback does not wait for one in vain."""

import math
from typing import Any

import lightning as L

from lightning_modules.horizon import first_validation

ALWAYS = ("epoch", "step")  # what ModelCheckpoint knows without anyone logging it


def logged(module: Any, trainer: L.Trainer, *, by: float = math.inf) -> dict[str, set[str]]:
    """Names of the metrics of each phase, in the order of the phases.

    A callback of one's own that logs metrics says which in its attribute ``metrics``, ``{phase: names}``.

    Args:
        by: optimizer step of the fit that they must be there by; a validation after it comes too late.
    """
    trains = 0 < trainer.log_every_n_steps <= by
    validates = trainer.limit_val_batches if math.isinf(by) else first_validation(trainer) < by
    phases: dict[str, set[str]] = {}
    for part in module.phases:
        phases[part.phase] = part.training_metrics() if trains else set()
        phases[part.phase] |= part.validation_metrics() if validates else set()
    for callback in trainer.callbacks:
        for phase, names in getattr(callback, "metrics", {}).items():
            if phase in phases:
                phases[phase].update(names)
    return phases


def check_monitors(module: Any, trainer: L.Trainer) -> None:
    """Refuse a callback that monitors what no phase logs, or that would fail for want of it in the phase at the start.

    Raises: ValueError: names the callback, its metric, and those there will be.
    """
    phases = logged(module, trainer)
    start = (module.resumed or {"phase": module.phase})["phase"]
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
        if start not in found and getattr(callback, "strict", True):
            remedy = "set its strict to false, or " if hasattr(callback, "strict") else ""
            raise ValueError(f"{field} is logged in the {found[0]} phase alone: {remedy}monitor val/loss")
