"""Rows of batches: every example once, nothing over capacity."""

import random

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


def test_packing_is_its_seeds():
    sizes = lengths(100)
    assert pack(sizes, capacity=64, seed=1) == pack(sizes, capacity=64, seed=1)
    assert pack(sizes, capacity=64, seed=1) != pack(sizes, capacity=64, seed=2)


def test_an_example_that_fills_a_row_stands_alone():
    assert sorted(pack([64, 1, 64], capacity=64, seed=0)) == [[0], [1], [2]]


@pytest.mark.parametrize(("count", "batch_size"), [(64, 4), (67, 4), (3, 4), (1000, 8)])
def test_groups_are_full_and_take_no_index_twice(count, batch_size):
    batches = group_by_length(lengths(count), batch_size=batch_size, seed=0, window=8)
    assert all(len(batch) == batch_size for batch in batches)
    taken = [index for batch in batches for index in batch]
    assert len(taken) == len(set(taken)) == count // batch_size * batch_size


def test_groups_hold_similar_lengths():
    sizes = lengths(1000)
    batches = group_by_length(sizes, batch_size=8, seed=0)
    spread = [max(sizes[i] for i in batch) - min(sizes[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 3
    assert batches != sorted(batches, key=lambda batch: sizes[batch[0]]), "in random order"
