"""The experts' GPU kernels against a float64 loop over experts, and packed attention against the dense mask."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from upit.core.batches import collate, to_device
from upit.model.experts.dispatch import has_quack, plain_experts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BF16_ROUNDING = 1.5e-2  # relative norm of a few chained bfloat16 products


def relative(ours, reference):
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture(params=["kernels", "hopper"])
def experts(request):
    if request.param == "hopper" and not has_quack():
        pytest.skip("needs a Hopper GPU and quack-kernels")
    return import_module(f"upit.{request.param}").experts


def inputs(num_tokens, top_k, num_experts, hidden, inner, *, skew=0.0, seed=0, dtype=torch.bfloat16):
    """``skew``: how much likelier the first experts are; from 1 on, whole experts go without a token."""
    torch.manual_seed(seed)
    make = {"device": "cuda", "dtype": dtype}
    likely_E = torch.linspace(skew, 0, num_experts, device="cuda")
    ids_TK = (torch.rand(num_tokens, num_experts, device="cuda") + likely_E).topk(top_k).indices
    ids_TK[ids_TK == 1] = 0  # expert 1 gets no token
    return [
        torch.randn(num_tokens, hidden, **make),
        torch.randn(num_experts, 2 * inner, hidden, **make) * 0.1,
        torch.randn(num_experts, hidden, inner, **make) * 0.1,
        ids_TK,
        torch.rand(num_tokens, top_k, device="cuda"),
    ]


def loop(x, gate_up, down, ids, weights):
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        for k in range(ids.shape[1]):
            rows = (ids[:, k] == expert).nonzero().flatten()
            gate, up = (x[rows] @ gate_up[expert].T).chunk(2, dim=-1)
            out = out.index_add(0, rows, weights[rows, k, None] * ((F.silu(gate) * up) @ down[expert].T))
    return out


def outputs_and_gradients(call, given, grad):
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in given]
    out = call(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *[leaves[index].grad for index in (0, 1, 2, 4)]]


def in_double(given):
    return [t.double() if t.is_floating_point() else t for t in given]


SHAPES = [(1000, 2, 8, 576, 1536), (257, 1, 4, 64, 48), (512, 4, 64, 128, 96), (300, 1, 2, 64, 32)]


@pytest.mark.parametrize("skew", [0.0, 2.0], ids=["even", "skewed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_experts_equal_a_loop(experts, shape, compiled, skew):
    given = inputs(*shape, skew=skew)
    grad = torch.randn_like(given[0])

    ours = outputs_and_gradients(torch.compile(experts, fullgraph=True) if compiled else experts, given, grad)
    theirs = outputs_and_gradients(loop, in_double(given), grad)
    for found, reference in zip(ours, theirs, strict=True):
        assert relative(found, reference) < BF16_ROUNDING
    assert ours[2][1].abs().max() == 0, "an expert without a token has a gradient of zeros"


def test_one_expert_in_half_precision(experts):
    given = inputs(130, 1, 1, 64, 48, dtype=torch.float16)
    grad = torch.randn_like(given[0])
    ours = outputs_and_gradients(experts, given, grad)
    for found, reference in zip(ours, outputs_and_gradients(loop, in_double(given), grad), strict=True):
        assert relative(found, reference) < BF16_ROUNDING


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_float32_parameters_are_float32(experts, compiled, request):
    x, gate_up, down, *routing = inputs(512, 2, 4, 64, 32)
    given = [x, gate_up.float(), down.float(), *routing]
    grad = torch.randn_like(x)
    ours = outputs_and_gradients(torch.compile(experts, fullgraph=True) if compiled else experts, given, grad)
    for found, reference in zip(ours, outputs_and_gradients(loop, in_double(given), grad), strict=True):
        assert relative(found, reference) < BF16_ROUNDING
    assert [found.dtype for found in ours[2:4]] == [torch.float32] * 2
    if request.node.callspec.params["experts"] == "hopper":
        assert not torch.equal(ours[2], ours[2].bfloat16().float()), "never rounded to half precision"


def test_experts_take_views(experts):
    x, *rest = inputs(128, 2, 4, 64, 32)
    wide = torch.randn(128, 200, device="cuda", dtype=torch.bfloat16)
    wide[:, 10:74] = x
    torch.testing.assert_close(experts(wide[:, 10:74], *rest), experts(x, *rest))
    plain = plain_experts(x, *rest, act_fn=F.silu)
    assert relative(experts(x, *rest), plain) < BF16_ROUNDING


def test_experts_take_a_gradient_that_is_not_contiguous(experts):
    given = inputs(128, 2, 4, 64, 32)
    ones = torch.ones((), device="cuda", dtype=torch.bfloat16).expand_as(given[0])
    ours = outputs_and_gradients(experts, given, ones)
    theirs = outputs_and_gradients(experts, given, ones.contiguous())
    for found, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, reference)


def test_a_captured_graph_follows_another_routing(experts):
    """Neither grids nor bounds may be those of the capture."""
    captured, other = inputs(512, 2, 8, 64, 96), inputs(512, 2, 8, 64, 96, skew=3.0, seed=1)
    static = [t.clone().requires_grad_(t.is_floating_point()) for t in captured]
    grad = torch.randn_like(captured[0])

    def step():
        out = experts(*static)
        return [out.detach(), *torch.autograd.grad(out, [static[index] for index in (0, 1, 2, 4)], grad)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for old, new in zip(static, other, strict=True):
            old.copy_(new)
    graph.replay()
    for ours, reference in zip(found, outputs_and_gradients(loop, in_double(other), grad), strict=True):
        assert relative(ours, reference) < BF16_ROUNDING


def test_the_compiler_adds_up_a_token_s_experts_by_itself_in_the_forward_pass(experts):
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    given = inputs(256, 2, 4, 64, 96)
    with torch.no_grad(), config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(torch.compile(experts), *given)
    assert "_place" in "".join(codes)
    assert "_sum_by_token" not in "".join(codes)


@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4]], [[0], [1], [2]]], ids=["packed", "padded"])
def test_packed_attention_equals_the_dense_mask(rows):
    from upit.model.forward import response_losses
    from upit.model.loading.build import build

    torch.manual_seed(0)
    dataset = [
        {"input_ids": torch.randint(3, 90, (n,)).tolist(), "labels": [-100] * 3 + [5] * (n - 3)}
        for n in (9, 31, 64, 5, 77)
    ]
    fields = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
    config = LlamaConfig(**fields, num_attention_heads=4, num_key_value_heads=2)
    model = build(config).cuda()
    losses, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):  # the dense mask, then FlashAttention
        batch = to_device(collate(rows, dataset, pad_id=0, length=256, longest=77), torch.device("cuda"))
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss_L = response_losses(model, batch)[0]
        model.zero_grad()
        loss_L.sum().backward()
        losses.append(loss_L.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(losses[1], losses[0]) < BF16_ROUNDING
    assert relative(grads[1], grads[0]) < 5e-2
