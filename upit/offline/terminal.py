"""What the stages on files share: progress bars, and an allocator setting."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: a tensor's memory anew from the kernel costs several times the work on it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-1, 2**31 - 1), (-3, 1 << 25), (-8, 1)):  # trim and mmap thresholds, number of arenas
            mallopt(option, value)


def bar(items: Iterable, text: str) -> Iterable:
    from tqdm.auto import tqdm

    return tqdm(items, text, leave=False)
