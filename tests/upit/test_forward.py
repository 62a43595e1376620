"""Shared forward passes: response logits, packed rows, and the taps."""

import pytest
import torch

from tests.upit.conftest import make_examples
from upit.examples import IGNORE, collate
from upit.families import moe_config
from upit.forward import ffn_inputs_of, response_logits, router_logits_of
from upit.losses import example_losses
from upit.models import build

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
    assert not model.lm_head._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("rows", [[[0, 1, 2], [3, 4, 5]], [[5, 0], [1], [2, 3, 4]]], ids=["two", "three"])
def test_packed_rows_equal_the_examples_alone(model, rows):
    logits, targets, ids = response_logits(model, collate(rows, EXAMPLES, pad_id=0, length=48))
    for index in range(len(EXAMPLES)):
        alone, its_targets, _ = response_logits(model, collate([[index]], EXAMPLES, pad_id=0))
        own = ids == index
        torch.testing.assert_close(logits[own], alone, rtol=1e-4, atol=1e-5)
        assert torch.equal(targets[own], its_targets)
    loss, tokens = example_losses(logits_LV=logits, targets_L=targets, example_ids_L=ids, num_examples=len(EXAMPLES))
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


def test_a_batch_without_a_response_gives_no_logits(model):
    batch = collate([[0]], EXAMPLES, pad_id=0)
    batch["labels"].fill_(IGNORE)
    logits, targets, ids = response_logits(model, batch)
    assert logits.shape == (0, 64)
    assert len(targets) == len(ids) == 0


def test_taps_collect_every_layer_and_leave_nothing_behind(dense):
    moe = build(moe_config(dense.config, num_experts=4, top_k=2)).eval()
    batch = collate([[0], [1]], EXAMPLES, pad_id=0)
    tokens = batch["input_ids"].numel()
    with router_logits_of(moe) as logits, ffn_inputs_of(moe) as inputs:
        response_logits(moe, batch)
    assert [tuple(layer.shape) for layer in logits] == [(tokens, 4)] * 2
    for layer, tokens_BTH, logits_TE in zip(moe.model.layers, inputs, logits, strict=True):
        torch.testing.assert_close(tokens_BTH.flatten(0, 1) @ layer.mlp.gate.weight.T, logits_TE)
    response_logits(moe, batch)
    assert len(logits) == len(inputs) == 2
