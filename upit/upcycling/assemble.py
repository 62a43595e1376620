"""Model upcycling: assemble experts, router and another model's other weights into a MoE."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upit.core.prefetch import ahead
from upit.core.tensors import local, local_slices
from upit.model.families import FUSED, ROUTER, expert_name, family_of_moe, within_layer
from upit.model.sharding import reshard
from upit.preparation.expert import READERS, Expert


@torch.no_grad()
def upcycle(moe: PreTrainedModel, source: PreTrainedModel, experts: Sequence[Expert], router_DEH: Tensor) -> None:
    """Fill a MoE in place; elementwise, so that every rank fills its own shard and no model is gathered.

    Args:
        moe: MoE model of :func:`upit.model.families.moe_config` or ``grown_config``; all its weights are overwritten.
        source: dense model, or a MoE with fewer experts: gives every parameter that is neither an expert's nor a
            router's; must be sharded as ``moe`` is.
        experts: E experts on disk; their tensors are named as in the dense state dict.
        router_DEH: routing vectors, (layers, experts, hidden).
    Raises: KeyError: a MoE parameter has no source. ValueError: ``router_DEH`` has another shape.
    """
    config: Any = moe.config
    shape = (config.num_hidden_layers, len(experts), config.hidden_size)
    if tuple(router_DEH.shape) != shape:
        raise ValueError(f"router_DEH has shape {tuple(router_DEH.shape)}, expected {shape} (layers, experts, hidden)")
    reshard(source)
    others = dict(source.named_parameters())
    shared_expert = family_of_moe(moe.config).shared_expert(moe.config)
    for name, param in moe.named_parameters():
        target, where = local(param), local_slices(param)
        layer, part = within_layer(name)
        if part == f"{ROUTER}.weight":
            target.copy_(router_DEH[layer][where].to(target.device))
        elif part in FUSED:
            _fill_experts(target, where, experts, layer, FUSED[part])
        elif name in others:
            target.copy_(local(others[name]))
        elif part in shared_expert:
            target.copy_(shared_expert[part][where])
        else:
            raise KeyError(f"no source for the MoE's parameter {name!r}")


def _fill_experts(
    target: Tensor,
    where: tuple[slice, ...],
    experts: Sequence[Expert],
    layer: int,
    projections: tuple[str, ...],
) -> None:
    """Copy this rank's experts into a fused (E, rows, columns) parameter that is split over experts only."""

    def part_of(place: tuple[int, str]) -> Tensor:
        e, projection = place
        return experts[e].read(expert_name(layer, projection), device=target.device)

    places = [(e, projection) for e in range(where[0].start, where[0].stop) for projection in projections]
    rows = (row for slot in target for row in slot.chunk(len(projections)))
    for row, part in zip(rows, ahead(part_of, places, workers=READERS), strict=True):
        row.copy_(part)
