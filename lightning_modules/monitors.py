"""What callbacks can rely on: which metrics there will be, and when; told before the fit."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
)

from lightning_modules.horizon import first_validation

ALWAYS = ("epoch", "step")  # what ModelCheckpoint knows without anyone logging it

UNSUPPORTED: dict[type[L.Callback], str] = {
    BackboneFinetuning: "looks for an attribute backbone, which the module does not have",
    BatchSizeFinder: "changes data.batch_size in trial fits, and steps could not be counted: set data.batch_size",
    LearningRateFinder: "trains trial steps, which would count towards harvest and swap: set lr",
    ModelPruning: "prunes the parameters that it finds in setup, when the model is not built yet",
}


def check_supported(trainer: L.Trainer) -> None:
    """Raises: ValueError: a callback of Lightning's can't work with these modules; names it with the reason."""
    for callback in trainer.callbacks:
        for kind, reason in UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise ValueError(f"{type(callback).__name__} {reason}. Remove it from trainer.callbacks")


def logged(module: Any, trainer: L.Trainer, *, by: float = math.inf) -> dict[str, set[str]]:
    """Names of the metrics of each phase, in the order of the phases.

    A callback of one's own that logs metrics says which in its attribute ``metrics``, ``{phase: names}``. An attribute
    of that name that is something else means nothing here.

    Args:
        by: optimizer step of the fit that they must be there by; a validation after it comes too late.
    """
    trains = 0 < trainer.log_every_n_steps <= by
    validates = trainer.limit_val_batches if math.isinf(by) else first_validation(trainer) < by
    phases: dict[str, set[str]] = {}
    for part in module.phases:
        phases[part.phase] = part.training_metrics() if trains else set()
        phases[part.phase] |= part.validation_metrics() if validates else set()
    return {phase: names | declared(trainer, phase) for phase, names in phases.items()}


def declared(trainer: L.Trainer, phase: str) -> set[str]:
    """Names of the metrics that callbacks say they log in a phase."""
    found: set[str] = set()
    for callback in trainer.callbacks:
        metrics = getattr(callback, "metrics", None)
        names = metrics.get(phase, ()) if isinstance(metrics, Mapping) else ()
        if isinstance(names, str):
            found.add(names)
        elif isinstance(names, list | tuple | set | frozenset):
            found.update(name for name in names if isinstance(name, str))
    return found


def check_monitors(module: Any, trainer: L.Trainer) -> None:
    """Refuse a callback that monitors what no phase logs, or that would fail for want of it in the phase at the start.

    A ``ModelCheckpoint`` may monitor a metric of one phase: see :class:`PhaseCheckpoints`.

    Raises: ValueError: names the callback, its metric, and those there will be.
    """
    phases = logged(module, trainer)
    start = (module.resumed or {"phase": module.phase})["phase"]
    for callback in trainer.callbacks:
        name = getattr(callback, "monitor", None)
        if not isinstance(name, str) or name in ALWAYS:
            continue
        field = f"{type(callback).__name__}.monitor={name!r}"
        found = [phase for phase, names in phases.items() if name in names]
        if not found:
            raise ValueError(
                f"{field}: nothing logs it, only {sorted(set().union(*phases.values()))}; a callback of your own that "
                f"logs it says so in its attribute metrics, such as {{{start!r}: [{name!r}]}}"
            )
        if isinstance(callback, ModelCheckpoint):
            continue
        if isinstance(callback, EarlyStopping) and module.owed_step is not None and "moe" not in found:
            raise ValueError(
                f"{field} is logged in the dense phase alone, and its last value would stop the MoE's training: "
                "monitor moe/val_loss with strict set to false, or val/loss"
            )
        if start not in found and getattr(callback, "strict", True):
            remedy = "set its strict to false, or " if hasattr(callback, "strict") else ""
            raise ValueError(f"{field} is logged in the {found[0]} phase alone: {remedy}monitor val/loss")


class PhaseCheckpoints:
    """Lets each ``ModelCheckpoint`` rank only models of the phases that log the metric it monitors.

    Lightning's would raise where the metric is not there yet, and would rank a MoE by the dense phase's last value. A
    callback that waits has ``save_top_k=0`` meanwhile; ``save_last`` goes on.
    """

    def __init__(self) -> None:
        self._waiting: dict[ModelCheckpoint, int] = {}  # their save_top_k

    @property
    def awaited(self) -> set[str]:
        """Metrics that a callback waits for."""
        return {str(callback.monitor) for callback in self._waiting}

    def hold(self, trainer: L.Trainer) -> None:
        """Let all wait for a value of their metric: at the start of a fit, and where another model takes its place."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor not in (None, *ALWAYS):
                self._waiting.setdefault(callback, callback.save_top_k)
                callback.save_top_k = 0

    def release(self, logged: Collection[str]) -> None:
        """Let those go on whose metric was logged."""
        for callback in [waiting for waiting in self._waiting if waiting.monitor in logged]:
            callback.save_top_k = self._waiting.pop(callback)
