"""The error that stops a fit whose numbers are not finite any more."""

from typing import Any, NoReturn

from upit.core.finite import NotFiniteError
from upit.model.loading.identity import last_checkpoint


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
