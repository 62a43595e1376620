"""Shares of work over ranks, and collectives that are nothing in one process."""

import pytest
import torch

from upit.core import distributed
from upit.core.distributed import all_sum, barrier, broadcast, own_share


@pytest.fixture
def as_rank(monkeypatch):
    def be(rank: int, size: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: size)

    return be


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_batch_counts_once_and_ranks_keep_step(as_rank, size, count):
    shares = []
    for rank in range(size):
        as_rank(rank, size)
        shares.append(own_share(list(range(count))))
    assert len({len(share) for share in shares}) == 1
    assert sorted(batch for share in shares for batch, counts in share if counts) == list(range(count))


def test_no_batches_is_no_share(as_rank):
    as_rank(1, 2)
    assert own_share([]) == []


def test_one_process_needs_no_group():
    tensor = torch.tensor([1.0, 2.0])
    assert all_sum(tensor) is tensor
    assert broadcast({"a": 1}) == {"a": 1}
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    barrier()
