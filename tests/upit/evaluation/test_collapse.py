"""What counts as a collapse."""

import math

import pytest
import torch

from upit.evaluation.collapse import balance_of, collapsed
from upit.model.losses import router_z_loss


def test_even_load_is_no_collapse():
    share_DE, entropy_D = balance_of(torch.full((2, 4), 7.0))
    assert share_DE.tolist() == [[1.0] * 4] * 2
    assert entropy_D.tolist() == pytest.approx([1.0, 1.0])
    assert collapsed(share_DE, entropy_D, min_share=0.9, min_entropy=0.9) == []


def test_a_starved_expert_and_a_low_entropy_are_named():
    balance = balance_of(torch.tensor([[10.0, 10, 10, 10], [20, 20, 0, 0], [30, 30, 30, 1]]))
    assert balance[1][1] == pytest.approx(math.log(2) / math.log(4))
    lines = collapsed(*balance, min_share=0.1, min_entropy=0.3)
    assert lines == [
        "layer 1: load entropy 0.50, experts [2, 3] below 0.1 of even",
        "layer 2: load entropy 0.83, experts [3] below 0.1 of even",
    ]
    assert [line[:7] for line in collapsed(*balance, min_share=0.0, min_entropy=0.6)] == ["layer 1"]


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits_DTE = torch.tensor([[[0.0, 0.0], [1.0, 2.0], [9.0, 9.0]]])
    expected = (math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2) / 2
    mask_T = torch.tensor([True, True, False])
    loss = router_z_loss(router_logits_DTE=logits_DTE, mask_T=mask_T, tokens=mask_T.sum())
    assert float(loss) == pytest.approx(expected)
