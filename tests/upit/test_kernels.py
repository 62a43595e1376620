"""The GPU kernels against a float64 loop over experts, and packed attention against the dense mask."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from upit.examples import collate
from upit.experts import plain_experts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BF16_ROUNDING = 1.5e-2  # relative norm of a few chained bfloat16 products


def relative(ours, reference):
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def inputs(num_tokens, top_k, num_experts, hidden, inner, seed=0):
    torch.manual_seed(seed)
    make = {"device": "cuda", "dtype": torch.bfloat16}
    ids_TK = torch.rand(num_tokens, num_experts, device="cuda").topk(top_k).indices
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


@pytest.mark.parametrize("shape", [(1000, 2, 8, 576, 1536), (257, 1, 4, 64, 48), (512, 4, 64, 128, 96)])
@pytest.mark.parametrize("compiled", [False, True])
def test_experts_equal_a_loop(shape, compiled):
    from upit.kernels import experts

    given = inputs(*shape)
    ours = [t.clone().requires_grad_(t.is_floating_point()) for t in given]
    theirs = [t.double().requires_grad_() if t.is_floating_point() else t for t in given]

    def call(*args):
        return experts(*args)[0]

    out = (torch.compile(call) if compiled else call)(*ours)
    reference = loop(*theirs)
    grad = torch.randn_like(out)
    out.backward(grad)
    reference.backward(grad.double())
    assert relative(out.detach(), reference.detach()) < BF16_ROUNDING
    for index in (0, 1, 2, 4):
        assert relative(ours[index].grad, theirs[index].grad) < BF16_ROUNDING, index
    assert ours[1].grad[1].abs().max() == 0


def test_experts_take_views():
    from upit.kernels import experts

    x, *rest = inputs(128, 2, 4, 64, 32)
    wide = torch.randn(128, 200, device="cuda", dtype=torch.bfloat16)
    wide[:, 10:74] = x
    torch.testing.assert_close(experts(wide[:, 10:74], *rest)[0], experts(x, *rest)[0])
    plain = plain_experts(x, *rest, act_fn=F.silu)
    assert relative(experts(x, *rest)[0], plain) < BF16_ROUNDING


@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4]], [[0], [1], [2]]], ids=["packed", "padded"])
def test_packed_attention_equals_the_dense_mask(rows):
    from upit.forward import response_losses
    from upit.models import build

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
        batch = {k: v.cuda() for k, v in collate(rows, dataset, pad_id=0, length=128).items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss_L = response_losses(model, batch)[0]
        model.zero_grad()
        loss_L.sum().backward()
        losses.append(loss_L.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(losses[1], losses[0]) < BF16_ROUNDING
    assert relative(grads[1], grads[0]) < 5e-2
