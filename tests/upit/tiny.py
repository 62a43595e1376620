"""Tiny dense models of every family, in memory and on disk."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from upit.model.families import is_expert
from upit.preparation.expert import Expert
from upit.preparation.pool import write_expert

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
CONFIGS = {
    "llama": (
        LlamaConfig,
        {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
    ),
    "mistral": (MistralConfig, {"sliding_window": 6, "head_dim": 16}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "attention_bias": True}),
    "olmo2": (Olmo2Config, {}),
}


def dense_config(family: str, **fields) -> PretrainedConfig:
    kind, own = CONFIGS[family]
    return kind(**{**SIZES, **own, **fields})


def dense_model(family: str, seed: int = 0, **fields) -> PreTrainedModel:
    """Random, its norms and biases too, so that a parameter left out or misplaced shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(dense_config(family, **fields)).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * (0.3 if param.ndim == 1 else 0.1))
    return model


def expert_of(model: PreTrainedModel, path: Path) -> Expert:
    tensors = {name: param.detach() for name, param in model.named_parameters() if is_expert(name)}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return Expert(path, write_expert(path, tensors.items(), specs), "float32")
