"""Safetensors files, read and written one tensor at a time.

Nothing is mapped: a tensor is read into memory of its own and let go with it, so resident memory stays near the
tensors in use, however large the files are. Every tensor is checked for NaN and infinity when it is first read, and
when it is written.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from upit.core.files import digest, plain_name, read_json, write_json
from upit.core.gpu import CPU, beside
from upit.core.tensor_header import DTYPES, Entry, TensorFileError, read_header

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class NotFiniteTensorError(TensorFileError):
    """A tensor that is to be written holds NaN or infinity."""


class TensorFiles(Mapping[str, Entry]):
    """The tensors of one safetensors file, or of a checkpoint directory with one file or sharded ones.

    Raises: TensorFileError: a file is missing or damaged, or holds a dtype that is not a float's; or the index of a
        sharded checkpoint names a tensor or a file that is not there.
    """

    def __init__(self, path: Path) -> None:
        self._entries: dict[str, Entry] = {}
        self._finite: set[str] = set()  # tensors that have been read as a whole
        for file, expected in _files(path).items():
            entries, _ = read_header(file)
            missing = sorted(expected - entries.keys())
            if missing:
                raise TensorFileError(f"{file}: tensor {missing[0]!r} is missing, though {INDEX} lists it here")
            twice = sorted(entries.keys() & self._entries.keys())
            if twice:
                raise TensorFileError(f"{file}: tensor {twice[0]!r} is also in {self._entries[twice[0]].file}")
            self._entries.update(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def stamp(self) -> str:
        """Changes when a file does: a digest of names, sizes and times, for what is too large to hash."""
        files = sorted({entry.file for entry in self._entries.values()})
        return digest([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files])

    def renamed(self, names: Mapping[str, str]) -> "TensorFiles":
        """Some of the tensors under other names.

        Args:
            names: new name -> name in the files.
        Raises: TensorFileError: a file lacks one of them.
        """
        view = object.__new__(TensorFiles)
        missing = sorted(set(names.values()) - self._entries.keys())
        if missing:
            raise TensorFileError(
                f"{next(iter(self._entries.values())).file.parent}: tensor {missing[0]!r} is missing"
            )
        view._entries, view._finite = {new: self._entries[old] for new, old in names.items()}, set()
        return view

    def read(
        self,
        name: str,
        rows: slice = slice(None),
        *,
        out: Tensor | None = None,
        device: torch.device = CPU,
    ) -> Tensor:
        """A tensor, or some of its rows (a contiguous range of its first dimension), read from disk now.

        Args:
            out: contiguous tensor of the same shape and dtype to read into; fresh memory costs more than the reading.
            device: where the tensor goes then, and is checked; to a GPU by way of pinned memory, which torch keeps for
                the next, while that GPU may be busy.
        Raises: TensorFileError: it holds NaN or infinity.
        """
        entry = self._entries[name]
        first, last, _ = rows.indices(entry.shape[0]) if entry.shape else (0, 1, 1)
        shape = (max(0, last - first), *entry.shape[1:]) if entry.shape else ()
        tensor = torch.empty(shape, dtype=entry.dtype, pin_memory=device.type == "cuda") if out is None else out
        if (tensor.shape, tensor.dtype) != (shape, entry.dtype):
            raise TensorFileError(
                f"{entry.file}: tensor {name!r} is {entry.dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        start = entry.start + first * (tensor.nbytes // max(1, last - first))
        return self._read(tensor, entry.file, start, {name: tensor.numel()}, whole=shape == entry.shape, device=device)

    def read_all(self, names: Iterable[str], *, device: torch.device = CPU) -> dict[str, Tensor]:
        """Whole tensors, as :meth:`read` each; those that lie side by side in one file are one read and one copy."""
        names = sorted(names, key=lambda name: self._entries[name].start)
        entries = [self._entries[name] for name in names]
        sizes = [math.prod(entry.shape) for entry in entries]
        for entry, size, after in zip(entries, sizes, entries[1:], strict=False):
            end = entry.start + size * entry.dtype.itemsize
            if (entry.file, entry.dtype, end) != (after.file, after.dtype, after.start):
                return {name: self.read(name, device=device) for name in names}
        flat = torch.empty(sum(sizes), dtype=entries[0].dtype, pin_memory=device.type == "cuda")
        parts = dict(zip(names, sizes, strict=True))
        flat = self._read(flat, entries[0].file, entries[0].start, parts, whole=True, device=device)
        return {n: part.view(e.shape) for n, e, part in zip(names, entries, flat.split(sizes), strict=True)}

    def _read(
        self, tensor: Tensor, file: Path, start: int, parts: Mapping[str, int], *, whole: bool, device: torch.device
    ) -> Tensor:
        """Fill a tensor from a byte of a file on, take it to a device and check it there.

        Args: ``parts``: whose elements it holds, and how many of each; all of them, if ``whole``.
        """
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            _fill(_bytes_of(tensor), stream, file)
        with beside(device):
            tensor = tensor.to(device)
            if not self._finite.issuperset(parts):
                if not _is_finite(tensor):
                    for name, part in zip(parts, tensor.flatten().split(list(parts.values())), strict=True):
                        check_finite(part, name, file)
                if whole:
                    self._finite.update(parts)
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(device))  # where it is used
        return tensor


def open_tensors(path: str, field: str) -> TensorFiles:
    """The tensors at a path that someone set; an error names the field."""
    try:
        return TensorFiles(Path(path))
    except TensorFileError as error:
        raise TensorFileError(f"{field}={path!r}: {error}") from None


def check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raises: TensorFileError: the tensor holds NaN or infinity."""
    if not _is_finite(tensor):
        raise TensorFileError(f"{file}: tensor {name!r} holds NaN or infinity")


def _is_finite(tensor: Tensor) -> bool:
    # aminmax passes NaN on, and is much faster than isfinite (docs/performance.md)
    return not tensor.numel() or all(math.isfinite(end) for end in torch.aminmax(tensor))


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    specs: Specs,
    metadata: Mapping[str, str] | None = None,
    watch: Callable[[Any], None] = lambda content: None,
) -> None:
    """Stream tensors into a safetensors file, one in memory at a time.

    Args:
        path: appears only when complete, and on disk.
        tensors: (name, tensor) in the order of ``specs``.
        specs: dtype and shape of every tensor.
        metadata: of the safetensors header.
        watch: called with all that is written, piece by piece, such as a hash's update.
    Raises: TensorFileError: a tensor differs from its spec, or holds NaN or infinity.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb", buffering=0) as stream:
        for content in _pieces(path, tensors, specs, metadata or {}):
            _drain(memoryview(content), stream)
            watch(content)
        os.fsync(stream.fileno())
    os.replace(beside, path)


def write_checkpoint(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], specs: Specs, *, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Stream tensors into the weight files of a checkpoint directory, named and indexed as transformers does.

    Args:
        tensors, specs: as for :func:`write_tensors`.
        max_shard_bytes: of a file's tensors; a larger tensor has a file of its own.
    """
    shards, content = _shards(specs, max_shard_bytes), iter(tensors)
    for file, shard in shards.items():
        write_tensors(directory / file, islice(content, len(shard)), shard, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": size_of(specs)}, "weight_map": weight_map})


def _shards(specs: Specs, max_bytes: int) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + _size(*spec) > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += _size(*spec)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def size_of(specs: Specs) -> int:
    """Bytes of all tensors."""
    return sum(_size(*spec) for spec in specs.values())


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _pieces(path: Path, tensors: Iterable[tuple[str, Tensor]], specs: Specs, metadata: Mapping[str, str]):
    yield _header(specs, metadata)
    for (name, tensor), (expected, spec) in zip(tensors, specs.items(), strict=True):
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, *spec):
            raise TensorFileError(f"{path}: got {name} {tensor.dtype} {tuple(tensor.shape)}, not {expected} {spec}")
        if not _is_finite(tensor):
            raise NotFiniteTensorError(f"{path}: tensor {name!r} holds NaN or infinity")
        yield _bytes_of(tensor.contiguous())


def _header(specs: Specs, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = _size(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _files(path: Path) -> dict[Path, set[str]]:
    """The files at a path, and the tensors that an index says each one holds."""
    if not path.is_dir():
        return {path: set()}
    index = path / INDEX
    if index.exists():
        weight_map = read_json(index, dict).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise TensorFileError(f"{str(index)!r} has no weight_map of tensors to files")
        files: dict[Path, set[str]] = {}
        for name, file in sorted(weight_map.items(), key=str):
            files.setdefault(path / plain_name(file, index, "weight_map"), set()).add(name)
        return dict(sorted(files.items()))
    if not (path / SINGLE).exists():
        raise TensorFileError(
            f"{str(path)!r} holds neither {SINGLE} nor {INDEX}; pickled weights are not read: save it as safetensors"
        )
    return {path / SINGLE: set()}


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _fill(content: memoryview, stream: BinaryIO, file: Path) -> None:
    """Read exactly this many bytes; one call reads 2 GiB at most."""
    while content:
        count = stream.readinto(content)  # type: ignore[attr-defined]
        if not count:
            raise TensorFileError(f"tensor file {str(file)!r} is truncated")
        content = content[count:]


def _drain(content: memoryview, stream: BinaryIO) -> None:
    while content:
        content = content[stream.write(content) :]
