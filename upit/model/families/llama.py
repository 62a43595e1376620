"""Mistral and Llama to Mixtral."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upit.model.families.base import Family

if TYPE_CHECKING:
    from transformers import MixtralConfig, PretrainedConfig


class Mistral(Family):
    """Mistral to Mixtral, whose attention is the same, its sliding window over all layers included."""

    dense_type = "mistral"
    moe_type = "mixtral"
    block_in_file = "block_sparse_moe"
    ffn_in_file = ("w1", "w3", "w2")

    def _moe_config(
        self, dense: PretrainedConfig, shared: dict[str, Any], *, num_experts: int, top_k: int
    ) -> MixtralConfig:
        from transformers import MixtralConfig

        window = getattr(dense, "sliding_window", None)
        return MixtralConfig(**shared, num_local_experts=num_experts, num_experts_per_tok=top_k, sliding_window=window)


class Llama(Mistral):
    """Llama to Mixtral: Mistral's architecture but for biases, and with no window."""

    dense_type = "llama"
    refused = ("attention_bias", "mlp_bias")
    reason = "Mixtral has no biases"
