"""Every setting of a run in TensorBoard's HParams table, and its final scores as text."""

from lightning.pytorch import Callback
from torch.utils.tensorboard.summary import hparams
from typing_extensions import override

from callbacks.pictures import run_of, tensorboards
from upit.tables import markdown, score_table, settings_table

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
    """Reads ``<run>/config.yaml``, which ``upit fit`` writes: each class by its name, each argument beneath it.

    Shows the settings as the text ``eval/settings`` too, and the scores of all stages as ``eval/scores``.
    """

    @override
    def on_fit_start(self, trainer, pl_module) -> None:
        settings = run_of(trainer).settings
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
