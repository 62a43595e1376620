"""Rows of training batches: several examples packed into one row, or examples of similar length together."""

import random
from collections.abc import Sequence


def pack(lengths: Sequence[int], *, capacity: int, seed: int, window: int = 1024) -> list[list[int]]:
    """Pack examples into rows of at most ``capacity`` tokens: first-fit-decreasing within shuffled windows.

    Args:
        lengths: tokens of each example, none above ``capacity``.
        window: examples packed together; keeps the rows a random mix and the packing fast.
    Returns: rows of indices, every index once.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    rows: list[list[int]] = []
    for start in range(0, len(order), window):
        rows += _first_fit(sorted(order[start : start + window], key=lambda i: -lengths[i]), lengths, capacity)
    return rows


def _first_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        for row, free in enumerate(room):
            if lengths[index] <= free:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(capacity - lengths[index])
    return rows


def group_by_length(lengths: Sequence[int], *, batch_size: int, seed: int, window: int = 64) -> list[list[int]]:
    """Batches of ``batch_size`` examples of similar length, in random order; the incomplete last one is left out.

    Args:
        window: batches sorted together; a larger one pads less and mixes less.
    """
    shuffle = random.Random(seed)
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * window):
        part = sorted(order[start : start + batch_size * window], key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part) - batch_size + 1, batch_size)]
    shuffle.shuffle(batches)
    return batches
