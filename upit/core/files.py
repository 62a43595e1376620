"""Small files, written beside and renamed, so that a reader never sees half of one; and digests."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value in plain types. JSON has no NaN and no infinity: they become null; :func:`as_nan` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(_without_nan(value), indent=indent, allow_nan=False) + "\n")
    os.replace(beside, path)


Fields = Mapping[str, type | tuple[type, ...]]  # the fields of an object, and their types


class FileError(ValueError):
    """A file can't be read, or does not hold what it should; the message names it."""


def read_json(path: Path, kind: type | None = None) -> Any:
    """Read a JSON file.

    Args:
        kind: type of the value at the top, dict or list.
    Raises: FileError: the file is missing, is not valid JSON, or holds another kind of value.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} can't be read as JSON: {str(error) or type(error).__name__}") from None
    if kind is not None and not isinstance(value, kind):
        raise FileError(f"{str(path)!r} holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def check_fields(value: Any, fields: Fields, file: str | Path, where: str) -> None:
    """Check that part of a JSON file is an object with certain fields.

    Args:
        fields: type of each field that must be there; a number for float may be written as an integer.
        where: of the part in the file, for the error.
    Raises: FileError: names the file, the part, and the field.
    """
    if not isinstance(value, dict):
        raise FileError(f"{str(file)!r}: {where} is {value!r:.80}, expected an object")
    for name, kind in fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if name not in value:
            raise FileError(f"{str(file)!r}: {where} has no field {name!r}")
        found = value[name]
        is_right = isinstance(found, (*kinds, int) if float in kinds else kinds)
        if not is_right or (isinstance(found, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise FileError(f"{str(file)!r}: {where}.{name} is {found!r:.80}, expected {expected}")


def plain_name(name: Any, file: Path, where: str) -> str:
    """The name of a file that another one lists, which must lie in the same folder.

    Raises: FileError: it is not a plain file name, such as "../x" or an absolute path.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or {"/", "\\", "\0"} & set(name):
        raise FileError(f"{str(file)!r}: {where} names {name!r:.200}, which is not a file of this folder")
    return name


def as_nan(value: Any) -> Any:
    """Scores that were read from JSON, with NaN in the place of null."""
    if isinstance(value, dict):
        return {key: as_nan(content) for key, content in value.items()}
    if isinstance(value, list):
        return [as_nan(content) for content in value]
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Versions of the formats that upit writes and reads again. Raise one when the format changes.
MANIFEST_VERSION = 1  # manifest.json of a pool
RECORD_VERSION = 1  # the file beside a merged expert, a copy, or routing vectors
LINEAGE_VERSION = 1  # lineage.json
SEEDS_VERSION = 1  # seed_perplexity.json
CHECKPOINT_VERSION = 1  # what a training checkpoint says about its model
MAKE_AGAIN = "make it again with this version, or use the version that wrote it"


def check_version(content: Any, expected: int, file: str | Path, remedy: str) -> None:
    """Check the format version of a file that upit wrote.

    Args:
        content: what the file holds; a dict with ``version``, or an older format without one.
        remedy: what to do about another version.
    Raises: FileError: it is another.
    """
    found = content.get("version") if isinstance(content, Mapping) else None
    if found != expected:
        said = "has no format version" if found is None else f"has format version {found!r}"
        raise FileError(f"{str(file)!r} {said}, this version of upit reads {expected}: {remedy}")


def write_sealed(path: Path, content: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write JSON with the sha256 of its content.

    Args:
        content: in plain types; holds its format's ``version``.
    """
    plain = _without_nan(content)
    write_json(path, {**plain, "sha256": digest(plain)}, indent=indent)


def read_sealed(path: Path, version: int, remedy: str) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote.

    Args:
        version: the format's.
        remedy: what to do about a file of another version.
    Raises: FileError: it is of another version, or damaged; names the file.
    """
    content = read_json(path)
    check_version(content, version, path, remedy)
    sha256 = content.pop("sha256", None)
    if digest(content) != sha256:
        raise FileError(f"{str(path)!r} is damaged: its sha256 is not the one it was written with")
    return content


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
