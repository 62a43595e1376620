"""OLMo 2 to FlexOlmo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upit.model.families.base import Family

if TYPE_CHECKING:
    from transformers import FlexOlmoConfig, PretrainedConfig


class Olmo2(Family):
    """OLMo 2 to FlexOlmo (arXiv:2507.07024), which has the same attention and the norms after the sublayers too."""

    dense_type = "olmo2"
    moe_type = "flex_olmo"
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")

    def _moe_config(
        self, dense: PretrainedConfig, shared: dict[str, Any], *, num_experts: int, top_k: int
    ) -> FlexOlmoConfig:
        from transformers import FlexOlmoConfig

        return FlexOlmoConfig(
            **shared,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=True,
            attention_bias=dense.attention_bias,
        )

    def qk_norms(self, queries: int, keys: int, head: int) -> dict[str, int]:
        return {"q_norm": queries, "k_norm": keys}
