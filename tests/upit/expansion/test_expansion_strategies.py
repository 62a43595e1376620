"""Expansion with every kind of strategy: the lineage says which, and a finished child is reused only under it."""

import json

import pytest
import torch

from tests.upit.pools import flat, make_pool
from upit.expansion.expand import expand
from upit.expansion.merging import Dare, Linear
from upit.expansion.selection import BestParents, LastCheckpoints, MostSimilar, RandomParents
from upit.expansion.similarity import Functional


@pytest.fixture
def pool(tmp_path):
    return make_pool(tmp_path / "pool", 3, loss=[3.0, 1.0, 2.0])


def run(pool, tmp_path, num_experts=5, **kwargs):
    return expand(pool.experts, pool.base, num_experts=num_experts, output=tmp_path / "merged", **kwargs)


def test_lineage_names_the_strategies(pool, tmp_path):
    found = run(pool, tmp_path, merge=Dare(0.4), parents=MostSimilar())
    entry = json.loads(json.dumps(found.lineage))[3]
    assert entry["kind"] == "merged"
    assert entry["merge"] == {"name": "Dare", "drop_rate": 0.4}
    assert entry["drop_rate"] == 0.4
    assert entry["chosen_by"] == [{"name": "MostSimilar"}, {"name": "Cosine", "against": "base"}]
    assert entry["alpha"] + entry["beta"] == pytest.approx(1.0)


def test_a_linear_child_lies_between_its_parents(pool, tmp_path):
    found = run(pool, tmp_path, 4, merge=Linear(), parents=BestParents("loss"))
    entry = found.lineage[3]
    assert entry["parents"] == [1, 2]
    parents = [flat(found.experts[parent]) for parent in entry["parents"]]
    torch.testing.assert_close(flat(found.experts[3]), entry["alpha"] * parents[0] + entry["beta"] * parents[1])


def test_a_child_is_reused_only_when_nothing_changed(pool, tmp_path):
    first = run(pool, tmp_path)
    times = [expert.file.stat().st_mtime_ns for expert in first.experts]
    assert [expert.file.stat().st_mtime_ns for expert in run(pool, tmp_path).experts] == times
    for change in ({"merge": Dare(0.3)}, {"merge": Linear()}, {"seed": 1}, {"parents": MostSimilar()}):
        again = run(pool, tmp_path, **change)
        assert again.experts[3].sha256 != first.experts[3].sha256, change
    assert [expert.sha256 for expert in run(pool, tmp_path).experts] == [expert.sha256 for expert in first.experts]


def test_random_parents_follow_the_seed(pool, tmp_path):
    chosen = {
        tuple(tuple(entry["parents"]) for entry in run(pool, tmp_path, parents=RandomParents(), seed=seed).lineage[3:])
        for seed in range(6)
    }
    assert len(chosen) > 1
    parents = [run(pool, tmp_path, parents=RandomParents(), seed=3).lineage[i]["parents"] for i in (3, 3)]
    assert parents[0] == parents[1]


def test_functional_similarity_scores_each_expert_and_child(pool, tmp_path):
    scored = []

    def score(expert):
        scored.append(expert.sha256)
        return torch.tensor([1.0, 0.0, float(len(expert.origin))])

    found = run(pool, tmp_path, 4, similarity=Functional(), score=score)
    assert set(scored) == {expert.sha256 for expert in found.experts}
    assert len(found.similarity) == 4


def test_fewer_experts_than_checkpoints(pool, tmp_path):
    found = run(pool, tmp_path, 2, selection=LastCheckpoints())
    assert [entry["step"] for entry in found.lineage] == [2, 3]
    assert len(found.similarity) == 2


def test_parents_that_cannot_be_chosen_are_refused_before_anything_is_compared(pool, tmp_path):
    def track(names, what=""):
        raise AssertionError("compared for nothing")

    with pytest.raises(ValueError, match=r"BestParents\.metric='los': no expert comes with it, only with \['loss'\]"):
        run(pool, tmp_path, parents=BestParents("los"), track=track)
    assert len(run(pool, tmp_path, 3, parents=BestParents("los")).experts) == 3, "no parents needed"


@pytest.mark.parametrize(("available", "wanted", "message"), [(3, 0, "at least 1"), (1, 2, "at least 2 checkpoints")])
def test_refuses(pool, tmp_path, available, wanted, message):
    with pytest.raises(ValueError, match=message):
        expand(pool.experts[:available], pool.base, num_experts=wanted, output=tmp_path)
