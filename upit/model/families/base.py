"""What a family says: the MoE config of a dense one, and where the MoE keeps its router, experts and shared expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# Means the same in every dense and MoE config; a family may lack some.
_SHARED = (
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
)


def head_dim(config: Any) -> int:
    """Size of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def ffn_size(config: Any) -> int:
    """Intermediate size of a dense model's FFN, or of one expert of a MoE."""
    return getattr(config, "moe_intermediate_size", None) or config.intermediate_size


class Family(ABC):
    """A dense architecture of stock transformers and the MoE architecture that expresses it exactly.

    transformers is imported only where a config is made: names and files need none of it, and it takes seconds.
    In memory every MoE family fuses its experts alike (``mlp.gate``, ``mlp.experts.gate_up_proj``,
    ``mlp.experts.down_proj``); the class attributes say what differs.
    """

    dense_type: ClassVar[str]
    moe_type: ClassVar[str]
    refused: ClassVar[tuple[str, ...]] = ()  # options of the dense config that the MoE lacks
    reason: ClassVar[str] = ""
    block_in_file: ClassVar[str] = "mlp"  # the MoE layer's name in checkpoint files
    ffn_in_file: ClassVar[tuple[str, str, str]] = FFN  # names of an expert's gate, up and down projections there
    norms: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")  # as wide as the model

    def moe_config(self, dense: PretrainedConfig, *, num_experts: int, top_k: int) -> PretrainedConfig:
        """Config of the MoE, each expert the size of the dense FFN.

        Raises: ValueError: the dense config has an option that the MoE can't express.
        """
        for field in self.refused:
            if getattr(dense, field, None):
                raise ValueError(
                    f"{field}={getattr(dense, field)!r}: {self.reason}, so this {self.dense_type} can't be upcycled"
                )
        shared = {field: getattr(dense, field) for field in _SHARED if hasattr(dense, field)}
        return self._moe_config(dense, shared, num_experts=num_experts, top_k=top_k)

    @abstractmethod
    def _moe_config(
        self, dense: PretrainedConfig, shared: dict[str, Any], *, num_experts: int, top_k: int
    ) -> PretrainedConfig:
        """The MoE's config class, from the fields both sides share."""

    def dense_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shape of every weight that a complete dense checkpoint holds, by its name.

        Args:
            config: the dense model's, with the fields that transformers fills in. Of a MoE's config, these are the
                shapes of the dense model it came from.
        """
        wide, inner = config.hidden_size, ffn_size(config)
        head = head_dim(config)
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": wide}
        layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (wide,) for norm in self.norms}
        for name, out in rows.items():
            layer[f"self_attn.{name}.weight"] = (out, queries if name == "o_proj" else wide)
            if name in self.biased(config):
                layer[f"self_attn.{name}.bias"] = (out,)
        for name, size in self.qk_norms(queries, keys, head).items():
            layer[f"self_attn.{name}.weight"] = (size,)
        for name in FFN:
            layer[f"mlp.{name}.weight"] = (wide, inner) if name == "down_proj" else (inner, wide)
        shapes = {"model.embed_tokens.weight": (config.vocab_size, wide), "model.norm.weight": (wide,)}
        for i in range(config.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes if config.tie_word_embeddings else {**shapes, "lm_head.weight": (config.vocab_size, wide)}

    def biased(self, config: Any) -> tuple[str, ...]:
        """The attention's projections that have a bias."""
        return ATTENTION if getattr(config, "attention_bias", False) else ()

    def qk_norms(self, queries: int, keys: int, head: int) -> dict[str, int]:
        """Size of the norms of queries and keys, by their names.

        Args:
            queries, keys: sizes of all heads together.
            head: size of one head.
        """
        return {}

    def shared_expert(self, moe: PretrainedConfig) -> dict[str, Tensor]:
        """Every weight of the shared expert, by its name within a layer, in float32; together they add nothing."""
        return {}

    def router_in_file(self, layer: int) -> str:
        """Name of a router's weight in checkpoint files."""
        return f"model.layers.{layer}.{self.block_in_file}.gate.weight"

    def expert_in_file(self, layer: int, expert: int, projection: str) -> str:
        """Name of one expert's weight in checkpoint files, which keep the experts apart."""
        own = self.ffn_in_file[FFN.index(projection)]
        return f"model.layers.{layer}.{self.block_in_file}.experts.{expert}.{own}.weight"
