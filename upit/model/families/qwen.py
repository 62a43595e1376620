"""Qwen2 to Qwen2-MoE and Qwen3 to Qwen3-MoE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upit.model.families.base import ATTENTION, Family

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

SHARED_WIDTH = 8


class Qwen2(Family):
    """Qwen2 to Qwen2-MoE, the biases of q, k and v kept.

    Qwen2-MoE always has a shared expert that every token visits. Here it is ``SHARED_WIDTH`` wide and zero: it adds
    exactly nothing, whatever its gate says. It has no gradient either, so it stays out of post-training.
    """

    dense_type = "qwen2"
    moe_type = "qwen2_moe"
    refused = ("use_sliding_window",)
    reason = "Qwen2-MoE puts the windows on other layers"

    def _moe_config(
        self, dense: PretrainedConfig, shared: dict[str, Any], *, num_experts: int, top_k: int
    ) -> Qwen2MoeConfig:
        from transformers import Qwen2MoeConfig

        return Qwen2MoeConfig(
            **shared,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=dense.intermediate_size,
            shared_expert_intermediate_size=SHARED_WIDTH,
            norm_topk_prob=True,
            qkv_bias=True,
        )

    def biased(self, config: Any) -> tuple[str, ...]:
        return ATTENTION[:3]

    def shared_expert(self, moe: PretrainedConfig) -> dict[str, Tensor]:
        import torch

        wide, narrow = moe.hidden_size, moe.shared_expert_intermediate_size
        return {
            "mlp.shared_expert.gate_proj.weight": torch.zeros(narrow, wide, dtype=torch.float32),
            "mlp.shared_expert.up_proj.weight": torch.zeros(narrow, wide, dtype=torch.float32),
            "mlp.shared_expert.down_proj.weight": torch.zeros(wide, narrow, dtype=torch.float32),
            "mlp.shared_expert_gate.weight": gate_row(wide),
        }


def gate_row(hidden_size: int) -> Tensor:
    """Gate of a shared expert that is zero, (1, H) float32: its logit must not be zero (ours).

    llama.cpp computes the sigmoid of a logit ``z`` as ``silu(z) / z``, which is NaN at zero. The entries 1, 2**-12 and
    then 2**-24, the smallest number of float16, make an exact zero rarer than equal entries do: where the logit is
    near zero its largest terms are small, and so are the steps to which their sum is rounded.
    """
    import torch

    row_H = torch.full((hidden_size,), 2.0**-24, dtype=torch.float32)
    row_H[0], row_H[1] = 1.0, 2.0**-12
    return row_H[None]


class Qwen3(Family):
    """Qwen3 to Qwen3-MoE."""

    dense_type = "qwen3"
    moe_type = "qwen3_moe"
    refused = ("use_sliding_window",)
    reason = "Qwen3-MoE has one window for all layers"

    def _moe_config(
        self, dense: PretrainedConfig, shared: dict[str, Any], *, num_experts: int, top_k: int
    ) -> Qwen3MoeConfig:
        from transformers import Qwen3MoeConfig

        return Qwen3MoeConfig(
            **shared,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            moe_intermediate_size=dense.intermediate_size,
            norm_topk_prob=True,
            attention_bias=dense.attention_bias,
        )

    def qk_norms(self, queries: int, keys: int, head: int) -> dict[str, int]:
        return {"q_norm": head, "k_norm": head}
