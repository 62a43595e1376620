"""The checkpoints before they become experts: scores per domain, and distance travelled."""

from callbacks.pictures.base import Pictures, bar, run_of
from callbacks.protocol import UpcyclingModule
from callbacks.scalars import log_now
from upit.core.distributed import rank
from upit.evaluation.pilot import distances, score_checkpoints, specialist_gain
from upit.preparation.pool import Pool


class PilotPicture(Pictures):
    """Score every harvested expert on the held-out set right before the swap (arXiv:2410.01610, Figure 2).

    Writes ``<run>/upcycling/pilot.json``, shows ``harvest/pilot``, logs ``harvest/specialist_gain_*``.

    Args:
        exact_match: generate answers too; about as long as one scoring of the run's report for each checkpoint.
    """

    tags = ("harvest/pilot",)

    def __init__(self, exact_match: bool = True) -> None:
        self.exact_match = exact_match

    def on_upcycling_start(self, trainer, module: UpcyclingModule, upcycling) -> None:
        scored = score_checkpoints(
            module.lm,
            upcycling.harvest.collect().experts,
            trainer.datamodule,
            exact_match=self.exact_match,
            autocast=module.autocast,
            track=bar("Scoring checkpoints"),
        )
        metrics = ("loss", "exact_match") if self.exact_match else ("loss",)
        log_now(trainer, {f"harvest/specialist_gain_{name}": specialist_gain(scored, name) for name in metrics})
        if rank() == 0:
            run_of(trainer).save("upcycling/pilot.json", scored)
        self.show(trainer)


class DiversityPicture(Pictures):
    """Similarity of the experts and distance travelled by the checkpoints.

    Writes ``<run>/upcycling/distances.json``, shows ``experts/similarity`` and ``harvest/distance``, logs the scalars
    ``harvest/from_base`` and ``harvest/from_previous`` at each checkpoint's step.
    """

    tags = ("experts/similarity", "harvest/distance")

    def on_upcycling_end(self, trainer, module: UpcyclingModule, upcycling) -> None:
        if rank() == 0:
            run = run_of(trainer)
            pool = Pool.load(run.directory / "experts")
            points = distances(pool.experts, pool.base, track=bar("Measuring distances"))
            run.save("upcycling/distances.json", points)
            for point in points:
                values = {f"harvest/{key}": point[key] for key in ("from_base", "from_previous")}
                log_now(trainer, values, step=point["step"])
        self.show(trainer)

    def on_growth_end(self, trainer, module: UpcyclingModule, growth) -> None:
        self.show(trainer)
