"""Dense families and the MoE family of stock transformers that each one upcycles to."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import MixtralConfig, PretrainedConfig

FFN = ("gate_proj", "up_proj", "down_proj")
_EXPERT = re.compile(r"^model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")


class Family(NamedTuple):
    """How one dense family maps to its MoE sibling."""

    moe_type: str
    moe_config: Callable[..., PretrainedConfig]


def is_expert(name: str) -> bool:
    """Whether a dense model's parameter becomes an expert's (the FFN's weights)."""
    return _EXPERT.match(name) is not None


def expert_name(layer: int, projection: str) -> str:
    """Name of one FFN weight in the dense state dict and in an expert's file."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


def family_of(config: PretrainedConfig) -> Family:
    """The family of a dense config.

    Raises: ValueError: the architecture has no MoE sibling here; names it and the supported ones.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r} can't be upcycled; supported dense architectures: {sorted(FAMILIES)}"
        )
    return FAMILIES[config.model_type]


def moe_config(dense: PretrainedConfig, *, num_experts: int, top_k: int) -> PretrainedConfig:
    """Config of the MoE with ``num_experts`` experts, ``top_k`` a token, each the size of the dense FFN.

    Raises: ValueError: unsupported architecture, top_k out of range, or a dense option the MoE can't express.
    """
    check_top_k(num_experts, top_k)
    return family_of(dense).moe_config(dense, num_experts=num_experts, top_k=top_k)


def check_top_k(num_experts: int, top_k: int) -> None:
    """Raises: ValueError: not 1 <= top_k <= num_experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")


_SHARED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
]


def _llama_to_mixtral(dense: PretrainedConfig, *, num_experts: int, top_k: int) -> MixtralConfig:
    for field in ("attention_bias", "mlp_bias"):
        if getattr(dense, field, False):
            raise ValueError(f"{field}=True: Mixtral has no biases, so this Llama can't be upcycled exactly")
    shared: dict[str, Any] = {field: getattr(dense, field) for field in _SHARED}
    return MixtralConfig(
        **shared,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        sliding_window=None,
        router_jitter_noise=0.0,
    )


FAMILIES = {"llama": Family("mixtral", _llama_to_mixtral)}
MOE_TYPES = frozenset(family.moe_type for family in FAMILIES.values())
