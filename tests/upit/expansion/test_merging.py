"""Merging: parity with peft on the same tensors and masks, DARE without bias, and any dtype and shape."""

import pytest
import torch
from peft.utils import merge_utils

from upit.expansion.merging import dare_linear, drop_and_rescale, drop_mask, linear, task_vector


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 5, generator=generator) for _ in range(3)]  # two parents and their base


def peft_masks(deltas, density: float, seed: int) -> list[torch.Tensor]:
    """The masks that peft draws from this seed."""
    torch.manual_seed(seed)
    return [torch.bernoulli(torch.full_like(delta, density)).bool() for delta in deltas]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("drop_rate", [0.0, 0.2, 0.9])
def test_dare_linear_is_pefts(tensors, alpha, drop_rate):
    *parents, base = tensors
    deltas = [task_vector(parent, base) for parent in parents]
    masks = peft_masks(deltas, 1 - drop_rate, seed=7)
    torch.manual_seed(7)
    expected = merge_utils.dare_linear(deltas, torch.tensor([alpha, 1 - alpha]), density=1 - drop_rate)
    found = dare_linear(parents, [alpha, 1 - alpha], base, drop_rate=drop_rate, masks=masks)
    torch.testing.assert_close(found, base + expected, rtol=1e-5, atol=1e-6)


def test_linear_is_pefts_task_arithmetic(tensors):
    weights = [0.2, 0.5, 0.3]
    expected = merge_utils.task_arithmetic(tensors, torch.tensor(weights))
    torch.testing.assert_close(linear(tensors, weights), expected)


@pytest.mark.parametrize("drop_rate", [0.2, 0.7])
def test_dare_has_no_bias(drop_rate):
    delta = torch.linspace(-2, 2, 5)
    generator = torch.Generator().manual_seed(0)
    draws = [drop_and_rescale(delta, drop_rate, drop_mask(delta.shape, drop_rate, generator)) for _ in range(20_000)]
    error = (torch.stack(draws).mean(0) - delta).abs().max()
    assert error < 5 * 2 * (drop_rate / (1 - drop_rate) / 20_000) ** 0.5  # five standard errors


def test_drop_mask_keeps_the_stated_share():
    kept = drop_mask(torch.Size([200, 200]), 0.3, torch.Generator().manual_seed(0)).float().mean()
    assert abs(kept - 0.7) < 0.01
    assert drop_mask(torch.Size([100]), 0.0, torch.Generator()).all()


def test_half_precision_is_rounded_once_at_the_end(tensors):
    *parents, base = [tensor.bfloat16() for tensor in tensors]
    masks = [torch.ones(base.shape, dtype=torch.bool)] * 2
    child = dare_linear(parents, [0.3, 0.7], base, drop_rate=0.2, masks=masks)
    exact = base.double() + sum(
        w * (p.double() - base.double()) / 0.8 for w, p in zip((0.3, 0.7), parents, strict=True)
    )
    assert child.dtype == torch.bfloat16
    torch.testing.assert_close(child, exact.bfloat16(), rtol=0, atol=0)


def test_a_shard_merges_as_the_whole_does(tensors):
    *parents, base = tensors
    generator = torch.Generator().manual_seed(0)
    masks = [drop_mask(base.shape, 0.4, generator) for _ in parents]
    whole = dare_linear(parents, [0.3, 0.7], base, drop_rate=0.4, masks=masks)
    rows = slice(2, 5)
    part = dare_linear(
        [p[rows] for p in parents], [0.3, 0.7], base[rows], drop_rate=0.4, masks=[m[rows] for m in masks]
    )
    assert torch.equal(part, whole[rows])
