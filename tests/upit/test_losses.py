"""Losses against naive loops, transformers' own function, and themselves split over ranks."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from upit.losses import example_losses, load_balancing_loss, response_loss

LAYERS, TOKENS, EXPERTS = 3, 20, 5


@pytest.fixture
def router_logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOKENS, EXPERTS, generator=generator) for _ in range(LAYERS)]


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
    found = load_balancing_loss(router_logits=router_logits, top_k=top_k, mask_T=mask)
    assert float(found) == pytest.approx(naive(router_logits, top_k, mask), rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balancing_of_one_layer_is_transformers_over_top_k(router_logits, mask, top_k):
    expected = load_balancing_loss_func((router_logits[0],), EXPERTS, top_k, attention_mask=mask[None].long())
    found = load_balancing_loss(router_logits=router_logits[:1], top_k=top_k, mask_T=mask)
    torch.testing.assert_close(found, expected / top_k)


def test_load_balancing_is_one_at_balance_and_n_at_collapse():
    balanced = 50 * torch.eye(EXPERTS).repeat(4, 1)
    assert float(load_balancing_loss(router_logits=[balanced], top_k=1)) == pytest.approx(1.0)
    collapsed = torch.zeros(8, EXPERTS)
    collapsed[:, 2] = 50
    assert float(load_balancing_loss(router_logits=[collapsed], top_k=1)) == pytest.approx(EXPERTS)


def test_padding_changes_neither_value_nor_gradient(router_logits, mask):
    def value_and_gradient(padding):
        logits = [layer.clone() for layer in router_logits]
        for layer in logits:
            layer[~mask] = padding
            layer.requires_grad_()
        loss = load_balancing_loss(router_logits=logits, top_k=2, mask_T=mask)
        return loss, torch.autograd.grad(loss, logits)

    one, other = value_and_gradient(torch.zeros(EXPERTS)), value_and_gradient(torch.arange(EXPERTS) * 9.0)
    torch.testing.assert_close(one[0], other[0])
    for ours, theirs in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask])
        assert not ours[~mask].any()


def test_two_ranks_equal_one(router_logits, mask):
    """The mean of the two ranks' losses and gradients, their tokens unevenly masked, is that of all tokens."""
    whole = [layer.clone().requires_grad_() for layer in router_logits]
    expected = load_balancing_loss(router_logits=whole, top_k=2, mask_T=mask)
    gradients = torch.autograd.grad(expected, whole)

    halves = [slice(0, 6), slice(6, TOKENS)]
    seen: list[torch.Tensor] = []  # what each rank would contribute to the sum
    for half in halves:
        load_balancing_loss(
            router_logits=[layer[half] for layer in router_logits],
            top_k=2,
            mask_T=mask[half],
            reduce_counts=lambda totals: seen.append(totals) or totals,
        )
    total = seen[0] + seen[1]
    parts = [layer.clone().requires_grad_() for layer in router_logits]
    losses = [
        load_balancing_loss(
            router_logits=[layer[half] for layer in parts],
            top_k=2,
            mask_T=mask[half],
            reduce_counts=lambda _: total,
            world_size=2,
        )
        for half in halves
    ]
    found = sum(losses) / 2
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, parts), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_load_balancing_without_a_real_token_is_zero(router_logits):
    loss = load_balancing_loss(router_logits=router_logits, top_k=2, mask_T=torch.zeros(TOKENS, dtype=torch.bool))
    assert float(loss) == 0.0


def test_response_loss_is_the_mean_over_tokens_or_over_a_given_number():
    logits, targets = torch.randn(7, 11), torch.randint(0, 11, (7,))
    torch.testing.assert_close(response_loss(logits_LV=logits, targets_L=targets), F.cross_entropy(logits, targets))
    halved = response_loss(logits_LV=logits, targets_L=targets, denominator=14)
    torch.testing.assert_close(halved, F.cross_entropy(logits, targets) / 2)


def test_response_loss_of_half_precision_logits_is_computed_in_float32():
    logits, targets = torch.randn(7, 11).bfloat16(), torch.randint(0, 11, (7,))
    loss = response_loss(logits_LV=logits, targets_L=targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets), rtol=0, atol=0)


def test_response_loss_without_a_response_is_zero_and_has_a_gradient():
    logits = torch.zeros(0, 11, requires_grad=True)
    loss = response_loss(logits_LV=logits, targets_L=torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


def test_example_losses_sum_by_example():
    logits, targets = torch.randn(6, 11), torch.randint(0, 11, (6,))
    ids = torch.tensor([2, 0, 2, 2, 0, 3])
    loss_S, tokens_S = example_losses(logits_LV=logits, targets_L=targets, example_ids_L=ids, num_examples=4)
    assert tokens_S.tolist() == [2, 0, 3, 1]
    for example in range(4):
        own = ids == example
        expected = F.cross_entropy(logits[own], targets[own], reduction="sum")
        torch.testing.assert_close(loss_S[example], expected)
