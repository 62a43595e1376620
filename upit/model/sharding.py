"""Shard a model with FSDP2, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, mesh) -> None:
    """Shard a transformers causal LM with FSDP2: each decoder layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: torch.nn.Module) -> None:
    """Shard again what a pass without a backward pass left whole: FSDP2 keeps the root's own parameters gathered."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()
