"""Dense families and the MoE family of stock transformers that each one upcycles to: the table, and what it is for."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

from upit.model.families.base import FFN, Family, ffn_size, head_dim
from upit.model.families.llama import Llama, Mistral
from upit.model.families.olmo import Olmo2
from upit.model.families.qwen import Qwen2, Qwen3

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES: dict[str, Family] = {family.dense_type: family for family in (Llama(), Mistral(), Qwen2(), Qwen3(), Olmo2())}
MOE_TYPES = frozenset(family.moe_type for family in FAMILIES.values())
ROUTER = "mlp.gate"  # the router's module within a MoE layer
FUSED = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}

_EXPERT = re.compile(r"^model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def is_expert(name: str) -> bool:
    """Whether a dense model's parameter becomes an expert's (the FFN's weights)."""
    return _EXPERT.match(name) is not None


def expert_name(layer: int, projection: str) -> str:
    """Name of one FFN weight in the dense state dict and in an expert's file."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


def within_layer(name: str) -> tuple[int, str]:
    """Layer of a decoder layer's parameter and its name within; (-1, name) for any other."""
    found = _LAYER.match(name)
    return (int(found[1]), found[2]) if found else (-1, name)


def family_of(dense: PretrainedConfig) -> Family:
    """The family of a dense config.

    Raises: ValueError: the architecture has no MoE sibling here; names it and the supported ones.
    """
    if dense.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={dense.model_type!r} can't be upcycled; supported dense architectures: {sorted(FAMILIES)}"
        )
    return FAMILIES[dense.model_type]


def family_of_moe(moe: PretrainedConfig) -> Family:
    """A family by the config of its MoE; families that share a MoE keep it alike."""
    return next(family for family in FAMILIES.values() if family.moe_type == moe.model_type)


def moe_config(dense: PretrainedConfig, *, num_experts: int, top_k: int) -> PretrainedConfig:
    """Config of the MoE with ``num_experts`` experts, ``top_k`` a token, each the size of the dense FFN.

    Raises: ValueError: unsupported architecture, top_k out of range, or a dense option the MoE can't express.
    """
    check_top_k(num_experts, top_k)
    return family_of(dense).moe_config(dense, num_experts=num_experts, top_k=top_k)


def grown_config(moe: PretrainedConfig, *, num_experts: int) -> PretrainedConfig:
    """Config of the same MoE with another number of experts."""
    config = copy.deepcopy(moe)
    config.num_experts = num_experts
    return config


def check_top_k(num_experts: int, top_k: int) -> None:
    """Raises: ValueError: not 1 <= top_k <= num_experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")


__all__ = [
    "FAMILIES",
    "FFN",
    "FUSED",
    "MOE_TYPES",
    "ROUTER",
    "Family",
    "check_top_k",
    "expert_name",
    "family_of",
    "family_of_moe",
    "ffn_size",
    "grown_config",
    "head_dim",
    "is_expert",
    "moe_config",
    "within_layer",
]
