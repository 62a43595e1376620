"""The assembled MoE: identical experts reproduce the dense model, and every parameter comes from somewhere."""

import pytest
import torch

from tests.upit.conftest import expert_tensors
from upit.model.families import moe_config
from upit.model.loading.build import build
from upit.preparation.pool import Pool
from upit.upcycling.assemble import upcycle

EXPERTS = 4


@pytest.fixture
def router():
    return torch.randn(2, EXPERTS, 32, generator=torch.Generator().manual_seed(5))


def moe_of(dense, experts, router, *, top_k: int):
    moe = build(moe_config(dense.config, num_experts=len(experts), top_k=top_k)).eval()
    for param in moe.parameters():
        torch.nn.init.constant_(param, float("nan"))
    upcycle(moe, dense, experts, router)
    return moe


@torch.no_grad()
@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
@pytest.mark.parametrize("tied", [True, False])
def test_identical_experts_reproduce_the_dense_logits_whatever_the_router(make_dense, make_pool, router, top_k, tied):
    dense = make_dense(tie_word_embeddings=tied)
    base = make_pool(dense, 0).base
    moe = moe_of(dense, [base] * EXPERTS, router, top_k=top_k)
    ids = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_every_parameter_is_filled_from_its_own_source(dense, make_pool, router):
    pool = make_pool(dense, EXPERTS)
    moe = moe_of(dense, pool.experts, router, top_k=2)
    assert all(torch.isfinite(param).all() for param in moe.parameters())
    stored = dict(dense.named_parameters())
    for name, param in moe.named_parameters():
        if ".mlp." not in name:
            assert torch.equal(param, stored[name]), name
    for i, layer in enumerate(moe.model.layers):
        assert torch.equal(layer.mlp.gate.weight, router[i])
        for e, expert in enumerate(pool.experts):
            gate, up, down = (
                expert.read(f"model.layers.{i}.mlp.{projection}.weight")
                for projection in ("gate_proj", "up_proj", "down_proj")
            )
            assert torch.equal(layer.mlp.experts.gate_up_proj[e], torch.cat([gate, up]))
            assert torch.equal(layer.mlp.experts.down_proj[e], down)


@torch.no_grad()
def test_the_router_sends_a_token_to_the_expert_whose_vector_it_matches(dense, make_pool):
    """top_k 1 with one vector far along the FFN's input: the MoE is the dense model with that expert's FFN."""
    pool = make_pool(dense, EXPERTS, amount=0.3)
    ids = torch.randint(3, 64, (1, 1), generator=torch.Generator().manual_seed(0))
    inputs = []
    for chosen in range(EXPERTS):
        vectors = torch.zeros(2, EXPERTS, 32)
        for name in pool.base.shapes:
            dense.get_parameter(name).copy_(pool.experts[chosen].read(name))
        inputs.clear()
        handles = [
            layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0, -1]))
            for layer in dense.model.layers
        ]
        expected = dense(ids).logits
        for handle in handles:
            handle.remove()
        for layer, hidden in enumerate(inputs):
            vectors[layer, chosen] = hidden
        moe = moe_of(dense, pool.experts, vectors, top_k=1)
        torch.testing.assert_close(moe(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_parameter_without_a_source_is_named(dense, make_pool, router):
    moe = build(moe_config(dense.config, num_experts=EXPERTS, top_k=2))
    moe.model.layers[0].mlp.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match=r"mlp\.extra"):
        upcycle(moe, dense, make_pool(dense, EXPERTS).experts, router)


def test_bfloat16_experts_fill_a_float32_moe(dense, tmp_path, router):
    pool = Pool(tmp_path / "half")
    pool.set_base({name: tensor.bfloat16() for name, tensor in expert_tensors(dense).items()})
    moe = moe_of(dense, [pool.base] * EXPERTS, router, top_k=2)
    assert {param.dtype for param in moe.parameters()} == {torch.float32}
    assert all(torch.isfinite(param).all() for param in moe.parameters())
