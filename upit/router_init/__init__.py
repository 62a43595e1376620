"""Router initialisation: what the rows of each router's weight are before post-training."""

from upit.router_init.base import FromFile, Random, RouterInit, WithoutData
from upit.router_init.hidden_states import HiddenMean, Ridge
from upit.router_init.routing_vectors import RoutingVectors, optimise_routing_vectors, routing_loss

__all__ = [
    "FromFile",
    "HiddenMean",
    "Random",
    "Ridge",
    "RouterInit",
    "RoutingVectors",
    "WithoutData",
    "optimise_routing_vectors",
    "routing_loss",
]
