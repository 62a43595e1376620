"""Work a little ahead of whoever takes the results, in threads: torch and file reads let go of Python's lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(compute: Callable[[T], R], items: Iterable[T], *, workers: int = 2, waiting: int = 1) -> Iterator[R]:
    """``compute(item)`` of every item, in order, with at most ``workers`` of them at work and ``waiting`` beside."""
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(pool.submit(compute, item))
            if len(pending) >= workers + waiting:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
