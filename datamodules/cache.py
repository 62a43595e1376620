"""The cache of prepared data: an entry appears under its name once it is whole, and one process makes it."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from upit.core.files import read_json, write_json

CONTENTS = "contents.json"  # written last: size and sha256 of every other file of the entry
UNFINISHED = "unfinished."


def is_whole(entry: Path, *, digests: bool = False) -> bool:
    """Whether an entry holds all of its files, by size or by digest too."""
    try:
        contents: dict[str, Any] = read_json(entry / CONTENTS)
        return all(
            (entry / name).stat().st_size == size and (not digests or _sha256(entry / name) == digest)
            for name, (size, digest) in contents.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def make_entry(entry: Path, make: Callable[[Path], None], *, wait_notice: str) -> None:
    """Make an entry of the cache, unless another process makes it meanwhile. A damaged one is replaced.

    Args:
        make: fills an empty folder.
        wait_notice: told once if another process is at work on this entry.
    Raises: ValueError: the cache can't be written.
    """
    unfinished = entry.with_name(UNFINISHED + entry.name)
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir={str(entry.parent)!r} can't be written: {error}") from None
    with _claimed(unfinished, wait_notice) as folder:
        _remove_leftovers(entry.parent, but=folder)
        if is_whole(entry, digests=True):
            return
        data = folder / "data"
        make(data)
        files = sorted(file for file in data.rglob("*") if file.is_file())
        write_json(
            data / CONTENTS, {str(file.relative_to(data)): [file.stat().st_size, _sha256(file)] for file in files}
        )
        if entry.exists():
            entry.rename(folder / "damaged")
        data.rename(entry)


@contextmanager
def _claimed(folder: Path, wait_notice: str) -> Iterator[Path]:
    """A folder that only this process fills; a killed process leaves no claim behind. Removed at the end."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # its owner has just removed it
            continue
        try:
            if not _lock(handle, wait=False):
                rank_zero_info(wait_notice)
                _lock(handle, wait=True)
            if not _is_at(handle, folder):
                continue
            for leftover in folder.iterdir():
                shutil.rmtree(leftover)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return
        finally:
            os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: whoever is first then wins
        return True
    return True


def _is_at(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def _remove_leftovers(cache: Path, *, but: Path) -> None:
    """Remove what killed processes left."""
    for folder in set(cache.glob(UNFINISHED + "*")) - {but}:
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, folder):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # at work, or no locks here
            pass
        finally:
            os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
