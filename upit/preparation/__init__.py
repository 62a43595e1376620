"""Stage 1: experts, where they come from and where they lie."""

from upit.preparation.expert import Expert, Rows
from upit.preparation.pool import Pool
from upit.preparation.sources import Checkpoints, Copies, DropUpcycling, ExpertSource, Harvested

__all__ = [
    "Checkpoints",
    "Copies",
    "DropUpcycling",
    "Expert",
    "ExpertSource",
    "Harvested",
    "Pool",
    "Rows",
]
