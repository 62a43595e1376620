"""Rows of training batches: several examples packed into one row, or examples of similar length together."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

WINDOW = 16384  # examples packed together; ours


class Rows(Sequence[list[int]]):
    """Lists of places in two arrays, about 12 bytes an example.

    Args:
        places: of all rows, one after the other.
        ends: where each row ends in them.
    """

    def __init__(self, places: np.ndarray, ends: np.ndarray) -> None:
        self.places = places.astype(np.int32)
        self.ends = ends.astype(np.int64)

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | np.ndarray]) -> "Rows":
        parts = [np.asarray(row, np.int32) for row in rows]
        return cls(np.concatenate([np.empty(0, np.int32), *parts]), np.cumsum([len(part) for part in parts]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self.ends[index]  # IndexError ends an iteration
        return self.places[self.ends[index - 1] if index % len(self) else 0 : end].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def pack(lengths: Sequence[int] | np.ndarray, *, capacity: int, seed: int, window: int = WINDOW) -> Rows:
    """Pack examples into rows of at most ``capacity`` tokens: best-fit-decreasing within shuffled windows.

    Takes about a microsecond an example, whatever the window.

    Args:
        lengths: tokens of each example, none above ``capacity``.
        window: examples packed together; a smaller one mixes more and fills less.
    Returns: rows of indices, every index once.
    """
    lengths = np.asarray(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    row_of = np.empty(len(lengths), np.int64)
    count = 0
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        rows, made = _best_fit(lengths[part].tolist(), capacity)
        row_of[part] = np.asarray(rows) + count
        count += made
    by_row = np.lexsort((np.arange(len(lengths)), -lengths, row_of))
    return Rows(by_row, np.cumsum(np.bincount(row_of, minlength=count)))


def _best_fit(lengths: list[int], capacity: int) -> tuple[list[int], int]:
    """Row of each length, the fullest that has room for it, and the number of rows.

    ``free`` has a bit for every amount of room that some row has left, so the smallest that suffices is found at once.
    """
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    free, count, rows = 0, 0, []
    for length in lengths:
        enough = free >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
        else:
            room, row, count = capacity, count, count + 1
        rows.append(row)
        left = room - length
        with_room[left].append(row)
        free |= 1 << left
    return rows, count


def group_by_length(
    lengths: Sequence[int] | np.ndarray, *, batch_size: int, seed: int, ranks: int = 1, window: int = 64
) -> Rows:
    """Batches of ``batch_size`` examples of similar length, in random order; every example once.

    The examples that are left over make up smaller batches, in which every rank still has an example. Only where they
    are fewer than the ranks, one batch is larger by them.

    Args:
        ranks: processes that share each batch.
        window: batches sorted together; a larger one pads less and mixes less.
    """
    lengths = np.asarray(lengths)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * window):
        part = order[start : start + batch_size * window]
        part = part[np.argsort(lengths[part], kind="stable")]
        count = min(-(-len(part) // batch_size), len(part) // ranks)
        if count:
            batches += np.array_split(part, count)
        elif batches:
            batches[-1] = np.concatenate([batches[-1], part])
    return Rows.of(batches[i] for i in generator.permutation(len(batches)))
