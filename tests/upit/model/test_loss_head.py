"""The loss head's sum and its gradients against all logits at once, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from upit.model.loss_head import HEAD_TOKENS, head_loss, head_losses

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def relative(ours, reference):
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("tokens", [7, HEAD_TOKENS + 100])
@pytest.mark.parametrize(("device", "weights"), [
    ("cpu", torch.float32),
    pytest.param("cuda", torch.float32, marks=GPU),
    pytest.param("cuda", torch.bfloat16, marks=GPU),
])  # fmt: skip
def test_loss_and_gradients_are_those_of_all_logits(device, weights, tokens):
    torch.manual_seed(0)
    head = nn.Linear(64, 5003, bias=False).to(device, weights)
    states = torch.randn(tokens, 64, device=device, dtype=weights, requires_grad=True)
    targets = torch.randint(5003, (tokens,), device=device)
    targets[3] = -100
    with torch.autocast(device, torch.bfloat16, enabled=weights == torch.float32):
        loss = head_loss(head, states, targets)
        (3 * loss).backward()

    wide, again = head.weight.detach().double().requires_grad_(), states.detach().double().requires_grad_()
    reference = F.cross_entropy(again @ wide.T, targets, reduction="sum")
    (3 * reference).backward()
    assert loss.dtype == torch.float32
    assert relative(loss.detach(), reference.detach()) < 1e-3
    assert relative(states.grad, again.grad) < 1.5e-2
    assert relative(head.weight.grad, wide.grad) < 1.5e-2
    assert states.grad[3].abs().max() == 0
    assert states.grad.dtype == head.weight.grad.dtype == weights


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_sum_without_gradients_is_the_sum_of_the_losses(device):
    torch.manual_seed(0)
    head, states = nn.Linear(16, 33).to(device), torch.randn(9, 16, device=device)
    targets = torch.randint(33, (9,), device=device)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, states, targets), head_losses(head, states, targets).sum())
