"""Which experts become parents, and which are left out."""

from types import SimpleNamespace

import pytest
import torch

from upit.expansion.selection import (
    BestParents,
    Even,
    LastCheckpoints,
    MostDissimilar,
    MostDiverse,
    MostSimilar,
    RandomParents,
)

SIMILARITY = torch.tensor([[1.0, 0.1, 0.9, 0.5], [0.1, 1.0, 0.2, 0.8], [0.9, 0.2, 1.0, 0.3], [0.5, 0.8, 0.3, 1.0]])


def pool(*metrics):
    return [SimpleNamespace(metrics=metric) for metric in metrics]


def pairs_of(parents, rounds, experts=None, seed=0):
    used = set()
    for number in range(rounds):
        generator = torch.Generator().manual_seed(seed + number)
        pair = parents.choose(SIMILARITY, experts or pool({}, {}, {}, {}), used=used, generator=generator)
        used.add(pair)
        yield pair


def test_most_dissimilar_goes_from_the_least_alike_up():
    assert list(pairs_of(MostDissimilar(), 3)) == [(0, 1), (1, 2), (2, 3)]


def test_most_similar_goes_the_other_way():
    assert list(pairs_of(MostSimilar(), 3)) == [(0, 2), (1, 3), (0, 3)]


@pytest.mark.parametrize("parents", [MostDissimilar(), MostSimilar(), RandomParents()], ids=repr)
def test_every_pair_once_before_any_twice(parents):
    assert len(set(pairs_of(parents, 6))) == 6
    assert len(list(pairs_of(parents, 8))) == 8


def test_random_takes_every_pair_alike():
    first = [next(pairs_of(RandomParents(), 1, seed=seed)) for seed in range(600)]
    counts = [first.count(pair) for pair in set(first)]
    assert len(counts) == 6
    assert min(counts) > 60


@pytest.mark.parametrize(("mode", "expected"), [("min", [(1, 3), (0, 3)]), ("max", [(0, 2), (1, 2)])])
def test_best_takes_the_two_with_the_best_metric(mode, expected):
    experts = pool({"loss": 3.0}, {"loss": 2.0}, {"loss": 4.0}, {"loss": 1.0})
    assert list(pairs_of(BestParents("loss", mode), 2, experts)) == expected


def test_best_takes_experts_without_the_metric_last():
    experts = pool({"loss": 3.0}, {"loss": 2.0}, {}, {"loss": 1.0})
    assert set(pairs_of(BestParents("loss"), 3, experts)) == {(0, 1), (0, 3), (1, 3)}


def test_best_names_the_metrics_there_are():
    BestParents("loss").check([{"loss"}, {}, {"loss"}])
    with pytest.raises(ValueError, match=r"BestParents.metric='f1': no expert comes with it, only with \['loss'\]"):
        BestParents("f1").check([{"loss"}, {"loss"}])


def test_best_needs_two_experts_with_its_metric():
    with pytest.raises(ValueError, match=r"BestParents.metric='f1': only 1 of 3 experts comes with it.*At least 2"):
        BestParents("f1").check([{"loss"}, {"loss", "f1"}, {"loss"}])
    with pytest.raises(ValueError, match=r"BestParents.metric='f1': 1 of 4 experts have it"):
        next(pairs_of(BestParents("f1"), 1, pool({}, {"f1": 0.5}, {"f1": float("nan")}, {})))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_pairs_the_best_with_what_has_no_metric_after_all_others(mode):
    sign = 1 if mode == "min" else -1
    experts = pool({}, {"loss": sign * 2.0}, {"loss": sign * 1.0}, {})
    assert list(pairs_of(BestParents("loss", mode), 6, experts)) == [(1, 2), (0, 2), (2, 3), (0, 1), (1, 3), (0, 3)]


def test_even_keeps_the_last():
    assert Even().choose(torch.eye(8), 4) == [1, 3, 5, 7]
    assert Even().choose(torch.eye(7), 3) == [1, 4, 6]


def test_last():
    assert LastCheckpoints().choose(torch.eye(5), 2) == [3, 4]


def test_most_diverse_starts_from_the_last_and_avoids_the_alike():
    assert MostDiverse().choose(SIMILARITY, 2) == [2, 3]
    assert MostDiverse().choose(SIMILARITY, 3) == [1, 2, 3]
