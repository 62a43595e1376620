"""Every setting of a run in TensorBoard's HParams table, and its final scores as text."""

from lightning.pytorch import Callback
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

from callbacks.pictures.base import run_of, tensorboards
from upit.core.distributed import rank
from upit.report.run import choices
from upit.report.tables import markdown, score_table, settings_table

METRICS = (
    "eval/base/loss",
    "eval/dense/loss",
    "eval/dense/exact_match",
    "eval/final/loss",
    "eval/final/exact_match",
    "harvest/specialist_gain_loss",
    "moe/swap_drift_kl",
    "router/mutual_information",
    "router/dead_experts",
)


class HParams(Callback):
    """Each class of ``<run>/config.yaml`` by its name, each argument beneath it, and the strategies left to defaults.

    Keeps them in ``<run>/settings.json``. Shows them as the text ``eval/settings`` too, and all stages' scores as
    ``eval/scores``.
    """

    @override
    def on_fit_start(self, trainer, pl_module) -> None:
        run = run_of(trainer)
        owners = {type(callback).__name__.lower(): callback for callback in trainer.callbacks}
        settings = run.config
        for key, owner in {**owners, "model.moe": getattr(pl_module, "moe", pl_module)}.items():
            settings |= choices(key, owner)
        if rank() == 0:
            run.save("settings.json", settings)
        for writer in tensorboards(trainer):
            experiment, start, self.end = hparams(settings, dict.fromkeys(METRICS, 0.0))
            writer.file_writer.add_summary(experiment)
            writer.file_writer.add_summary(start)
            writer.add_text("eval/settings", markdown(*settings_table({"value": settings})), 0)

    @override
    def on_fit_end(self, trainer, pl_module) -> None:
        report = run_of(trainer).report
        for writer in tensorboards(trainer):
            writer.file_writer.add_summary(self.end)
            if report:
                writer.add_text("eval/scores", markdown(*score_table(report)), trainer.global_step)
