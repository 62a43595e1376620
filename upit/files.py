"""Small files, written beside and renamed, so that a reader never sees half of one; and digests."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=indent) + "\n")
    os.replace(beside, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def digest(value: Any) -> str:
    """sha256 of a value in plain types: the fingerprint of all that a file depends on."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """sha256 of a file; computed once per process unless the file is written to."""
    stat = path.stat()
    return _content_digest(path.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@cache
def _content_digest(path: Path, *version: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seeded(*key: Any) -> torch.Generator:
    """A random generator seeded by a key, so that what is drawn depends on no order of work."""
    content = hashlib.sha256(json.dumps(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(content[:7], "big"))


def check_output(output: Path) -> None:
    """Raises: FileExistsError: the directory holds something."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output={str(output)!r} is not empty; name another directory")


@contextmanager
def fresh_directory(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which takes the name ``output`` once it is complete.

    Args:
        overwrite: replace what is at ``output`` then.
    Raises: FileExistsError: the output is not empty.
    """
    if not overwrite:
        check_output(output)
    beside = output.with_name(output.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    if output.exists():
        shutil.rmtree(output)
    beside.replace(output)


class Estimate(NamedTuple):
    """Bytes that some work will take."""

    memory: int  # beyond what the process holds already
    disk: int

    def __str__(self) -> str:
        return f"{self.memory / 1e6:.0f} MB of memory, {self.disk / 1e9:.2f} GB on disk"

    def then(self, other: "Estimate") -> "Estimate":
        """Of one work after another: what the first wrote stays, its memory is free again."""
        return Estimate(max(self.memory, other.memory), self.disk + other.disk)

    def check(self, output: Path) -> None:
        """Raises: ValueError: the memory, or the disk at ``output``, can't hold it."""
        place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
        for what, needed, free in (
            ("memory", self.memory, psutil.virtual_memory().available),
            (f"disk at {str(place)!r}", self.disk, shutil.disk_usage(place).free),
        ):
            if needed > free:
                raise ValueError(f"this needs {needed / 1e9:.2f} GB of {what}, {free / 1e9:.2f} GB are free")
