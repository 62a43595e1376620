"""Small files, written beside and renamed, so that a reader never sees half of one; and digests."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def digest(value: Any) -> str:
    """sha256 of a value in plain types: the fingerprint of all that a file depends on."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
