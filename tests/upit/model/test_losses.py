"""Losses against naive loops, transformers' own function, and themselves split over ranks."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from upit.core.batches import IGNORE
from upit.model.losses import grouped_losses, load_balancing_loss

LAYERS, TOKENS, EXPERTS = 3, 20, 5


@pytest.fixture
def router_logits():
    return torch.randn(LAYERS, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))


def balance(logits_DTE, top_k=2, **kwargs):
    chosen = logits_DTE.softmax(-1).topk(top_k).indices
    return load_balancing_loss(router_logits_DTE=logits_DTE, expert_ids_DTK=chosen, **kwargs)


@pytest.fixture
def mask():
    return torch.arange(TOKENS) % 4 != 3


def naive(router_logits, top_k, mask):
    """n * sum_i f_i P_i, layer by layer and token by token."""
    losses = []
    for logits in router_logits:
        share, mean = [0.0] * EXPERTS, [0.0] * EXPERTS
        tokens = [t for t in range(TOKENS) if mask[t]]
        for t in tokens:
            probs = logits[t].softmax(-1)
            for i in probs.topk(top_k).indices.tolist():
                share[i] += 1 / (len(tokens) * top_k)
            for i in range(EXPERTS):
                mean[i] += float(probs[i]) / len(tokens)
        losses.append(EXPERTS * sum(f * p for f, p in zip(share, mean, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_load_balancing_is_the_naive_loop(router_logits, mask, top_k):
    found = balance(router_logits, top_k, mask_T=mask)
    assert float(found) == pytest.approx(naive(router_logits, top_k, mask), rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balancing_of_one_layer_is_transformers_over_top_k(router_logits, mask, top_k):
    expected = load_balancing_loss_func((router_logits[0],), EXPERTS, top_k, attention_mask=mask[None].long())
    found = balance(router_logits[:1], top_k, mask_T=mask)
    torch.testing.assert_close(found, expected / top_k)


def test_load_balancing_is_one_at_balance_and_n_at_collapse():
    balanced = 50 * torch.eye(EXPERTS).repeat(4, 1)
    assert float(balance(balanced[None], 1)) == pytest.approx(1.0)
    collapsed = torch.zeros(8, EXPERTS)
    collapsed[:, 2] = 50
    assert float(balance(collapsed[None], 1)) == pytest.approx(EXPERTS)


def test_padding_changes_neither_value_nor_gradient(router_logits, mask):
    def value_and_gradient(padding):
        logits = router_logits.clone()
        logits[:, ~mask] = padding
        loss = balance(logits.requires_grad_(), mask_T=mask)
        return loss, *torch.autograd.grad(loss, logits)

    one, other = value_and_gradient(torch.zeros(EXPERTS)), value_and_gradient(torch.arange(EXPERTS) * 9.0)
    torch.testing.assert_close(one[0], other[0])
    torch.testing.assert_close(one[1][:, mask], other[1][:, mask])
    assert not one[1][:, ~mask].any()


def test_two_ranks_equal_one(router_logits, mask):
    """The mean of the two ranks' losses and gradients, their tokens unevenly masked, is that of all tokens."""
    whole = router_logits.clone().requires_grad_()
    expected = balance(whole, mask_T=mask)
    (gradient,) = torch.autograd.grad(expected, whole)

    halves = [slice(0, 6), slice(6, TOKENS)]
    seen: list[torch.Tensor] = []  # what each rank would contribute to the sum
    for half in halves:
        balance(
            router_logits[:, half],
            mask_T=mask[half],
            reduce_counts=lambda totals: seen.append(totals) or totals,
        )
    total = seen[0] + seen[1]
    parts = router_logits.clone().requires_grad_()
    losses = [
        balance(parts[:, half], mask_T=mask[half], reduce_counts=lambda _: total, world_size=2) for half in halves
    ]
    found = sum(losses) / 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, parts)[0], gradient)


def test_load_balancing_without_a_real_token_is_zero(router_logits):
    loss = balance(router_logits, mask_T=torch.zeros(TOKENS, dtype=torch.bool))
    assert float(loss) == 0.0


def test_losses_sum_by_group():
    losses, targets = torch.rand(6), torch.tensor([4, 4, 4, IGNORE, 4, 4])
    losses[3] = 0.0
    groups = torch.tensor([2, 0, 2, 2, 0, 3])
    loss_S, tokens_S = grouped_losses(losses_L=losses, targets_L=targets, groups_L=groups, num_groups=4)
    assert tokens_S.tolist() == [2, 0, 2, 1]
    torch.testing.assert_close(loss_S, torch.stack([losses[groups == group].sum() for group in range(4)]))
