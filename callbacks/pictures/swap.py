"""The swap in pictures: what it did to the losses, and where it stands in the curves."""

from typing import Any

from typing_extensions import override

from callbacks.pictures.base import Pictures, bar, run_of
from callbacks.protocol import UpcyclingModule
from callbacks.scalars import log_now
from upit.core.distributed import rank
from upit.evaluation.scores import domain_losses


class SwapPicture(Pictures):
    """Held-out loss of each domain right before and after the swap, and a growth; the phases of the run's curves.

    Writes ``swap.json`` in ``<run>/upcycling`` and ``<run>/growth``, shows ``moe/swap``, logs
    ``moe/swap_loss_change/<domain>``, ``moe/growth_loss_change/<domain>`` and ``moe/phase``: 0 while dense, 1 from the
    swap and 2 from the growth on, steps that mark them. ``eval/loss_curves`` follows at the end of the fit.
    """

    tags = ("moe/swap",)

    def on_upcycling_start(self, trainer, module: UpcyclingModule, upcycling) -> None:
        log_now(trainer, {"moe/phase": 0.0}, step=0)
        self._before(trainer, module, phase=0.0)

    def _losses(self, trainer, module: UpcyclingModule) -> dict[str, float]:
        track = bar("Losses around the swap")
        return domain_losses(module.lm, trainer.datamodule, autocast=module.autocast, track=track)

    def on_upcycling_end(self, trainer, module: UpcyclingModule, upcycling) -> None:
        self._after(trainer, module, upcycling, "swap", phase=1.0)

    def on_growth_start(self, trainer, module: UpcyclingModule, growth) -> None:
        self._before(trainer, module, phase=1.0)

    def on_growth_end(self, trainer, module: UpcyclingModule, growth) -> None:
        self._after(trainer, module, growth, "growth", phase=2.0)

    def _before(self, trainer, module: UpcyclingModule, *, phase: float) -> None:
        self.before = self._losses(trainer, module)
        log_now(trainer, {"moe/phase": phase})

    def _after(self, trainer, module: UpcyclingModule, event, what: str, *, phase: float) -> None:
        after = self._losses(trainer, module)
        content: dict[str, Any] = {"step": trainer.global_step, "kl": event.drift}
        if rank() == 0:
            run_of(trainer).save(f"{event.name}/swap.json", {**content, "before": self.before, "after": after})
        changes = {f"moe/{what}_loss_change/{name}": after[name] - loss for name, loss in self.before.items()}
        log_now(trainer, {**changes, "moe/phase": phase})
        self.show(trainer)


class CurvesPicture(Pictures):
    """The run's loss in one picture, swap and growth marked, as ``eval/loss_curves``, at the end of the fit."""

    tags = ("eval/loss_curves",)

    @override
    def on_fit_end(self, trainer, pl_module) -> None:
        for logger in trainer.loggers:
            logger.save()
        self.show(trainer)
