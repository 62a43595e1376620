"""Types of what callers hand in: how progress is shown, and in which precision a pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

Autocast = Callable[[], AbstractContextManager]


Track = Callable[..., Iterable]


def untracked(names: Iterable, what: str = "") -> Iterable:
    return names
