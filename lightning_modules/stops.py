"""The error that stops a fit whose numbers are not finite any more."""

from pathlib import Path
from typing import Any, NoReturn

import lightning as L

from upit.finite import NotFiniteError


def stop(module: Any, what: str, step: int) -> NoReturn:
    """Raises: NotFiniteError: names what is not finite, its optimizer step and phase, and the last good checkpoint."""
    trainer, phase = module.trainer, module.active
    last = last_checkpoint(trainer)
    saved = f"Last good checkpoint: {last}" if last else "No checkpoint was saved before"
    raise NotFiniteError(
        f"{what} of optimizer step {step} ({phase.phase} phase) is NaN or infinite; training stopped, and nothing was "
        f"saved after it. {saved}. Remedies: a lower lr (now {phase.lr:g}), a longer warmup_fraction (now "
        f"{phase.warmup_fraction:g}), a lower trainer.gradient_clip_val (now {trainer.gradient_clip_val}), "
        f"trainer.precision=bf16-mixed (now {trainer.precision}), or other training data"
    )


def last_checkpoint(trainer: L.Trainer) -> Path | None:
    """The checkpoint that this fit wrote last, or else the one it was resumed from."""
    paths: list[Any] = []
    for callback in trainer.checkpoint_callbacks:
        paths += [getattr(callback, name, None) for name in ("best_model_path", "last_model_path")]
        paths += getattr(callback, "best_k_models", {})
    found = [Path(path) for path in paths if path and Path(path).exists()]
    if not found and trainer.ckpt_path:
        return Path(trainer.ckpt_path)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
