"""Shared forward passes: response logits and losses, packed rows, and the taps."""

import pytest
import torch

from tests.upit.conftest import make_examples
from upit.core.batches import IGNORE, collate
from upit.model.families import moe_config
from upit.model.forward import ffn_inputs_of, response_logits, response_losses
from upit.model.loading.build import build
from upit.model.losses import grouped_losses
from upit.model.routers import last_routing

EXAMPLES = make_examples(6)


@pytest.fixture(params=["dense", "moe"])
def model(request, dense):
    if request.param == "dense":
        return dense
    return build(moe_config(dense.config, num_experts=4, top_k=2)).eval()


@torch.no_grad()
def test_response_logits_are_the_full_logits_there(model):
    index = 1
    batch = collate([[index]], EXAMPLES, pad_id=0)
    logits, targets, ids = response_logits(model, batch)
    full = model(batch["input_ids"]).logits[0]
    labels = torch.tensor(EXAMPLES[index]["labels"])
    where = (labels != IGNORE).nonzero()[:, 0]
    torch.testing.assert_close(logits, full[where - 1])
    assert targets.tolist() == labels[where].tolist()
    assert ids.tolist() == [index] * len(where)
    assert model(batch["input_ids"]).logits.shape[1] == batch["input_ids"].shape[1], "the hook is gone"


def test_the_hook_is_gone_after_an_error_too(model):
    batch = collate([[0]], EXAMPLES, pad_id=0)
    with pytest.raises(IndexError):
        response_logits(model, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert not model.model._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4, 5]], [[5, 0], [1], [2, 3, 4]]], ids=["two", "three"])
def test_packed_rows_equal_the_examples_alone(model, rows):
    logits, targets, ids = response_logits(model, collate(rows, EXAMPLES, pad_id=0, length=48))
    for index in range(len(EXAMPLES)):
        alone, its_targets, _ = response_logits(model, collate([[index]], EXAMPLES, pad_id=0))
        own = ids == index
        torch.testing.assert_close(logits[own], alone, rtol=1e-4, atol=1e-5)
        assert torch.equal(targets[own], its_targets)
    losses, targets, ids = response_losses(model, collate(rows, EXAMPLES, pad_id=0, length=48))
    loss, tokens = grouped_losses(losses_L=losses, targets_L=targets, groups_L=ids, num_groups=len(EXAMPLES))
    for index, example in enumerate(EXAMPLES):
        alone, its_targets, _ = response_logits(model, collate([[index]], EXAMPLES, pad_id=0))
        expected = torch.nn.functional.cross_entropy(alone, its_targets, reduction="sum")
        torch.testing.assert_close(loss[index], expected, rtol=1e-4, atol=1e-5)
        assert tokens[index] == sum(label != IGNORE for label in example["labels"])


def test_no_gradient_crosses_from_one_packed_example_to_another(dense):
    batch = collate([[0, 1]], EXAMPLES, pad_id=0)
    embedded = []
    handle = dense.model.embed_tokens.register_forward_hook(
        lambda _, __, out: embedded.append(out.detach().requires_grad_()) or embedded[0]
    )
    logits, _, ids = response_logits(dense, batch)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[ids == 1].square().sum(), embedded)
    first = batch["example_ids"][0] == 0
    assert not gradient[0][first].any()
    assert gradient[0][~first].any()


def test_labels_masked_after_collating_have_no_loss(model):
    batch = collate([[0]], EXAMPLES, pad_id=0)
    batch["labels"].fill_(IGNORE)
    losses, targets, _ = response_losses(model, batch)
    assert not losses.any()
    assert (targets == IGNORE).all()


def test_a_batch_without_a_response_gives_no_losses(model):
    example = {**EXAMPLES[0], "labels": [IGNORE] * len(EXAMPLES[0]["labels"])}
    losses, targets, ids = response_losses(model, collate([[0]], [example], pad_id=0))
    losses.sum().backward()
    assert len(losses) == len(targets) == len(ids) == 0


def test_a_head_in_chunks_has_the_losses_and_gradients_of_the_whole(model, monkeypatch):
    batch = collate([[0, 1, 2], [3, 4, 5]], EXAMPLES, pad_id=0, length=48)
    logits, targets, _ = response_logits(model, batch)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.sum(), weights)
    monkeypatch.setattr("upit.model.loss_head.HEAD_TOKENS", 5)
    losses, *_ = response_losses(model, batch)
    torch.testing.assert_close(losses, expected)
    for ours, theirs in zip(torch.autograd.grad(losses.sum(), weights), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_taps_collect_every_layer_and_leave_nothing_behind(dense):
    moe = build(moe_config(dense.config, num_experts=4, top_k=2)).eval()
    batch = collate([[0], [1]], EXAMPLES, pad_id=0)
    tokens = batch["input_ids"].numel()
    with ffn_inputs_of(moe) as inputs:
        response_logits(moe, batch)
    logits, experts = last_routing(moe)
    assert logits.shape == (2, tokens, 4)
    assert torch.equal(experts, logits.float().softmax(-1).topk(2).indices)
    for layer, tokens_BTH, logits_TE in zip(moe.model.layers, inputs, logits, strict=True):
        torch.testing.assert_close(tokens_BTH.flatten(0, 1) @ layer.mlp.gate.weight.T, logits_TE)
    response_logits(moe, batch)
    assert len(inputs) == 2
