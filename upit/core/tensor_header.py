"""The header of a safetensors file, validated before anything is allocated by what it says."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from upit.core.files import FileError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


class TensorFileError(FileError):
    """A tensor file is missing, damaged or changed, or holds another tensor than it should."""


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read and validate a header by the rules of the safetensors format.

    The tensors cover the rest of the file without gap or overlap, and each one's bytes match its dtype and shape.

    Returns: the tensors by name, and the metadata.
    Raises: TensorFileError: names the file, and the tensor where one is at fault.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(file, "it is truncated, or its header is longer than the file")
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except TensorFileError:
        raise
    except OSError as error:
        raise TensorFileError(f"tensor file {str(file)!r} can't be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error) or type(error).__name__) from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(file, "__metadata__ is not an object of strings")
    if not header:
        raise _damaged(file, "it holds no tensors")
    spans = {name: _span(file, name, fields) for name, fields in header.items()}
    _check_cover(file, spans, size - 8 - length)
    entries = {
        name: Entry(file, DTYPES[header[name]["dtype"]], tuple(header[name]["shape"]), 8 + length + start)
        for name, (start, _) in spans.items()
    }
    return entries, metadata


def _damaged(file: Path, reason: str) -> TensorFileError:
    return TensorFileError(f"{str(file)!r} is not a valid safetensors file: {reason}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header has the key {twice!r} twice")
    return fields


def _span(file: Path, name: str, fields: Any) -> tuple[int, int]:
    """First and last byte of a tensor, counted from the end of the header."""
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise _damaged(file, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TensorFileError(f"{file}: tensor {name!r} has dtype {dtype!s:.40}; supported: {sorted(DTYPES)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(file, f"tensor {name!r} has shape {shape!s:.80} and data_offsets {offsets!s:.80}")
    start, end = offsets
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != needed:
        raise _damaged(file, f"tensor {name!r}, {dtype} {shape}, needs {needed} bytes but has {end - start}")
    return start, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(file: Path, spans: dict[str, tuple[int, int]], size: int) -> None:
    """Raises: TensorFileError: the tensors overlap, leave a gap, or do not end where the file does."""
    position = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != position:
            what = "overlaps the one before it" if start < position else "leaves a gap before it"
            raise _damaged(file, f"tensor {name!r} {what}: it starts at byte {start}, not {position}")
        position = end
    if position != size:
        raise _damaged(file, f"its tensors end at byte {position} of {size}: it is truncated, or has bytes after them")
