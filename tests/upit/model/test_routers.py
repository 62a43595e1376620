"""Routers in compiled layers choose and weigh as the stock ones, forward and backward."""

import gc
import weakref

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from tests.upit.tiny import dense_config
from upit.model.families import FAMILIES, moe_config
from upit.model.loading.build import build
from upit.model.routers import FEW, few_largest, moe_routers, prepare_routers

EXPERTS = 2 * FEW


@pytest.fixture(params=sorted(FAMILIES))
def routers(request):
    """One family's router with any number of experts a token."""

    def make(top_k: int, **fields):
        config = moe_config(dense_config(request.param), num_experts=EXPERTS, top_k=top_k)
        for name, value in fields.items():
            setattr(config, name, value)
        router = moe_routers(build(config))[0]
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
        return router

    return make


def compiled(router, graphs: list):
    """The router compiled; its graphs are collected."""
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    return torch.compile(router, backend=backend, fullgraph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [2, FEW + 1])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_compiled_router_does_what_the_stock_one_does(routers, top_k, normalised, dtype):
    router = routers(top_k, norm_topk_prob=normalised).to(dtype)
    found, grads, graphs = [], [], []
    for forward in (router.stock_forward, compiled(router, graphs)):
        states = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        router.zero_grad()
        logits_TE, weights_TK, experts_TK = forward(states)
        (weights_TK.float().square().sum() + logits_TE.float().square().mean()).backward()
        found.append((logits_TE, weights_TK, experts_TK))
        grads.append((states.grad, router.weight.grad))
    assert [".topk(" in graph for graph in graphs] == [top_k > FEW]
    (stock_TE, stock_TK, stock_ids_TK), (logits_TE, weights_TK, experts_TK) = found
    torch.testing.assert_close(logits_TE, stock_TE)
    torch.testing.assert_close(weights_TK, stock_TK)
    torch.testing.assert_close(logits_TE.gather(1, experts_TK), stock_TE.gather(1, stock_ids_TK))
    if dtype == torch.float32:  # else some logits are equal, and either expert is right
        torch.testing.assert_close(experts_TK, stock_ids_TK)
        torch.testing.assert_close(grads[1], grads[0])


def test_few_largest_are_those_of_topk_the_first_of_equals_first():
    probs_TE = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(few_largest(probs_TE, 3), tuple(probs_TE.topk(3)), rtol=0, atol=0)
    assert few_largest(torch.full((1, 5), 0.2), 3)[1].tolist() == [[0, 1, 2]]


def test_a_router_is_prepared_once():
    model = build(moe_config(dense_config("llama"), num_experts=4, top_k=2))
    prepare_routers(model)
    assert all(len(router._forward_hooks) == 1 for router in moe_routers(model))
    model(torch.ones(1, 5, dtype=torch.long))


def test_a_model_that_is_dropped_is_gone():
    model = build(moe_config(dense_config("llama"), num_experts=4, top_k=2))
    model(torch.ones(1, 5, dtype=torch.long)).logits.sum().backward()
    left = [weakref.ref(param) for param in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(param() is not None for param in left)
    finally:
        gc.enable()
