"""Pictures in TensorBoard, each group a callback of its own."""

from pathlib import Path
from typing import ClassVar

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm.auto import tqdm

from callbacks.protocol import UpcyclingModule
from upit.core.distributed import rank
from upit.report.figures.base import pixels
from upit.report.pictures import draw
from upit.report.run import Run


class Pictures(Callback):
    """Shows some of :data:`upit.report.pictures.PICTURES`; a run without TensorBoard draws nothing."""

    tags: ClassVar[tuple[str, ...]]

    def show(self, trainer) -> None:
        """Draw this callback's pictures as of now."""
        writers = tensorboards(trainer)
        run = run_of(trainer)
        for tag in self.tags if writers else ():
            figure = draw(tag, run)
            if figure is not None:
                for writer in writers:
                    writer.add_image(tag, pixels(figure), trainer.global_step, dataformats="HWC")


class LineagePicture(Pictures):
    """The family tree of the experts, as ``experts/lineage``."""

    tags = ("experts/lineage",)

    def on_upcycling_end(self, trainer, module: UpcyclingModule, upcycling) -> None:
        self.show(trainer)

    on_growth_end = on_upcycling_end


class SeedDataPicture(Pictures):
    """Perplexity by expert and domain, and the seed buckets, as ``experts/seed_data``."""

    tags = ("experts/seed_data",)

    def on_upcycling_end(self, trainer, module: UpcyclingModule, upcycling) -> None:
        self.show(trainer)


def run_of(trainer) -> Run:
    return Run(Path(trainer.default_root_dir))


def tensorboards(trainer) -> list:
    """The summary writers of a trainer; none on other ranks than 0."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if rank() == 0 else []


def bar(text: str):
    return lambda items: tqdm(items, desc=text, leave=False, disable=rank() > 0)
