"""Rows of batches: every example once, nothing over capacity."""

import random
import time

import numpy as np
import pytest

from datamodules.packing import group_by_length, pack


def lengths(count, longest=64, seed=0):
    return [random.Random(f"{seed}:{i}").randint(1, longest) for i in range(count)]


@pytest.mark.parametrize("count", [1, 7, 500, 2500])
@pytest.mark.parametrize("window", [16, 1024])
def test_packing_takes_every_index_once_and_never_overflows(count, window):
    sizes = lengths(count)
    rows = pack(sizes, capacity=64, seed=3, window=window)
    assert sorted(index for row in rows for index in row) == list(range(count))
    assert max(sum(sizes[i] for i in row) for row in rows) <= 64


def test_packing_wastes_little():
    sizes = lengths(2000)
    assert sum(sizes) / (64 * len(pack(sizes, capacity=64, seed=0))) > 0.95


def test_packing_of_many_takes_seconds_and_fills_98_percent():
    sizes = np.clip(np.random.default_rng(0).lognormal(5.7, 0.55, 100_000), 20, 2048).astype(int)
    start = time.monotonic()
    rows = pack(sizes, capacity=2048, seed=0)
    assert time.monotonic() - start < 5
    assert sizes.sum() / (2048 * len(rows)) > 0.98


def test_packing_is_its_seeds():
    sizes = lengths(100)
    assert pack(sizes, capacity=64, seed=1) == pack(sizes, capacity=64, seed=1)
    assert pack(sizes, capacity=64, seed=1) != pack(sizes, capacity=64, seed=2)


def test_an_example_that_fills_a_row_stands_alone():
    assert sorted(pack([64, 1, 64], capacity=64, seed=0)) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("count", "batch_size", "ranks"), [(64, 4, 1), (67, 4, 2), (3, 4, 1), (65, 2, 2), (1000, 8, 4)]
)
def test_groups_take_every_index_once_and_each_rank_has_one(count, batch_size, ranks):
    batches = group_by_length(lengths(count), batch_size=batch_size, seed=0, ranks=ranks, window=8)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    sizes = sorted(map(len, batches))
    assert sizes[0] >= ranks
    assert sum(size != batch_size for size in sizes) <= 8, "only the last window has other sizes"
    assert sizes[-1] < batch_size + ranks


def test_groups_hold_similar_lengths():
    sizes = lengths(1000)
    batches = group_by_length(sizes, batch_size=8, seed=0)
    spread = [max(sizes[i] for i in batch) - min(sizes[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 3
    assert batches != sorted(batches, key=lambda batch: sizes[batch[0]]), "in random order"
