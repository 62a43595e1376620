"""The swap in pictures: what it did to the losses, and where it stands in the curves."""

from typing import Any

from typing_extensions import override

from callbacks.pictures import Pictures, bar, run_of
from callbacks.protocol import UpcyclingModule
from callbacks.scalars import log_now
from upit.distributed import rank
from upit.pilot import domain_losses


class SwapPicture(Pictures):
    """Held-out loss of each domain right before and after the swap, and the phases of the run's curves.

    Writes ``<run>/upcycling/swap.json``, shows ``moe/swap``, logs ``moe/swap_loss_change/<domain>`` and ``moe/phase``:
    0 while dense and 1 from the swap on, a step that marks it. ``eval/loss_curves`` follows at the end of the fit.
    """

    tags = ("moe/swap",)

    def on_upcycling_start(self, trainer, module: UpcyclingModule, upcycling) -> None:
        self.before = self._losses(trainer, module)
        log_now(trainer, {"moe/phase": 0.0}, step=0)
        log_now(trainer, {"moe/phase": 0.0})

    def _losses(self, trainer, module: UpcyclingModule) -> dict[str, float]:
        track = bar("Losses around the swap")
        return domain_losses(module.lm, trainer.datamodule, autocast=module.autocast, track=track)

    def on_upcycling_end(self, trainer, module: UpcyclingModule, upcycling) -> None:
        after = self._losses(trainer, module)
        content: dict[str, Any] = {"step": trainer.global_step, "kl": upcycling.drift}
        if rank() == 0:
            run_of(trainer).save("upcycling/swap.json", {**content, "before": self.before, "after": after})
        changes = {f"moe/swap_loss_change/{name}": after[name] - loss for name, loss in self.before.items()}
        log_now(trainer, {**changes, "moe/phase": 1.0})
        self.show(trainer)


class CurvesPicture(Pictures):
    """The run's loss in one picture with the swap marked, as ``eval/loss_curves``, at the end of the fit."""

    tags = ("eval/loss_curves",)

    @override
    def on_fit_end(self, trainer, pl_module) -> None:
        for logger in trainer.loggers:
            logger.save()
        self.show(trainer)
