"""Which dense models can be upcycled, to what, and what is refused."""

import pytest
from transformers import GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

from upit.families import check_top_k, expert_name, family_of, is_expert, moe_config


def test_experts_are_exactly_the_ffn_weights(dense):
    names = {name for name, _ in dense.named_parameters() if is_expert(name)}
    assert names == {
        expert_name(layer, projection) for layer in range(2) for projection in ("gate_proj", "up_proj", "down_proj")
    }


def test_the_moe_config_carries_all_that_shapes_the_dense_logits():
    dense = LlamaConfig(
        vocab_size=77,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        tie_word_embeddings=True,
    )
    moe = moe_config(dense, num_experts=4, top_k=3)
    assert isinstance(moe, MixtralConfig)
    assert (moe.num_local_experts, moe.num_experts_per_tok) == (4, 3)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(moe, field) == getattr(dense, field)
    assert moe.rope_parameters == dense.rope_parameters
    assert moe.sliding_window is None
    assert moe.router_jitter_noise == 0.0


@pytest.mark.parametrize("config", [GPT2Config(), Qwen2Config(), MixtralConfig()])
def test_an_architecture_without_a_moe_sibling_is_named_with_the_supported_ones(config):
    with pytest.raises(ValueError, match=rf"model_type='{config.model_type}'.*supported.*'llama'"):
        family_of(config)


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_biases_are_refused(field):
    with pytest.raises(ValueError, match=field):
        moe_config(LlamaConfig(**{field: True}), num_experts=4, top_k=2)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 0), (4, 5), (1, 2), (0, 1)])
def test_top_k_must_lie_between_one_and_the_experts(num_experts, top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k} must lie between 1 and num_experts={num_experts}"):
        check_top_k(num_experts, top_k)
