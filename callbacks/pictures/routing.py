"""Who gets which tokens, right after the swap or a growth and at every validation after it."""

import time
from typing import Any, ClassVar

from typing_extensions import override

from callbacks.pictures.base import Pictures, bar, run_of, tensorboards
from callbacks.protocol import UpcyclingModule
from callbacks.scalars import log_now
from upit.core.distributed import rank
from upit.evaluation.metrics import SUMMARY, DomainRouting, summary
from upit.evaluation.routing import count_heldout, domain_routing, expert_choices, token_view
from upit.report.token_text import token_text

DRAWING = 0.01


class RoutingPicture(Pictures):
    """Count the held-out tokens by layer, expert and domain: nothing in the training step.

    Counts ride along with the validation's own passes and stay on the device until its end. Each snapshot goes to
    ``<run>/routing/step_*.json`` and is logged as ``router/*``; pictures are drawn at the swap, at the end, and
    at the ends of epochs that are long enough for it to take at most ``DRAWING`` of the time. ``router/tokens`` is
    there as a picture and as a text.
    """

    tags = ("router/domains", "router/load", "router/over_time", "router/tokens")

    metrics: ClassVar = {"moe": tuple(f"router/{name}" for name in SUMMARY)}

    def __init__(self) -> None:
        self.metric: DomainRouting | None = None
        self.tokens: dict[str, Any] | None = None  # the latest view
        self._drawn_at = self._seconds = 0.0

    @override
    def on_train_start(self, trainer, pl_module) -> None:
        if rank() == 0:
            run_of(trainer).forget_routing_after(trainer.global_step if pl_module.phase == "moe" else 0)

    def on_upcycling_end(self, trainer, module: UpcyclingModule, upcycling) -> None:
        module.eval()
        metric = domain_routing(module.lm, trainer.datamodule)
        count_heldout(module.lm, metric, trainer.datamodule, autocast=module.autocast, track=bar("Counting routing"))
        log_now(trainer, self._snapshot(trainer, module, metric))
        module.train()
        self.show(trainer)

    on_growth_end = on_upcycling_end

    @override
    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        counts = pl_module.phase == "moe" and not trainer.sanity_checking
        self.metric = domain_routing(pl_module.lm, trainer.datamodule) if counts else None

    @override
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if self.metric is not None:
            self.metric.update(expert_choices(pl_module.lm), batch["example_ids"].flatten())

    @override
    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if self.metric is not None:
            pl_module.log_dict(self._snapshot(trainer, pl_module, self.metric))

    @override
    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if pl_module.phase == "moe" and (time.perf_counter() - self._drawn_at) * DRAWING > self._seconds:
            self.show(trainer)

    @override
    def on_train_end(self, trainer, pl_module) -> None:
        if pl_module.phase == "moe":
            self.show(trainer)

    @override
    def show(self, trainer) -> None:
        start = time.perf_counter()
        super().show(trainer)
        if self.tokens is not None:
            for writer in tensorboards(trainer):
                writer.add_text("router/tokens", token_text(self.tokens), trainer.global_step)
        self._drawn_at = time.perf_counter()
        self._seconds = self._drawn_at - start

    def _snapshot(self, trainer, module, metric: DomainRouting) -> dict[str, float]:
        """Write what was counted, and sum it up; a collective."""
        routing = {name: value.cpu() for name, value in metric.compute().items()}
        self.tokens = token_view(module.lm, trainer.datamodule, autocast=module.autocast)
        if rank() == 0 and trainer.state.fn == "fit":
            run_of(trainer).save_routing(trainer.global_step, trainer.datamodule.domains, routing, self.tokens)
        return {f"router/{name}": value for name, value in summary(**routing).items()}
