"""Stage 2: from a few experts to any number of them (arXiv:2410.01610, Algorithm 2)."""

from upit.expansion.expand import Expansion
from upit.expansion.merging import Dare, DareTies, Linear, Merge, Slerp, Ties
from upit.expansion.selection import (
    BestParents,
    Even,
    LastCheckpoints,
    MostDissimilar,
    MostDiverse,
    MostSimilar,
    Parents,
    RandomParents,
    Selection,
)
from upit.expansion.similarity import Cosine, Euclidean, Functional, Similarity

__all__ = [
    "BestParents",
    "Cosine",
    "Dare",
    "DareTies",
    "Euclidean",
    "Even",
    "Expansion",
    "Functional",
    "LastCheckpoints",
    "Linear",
    "Merge",
    "MostDissimilar",
    "MostDiverse",
    "MostSimilar",
    "Parents",
    "RandomParents",
    "Selection",
    "Similarity",
    "Slerp",
    "Ties",
]
