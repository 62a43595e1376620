"""Llama and Mistral to Mixtral."""

from typing import Any

from transformers import MixtralConfig, PretrainedConfig

from upit.families.base import Family


class Llama(Family):
    """Llama to Mixtral, which has no biases."""

    dense_type = "llama"
    moe_type = "mixtral"
    refused = ("attention_bias", "mlp_bias")
    reason = "Mixtral has no biases"
    block_in_file = "block_sparse_moe"
    ffn_in_file = ("w1", "w3", "w2")

    def _moe_config(
        self, dense: PretrainedConfig, shared: dict[str, Any], *, num_experts: int, top_k: int
    ) -> MixtralConfig:
        window = getattr(dense, "sliding_window", None)
        return MixtralConfig(**shared, num_local_experts=num_experts, num_experts_per_tok=top_k, sliding_window=window)


class Mistral(Llama):
    """Mistral to Mixtral, whose attention is the same, its sliding window over all layers included."""

    dense_type = "mistral"
    refused = ()
