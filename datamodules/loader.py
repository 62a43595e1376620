"""The training loader. Its place in the data is two numbers, the epoch and the batches done, so any run can go on."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from datamodules.order import Order


class ResumableSampler(DistributedSampler):
    """Deals the rows of an order to the ranks. Can begin in the middle of an epoch.

    Rows that the ranks can't share evenly are left out.
    """

    skipped = 0  # samples of this rank that the next iteration leaves out; only the next one

    def __init__(self, order: Order, *, num_replicas: int, rank: int) -> None:
        super().__init__(order, num_replicas, rank, seed=order.seed, drop_last=True)  # type: ignore[arg-type]
        self.order = order

    @override
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. Another epoch than the one at hand begins at its first sample."""
        if epoch != self.epoch:
            self.skipped = 0
        super().set_epoch(epoch)

    @override
    def __iter__(self) -> Iterator[int]:
        skipped, self.skipped = self.skipped, 0  # when the first sample is drawn: a DataLoader makes iterators in vain
        own = self.order(self.epoch)[self.rank : self.total_size : self.num_replicas]
        yield from islice(own.tolist(), skipped, None)


class ResumableLoader(DataLoader):
    """A ``DataLoader`` over a :class:`ResumableSampler` that resumes with any number of workers.

    Its state counts the batches that were handed out, not those that workers have prepared. Iterating begins with the
    first batch that is asked for: Lightning makes the iterator before it tells the sampler the epoch.
    """

    batches_done = 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the batches of it that were handed out."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches_done": self.batches_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next iteration where ``state`` was taken."""
        sampler = self.sampler
        if not isinstance(sampler, ResumableSampler):  # Lightning's overfit_batches puts another in its place
            return
        sampler.set_epoch(state["epoch"])
        sampler.skipped = state["batches_done"] * (self.batch_size or 1)

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.batches_done = getattr(self.sampler, "skipped", 0) // (self.batch_size or 1)
        for batch in super().__iter__():
            self.batches_done += 1
            yield batch
