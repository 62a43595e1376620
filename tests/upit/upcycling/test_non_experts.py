"""Where the parameters that are no expert's come from."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.upit.tiny import dense_config, dense_model, expert_of
from upit.core.tensor_files import TensorFileError
from upit.model.families import is_expert, moe_config
from upit.upcycling.non_experts import LastNonExperts, MeanNonExperts, NamedNonExperts, check_filled


@pytest.fixture
def pool(tmp_path):
    experts = []
    for seed in range(3):
        model = dense_model("llama", seed)
        expert = expert_of(model, tmp_path / f"{seed}.safetensors")
        expert.rest = tmp_path / f"{seed}.rest.safetensors"
        save_file({n: p.detach() for n, p in model.named_parameters() if not is_expert(n)}, expert.rest)
        experts.append(expert)
    return experts


def filled(strategy, pool):
    """Parameters before and after."""
    dense = dense_model("llama", 7)
    before = {name: param.detach().clone() for name, param in dense.named_parameters()}
    strategy.fill(dense, pool)
    return before, {name: param.detach() for name, param in dense.named_parameters()}


def test_last_leaves_the_dense_model(pool):
    before, after = filled(LastNonExperts(), pool)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_mean_is_over_the_pool_and_leaves_the_experts(pool):
    before, after = filled(MeanNonExperts(), pool)
    models = [dict(dense_model("llama", seed).named_parameters()) for seed in range(3)]
    for name in after:
        expected = before[name] if is_expert(name) else sum(model[name].detach() for model in models) / 3
        torch.testing.assert_close(after[name], expected)


def test_mean_needs_what_the_harvest_kept(pool):
    pool[1].rest = None
    with pytest.raises(TensorFileError, match=r"1.safetensors' was harvested without"):
        filled(MeanNonExperts(), pool)


def test_named(tmp_path, pool):
    model = dense_model("llama", 4)
    model.save_pretrained(tmp_path / "model")
    before, after = filled(NamedNonExperts(str(tmp_path / "model")), pool)
    theirs = dict(model.named_parameters())
    for name in after:
        assert torch.equal(after[name], before[name] if is_expert(name) else theirs[name])


@pytest.mark.parametrize(
    ("fields", "name", "shape"),
    [
        ({"vocab_size": 65}, "model.embed_tokens.weight", r"\(65, 32\), the dense model's has \(64, 32\)"),
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight", "None, the dense model's has"),
    ],
)
def test_named_of_another_model_is_refused_before_it_is_read(tmp_path, fields, name, shape):
    dense_model("llama", **fields).save_pretrained(tmp_path / "model")
    named = NamedNonExperts(str(tmp_path / "model"))
    with torch.device("meta"):
        dense = dense_model("llama")
    with pytest.raises(ValueError, match=rf"NamedNonExperts\.path='.*model': tensor '{name}' has shape {shape}"):
        named.check(dense)


def test_named_of_another_rope_is_refused_and_a_moe_of_the_model_is_not(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    dense_model("llama", rope_parameters=rope).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"rope_parameters.rope_theta=10000.0, the dense model has 50000.0"):
        NamedNonExperts(str(tmp_path / "model")).check(dense_model("llama"))
    moe = moe_config(dense_config("llama"), num_experts=2, top_k=1)
    AutoModelForCausalLM.from_config(moe).save_pretrained(tmp_path / "moe")
    NamedNonExperts(str(tmp_path / "moe")).check(dense_model("llama"))


def test_named_refuses_an_empty_directory(tmp_path):
    with pytest.raises(ValueError, match=r"NamedNonExperts\.path=.* holds neither model.safetensors nor"):
        NamedNonExperts(str(tmp_path))


@torch.no_grad()
def test_nan_left_in_the_dense_model_is_named():
    dense = dense_model("llama")
    check_filled(LastNonExperts(), dense)
    name = "model.layers.1.self_attn.k_proj.weight"
    dense.get_parameter(name)[3, 2] = torch.nan
    with pytest.raises(
        ValueError, match=rf"non_experts\.LastNonExperts left NaN or infinity in 1 parameters, such as '{name}'"
    ):
        check_filled(LastNonExperts(), dense)
