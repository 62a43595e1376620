"""Rotary frequencies stay in float32 in every family, however the model gets its dtype."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.upit.tiny import CONFIGS, dense_config, dense_model
from upit.model.families import moe_config
from upit.model.loading.build import build, load_pretrained

ROPE = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def frequencies(model):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}


def in_half_precision(make):
    """As under Lightning's bf16-true: built in it, and cast by the module around."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = make()
    finally:
        torch.set_default_dtype(torch.float32)
    return torch.nn.ModuleDict({"model": model}).to(torch.bfloat16)["model"]


def check(model, config):
    expected = frequencies(AutoModelForCausalLM.from_config(config))
    found = frequencies(model)
    assert found.keys() == expected.keys()
    assert expected
    for name, buffer in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], buffer), name
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_model_in_bf16_has_them_in_float32(family, kind, tmp_path):
    config = dense_config(family)
    config = config if kind == "dense" else moe_config(config, num_experts=2, top_k=1)
    model = in_half_precision(lambda: build(config))
    check(model, config)
    check(copy.deepcopy(model).half().to(torch.bfloat16), config)
    model.save_pretrained(tmp_path)
    check(in_half_precision(lambda: load_pretrained(str(tmp_path), moe=kind == "moe")), config)


@pytest.mark.parametrize("rope", sorted(ROPE))
def test_every_kind_of_rotary_embedding_has(rope):
    config = dense_config("llama", rope_parameters={"rope_theta": 1e4, "rope_type": rope, **ROPE[rope]})
    check(in_half_precision(lambda: build(config)), config)


def test_an_empty_model_takes_another_device(tmp_path):
    with torch.device("meta"):
        model = build(dense_config("llama"))
    model = model.to_empty(device="cpu").bfloat16()
    assert {(buffer.dtype, buffer.device.type) for buffer in frequencies(model).values()} == {(torch.float32, "cpu")}


def test_cosines_of_late_positions_are_those_of_the_stock_model():
    """In bf16 their angle is off by up to 0.4 % of the position, in radians."""
    stock, config = dense_model("llama"), dense_config("llama")
    ours = in_half_precision(lambda: build(config))
    position_ids = torch.tensor([[0, 1, 1001]])
    states = torch.zeros(1, 3, 8)
    for found, expected in zip(
        ours.model.rotary_emb(states, position_ids), stock.model.rotary_emb(states, position_ids), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_was_copied_or_sent_to_another_process_keeps_them_too(again):
    model = again(build(dense_config("llama"))).bfloat16()
    assert {buffer.dtype for buffer in frequencies(model).values()} == {torch.float32}
