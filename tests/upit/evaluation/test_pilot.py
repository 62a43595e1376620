"""Specialist gain, distances, and the dense model as a vehicle that comes back unchanged."""

import pytest
import torch

from tests.conftest import TINY
from upit.evaluation.pilot import distances, score_checkpoints, specialist_gain
from upit.model.loading.build import build, scratch_config
from upit.preparation.pool import Pool

NAME = "model.layers.0.mlp.down_proj.weight"


def points(*losses: dict[str, float]) -> list[dict]:
    return [{"domains": {name: {"loss": loss} for name, loss in point.items()}} for point in losses]


def test_specialist_gain_is_what_an_oracle_wins():
    crossing = points({"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 0.5})
    assert specialist_gain(crossing, "loss") == pytest.approx((2.0 + 0.5) / 2 - (1.0 + 0.5) / 2)
    assert specialist_gain(points({"a": 2.0, "b": 2.0}, {"a": 1.0, "b": 1.0}), "loss") == 0.0
    matches = [{"domains": {"a": {"exact_match": x}, "b": {"exact_match": 1 - x}}} for x in (0.2, 0.9)]
    assert specialist_gain(matches, "exact_match") == pytest.approx((0.9 + 0.8) / 2 - 0.5)


@pytest.fixture
def pool(tmp_path) -> Pool:
    pool = Pool(tmp_path)
    base = torch.tensor([3.0, 4.0])
    pool.set_base({NAME: base})
    pool.add({NAME: base + torch.tensor([3.0, 0.0])}, step=1, epoch=0.5, metrics={})
    pool.add({NAME: base + torch.tensor([3.0, 4.0])}, step=2, epoch=1.0, metrics={})
    return pool


def test_distances_are_norms_over_the_bases(pool):
    first, second = distances(pool.experts, pool.base)
    assert (first["from_base"], first["from_previous"]) == pytest.approx((3 / 5, 3 / 5))
    assert (second["from_base"], second["from_previous"]) == pytest.approx((5 / 5, 4 / 5))


def test_the_vehicle_comes_back_bit_for_bit(data, tmp_path):
    torch.manual_seed(0)
    dense = build(scratch_config(TINY, data.tokenizer)).train()
    pool = Pool(tmp_path)
    for step in range(3):
        tensors = {name: p.detach() + step for name, p in dense.named_parameters() if ".mlp." in name}
        pool.add(tensors, step=step, epoch=0.0, metrics={}) if step else pool.set_base(tensors)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    first, second = score_checkpoints(dense, pool.experts, data, exact_match=False)
    assert first["domains"]["letters"]["loss"] != second["domains"]["letters"]["loss"]
    assert dense.training
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), name
