"""Records in files, read as a stream: JSON lines, JSON arrays and parquet, compressed or not. Errors name the file."""

import codecs
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from upit.core.files import content_digest

KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 2**20  # read at a time of a JSON file; ours
BATCH_ROWS = 1024  # read at a time of a parquet file; ours


@dataclass(frozen=True)
class DataFile:
    """A file of records, or a folder that ``datasets`` saved to disk."""

    path: Path
    domain: str

    @property
    def files(self) -> list[Path]:
        """All files that its content depends on."""
        if self.path.is_dir():
            return sorted(file for file in self.path.rglob("*") if file.is_file())
        return [self.path]


def data_files(names: list[str], *, field: str) -> list[DataFile]:
    """The files that names stand for: a file, a folder of files, a glob, or a folder that ``datasets`` saved to disk.

    A file's domain is its stem; where different files share it, as much of their paths as tells them apart.

    Raises:
        FileNotFoundError: no such file, or none that matches; names the field.
        ValueError: a file of another type, or an empty one.
    """
    paths = [path for name in names for path in _expand(name, field)]
    return [DataFile(path, domain) for path, domain in zip(paths, _domains(paths), strict=True)]


def _expand(name: str, field: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = sorted(str(part.parent) for part in path.glob("*/dataset_info.json"))
            raise ValueError(f"{field}: {name} holds several splits; name some of {splits}")
        if _saved_to_disk(path):
            return [path]
        found = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file) is not None)
        if not found:
            raise FileNotFoundError(f"{field}: the folder {name} holds no file of {_types()}")
    elif any(mark in name for mark in "*?[") and not path.exists():
        anchor = Path(path.anchor or ".")
        found = sorted(file for file in anchor.glob(str(path.relative_to(path.anchor))) if file.is_file())
        if not found:
            raise FileNotFoundError(f"{field}: no file matches {name}")
    else:
        found = [path]
    for file in found:
        _check_file(file, field)
    return found


def _saved_to_disk(path: Path) -> bool:
    return (path / "state.json").exists() and (path / "dataset_info.json").exists()


def _domains(paths: list[Path]) -> list[str]:
    """Stems of the files; of different files with one stem, the folders above it too, or the whole name."""
    distinct = {path.resolve(): path for path in paths}
    names = {key: _stem(path) for key, path in distinct.items()}
    for depth in range(1, max((len(key.parts) for key in distinct), default=0)):
        taken = Counter(names.values())
        if max(taken.values(), default=0) < 2:
            break
        for key, name in names.items():
            if taken[name] > 1:
                names[key] = "-".join([*key.parts[-depth - 1 : -1], _stem(key)])
    taken = Counter(names.values())
    names = {key: name if taken[name] == 1 else key.name for key, name in names.items()}  # one folder, several types
    return [names[path.resolve()] for path in paths]


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (*COMPRESSIONS, *KINDS):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name or path.name


def kind_of(path: Path) -> str | None:
    """``lines``, ``json`` or ``parquet`` by the file's name, in upper or lower case; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        kind = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind == "parquet" else kind
    return KINDS.get(suffixes[-1]) if suffixes else None


def _types() -> str:
    return f"{', '.join(KINDS)}, or with {' or '.join(COMPRESSIONS)} behind"


def _check_file(path: Path, field: str) -> None:
    if path.is_dir():
        return
    if not path.is_file():
        raise FileNotFoundError(f"{field}: {path} does not exist")
    if kind_of(path) is None:
        raise ValueError(f"{field}: {path} has an unsupported file type, expected {_types()}")
    if path.stat().st_size == 0:
        raise ValueError(f"{field}: {path} is empty")


def read_records(path: Path, *, field: str) -> Iterator[tuple[int, Any]]:
    """Stream the records of a file, each with its number: that of its line in JSON lines, else of the record.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another type of file, an empty one, or a damaged one (named with the line).
    """
    _check_file(path, field)
    if path.is_dir():
        yield from _saved_rows(path, field)
    elif kind_of(path) == "parquet":
        yield from _parquet_rows(path, field)
    else:
        with _opened(path) as stream:
            try:
                yield from _lines(path, stream) if kind_of(path) == "lines" else _values(path, stream)
            except (EOFError, zlib.error, OSError) as error:
                raise ValueError(f"{field}: {path} is damaged: {error}") from None


def _saved_rows(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    from datasets import load_from_disk

    try:
        yield from enumerate(load_from_disk(str(path)), 1)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{field}: the dataset in {path} can't be read: {error}") from None


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{field}: {path} is not a valid parquet file (read {number} rows): {error}") from None


def _opened(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """JSON lines. A line ends at a newline alone: JSON allows Unicode's other line ends in a string."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            with _json_errors(path, number, "broken JSON line"):
                value = json.loads(line.rstrip().decode())
            yield number, value


class _json_errors:  # noqa: N801, a context manager
    """Raises: ValueError: what is wrong in a piece of JSON, with file and line."""

    def __init__(self, path: Path, line: int, what: str) -> None:
        self.path, self.line, self.what = path, line, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(f"{self.path}:{self.line}: not valid UTF-8: {error.reason}") from None
        if isinstance(error, RecursionError):
            raise ValueError(f"{self.path}:{self.line}: {self.what}: nested too deeply") from None
        if isinstance(error, json.JSONDecodeError):
            line = self.line + error.lineno - 1
            raise ValueError(f"{self.path}:{line}: {self.what}: {error.msg}") from None
        if isinstance(error, ValueError):  # Python reads no integers of thousands of digits
            raise ValueError(f"{self.path}:{self.line}: {self.what}: {error}") from None


class _Text:
    """The decoded text of a stream, a window of it in memory."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self.stream = path, stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.window, self.at, self.line = "", 0, 1
        self.whole = False  # whether the stream is read to its end

    def more(self) -> bool:
        """Read on, twice as much as is in memory at least; False at the end."""
        self.line += self.window.count("\n", 0, self.at)
        self.window, self.at = self.window[self.at :], 0
        chunk = self.stream.read(max(CHUNK_BYTES, len(self.window)))
        self.whole = not chunk
        with _json_errors(self.path, self.line + self.window.count("\n"), "broken JSON"):
            self.window += self.decode(chunk, self.whole)
        return not self.whole

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self.window) and self.window[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.window):
                return self.window[self.at]
            if not self.more() and self.at >= len(self.window):
                return ""

    def value(self) -> Any:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                with _json_errors(self.path, self.line, "broken JSON"):
                    value, end = _DECODER.raw_decode(self.window, self.at)
            except ValueError:
                if self.whole or not self.more():
                    raise
                continue
            if end == len(self.window) and not self.whole:  # a number may go on
                self.more()
                continue
            self.at = end
            return value


_DECODER = json.JSONDecoder()


def _values(path: Path, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, or JSON values one after the other (JSON lines named .json)."""
    text = _Text(path, stream)
    array = text.peek() == "["
    text.at += array
    number = 0
    while (mark := text.peek()) and not (array and number == 0 and mark == "]"):
        if array and number:
            if mark == "]":
                break
            if mark != ",":
                line = text.line + text.window.count("\n", 0, text.at)
                raise ValueError(f"{path}:{line}: broken JSON: expecting ',' or ']'")
            text.at += 1
        number += 1
        yield number, text.value()
    if array and not mark:
        raise ValueError(f"{path}:{text.line + text.window.count(chr(10))}: broken JSON: the array has no end")


def file_digest(path: Path, field: str) -> str:
    """sha256 of a file's content; computed once per process."""
    if not path.is_file():
        raise FileNotFoundError(f"{field}: {path} does not exist")
    return content_digest(path)


def count_records(path: Path) -> int | None:
    """About how many records a file holds, without parsing them; None where that takes as long as reading them."""
    kind, compressed = kind_of(path), path.suffix.lower() in COMPRESSIONS
    if path.is_dir() or compressed or kind == "json":
        return None
    if kind == "parquet":
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows
    with path.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""))
