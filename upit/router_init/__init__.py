"""Stage 3: seed data, and what the rows of each router's weight are before post-training."""

from upit.router_init.base import FromFile, RandomRouter, RouterInit, WithoutData
from upit.router_init.hidden_states import HiddenMean, Ridge
from upit.router_init.routing_vectors import RoutingVectors
from upit.router_init.scoring import SeedBatches, Seeds, SeedScorer
from upit.router_init.seeds import Assignment, LowestPerplexity, RandomAssignment, RelativeLoss

__all__ = [
    "Assignment",
    "FromFile",
    "HiddenMean",
    "LowestPerplexity",
    "RandomAssignment",
    "RandomRouter",
    "RelativeLoss",
    "Ridge",
    "RouterInit",
    "RoutingVectors",
    "SeedBatches",
    "SeedScorer",
    "Seeds",
    "WithoutData",
]
