"""Scalars of one moment, which ``LightningModule.log`` would hold back to the next logging step and then repeat."""


def log_now(trainer, values: dict[str, float], step: int | None = None) -> None:
    """Log scalars at a step, the present one by default, whatever ``log_every_n_steps`` is."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step if step is None else step)
