"""Records in files: JSONL, JSON and parquet. Errors name the setting that named the file."""

import hashlib
import json
from pathlib import Path
from typing import Any


def read_rows(path: Path, *, field: str) -> list[dict[str, Any]]:
    """Records of a JSONL, JSON or parquet file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, an empty one, or a broken line (named).
    """
    _check_file(path, field)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{field}: {path} is no parquet file: {error}") from None
    if path.suffix == ".jsonl":
        return read_json_lines(path, field=field)
    if path.suffix == ".json":
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    raise ValueError(f"{field}: {path} is none of .jsonl, .json, .parquet")


def read_json_lines(path: Path, *, field: str) -> list[dict[str, Any]]:
    """Records of a JSONL file; a broken line is named by its number."""
    _check_file(path, field)
    rows = []
    for number, line in enumerate(path.read_text().split("\n"), 1):  # splitlines would split inside strings too
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: broken JSON line: {error.msg}") from None
    return rows


def _check_file(path: Path, field: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{field}: {path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"{field}: {path} is empty")


def file_digest(path: Path, field: str) -> str:
    _check_file(path, field)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
