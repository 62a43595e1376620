"""One expert on disk, and the tensors that are read of it."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from upit.core.gpu import CPU
from upit.core.tensor_files import Specs, TensorFileError, TensorFiles
from upit.model.families import is_expert

READERS = 4  # files, or tensors, at a time; ours


class Rows:
    """One tensor on disk, of which only the rows that are indexed are read."""

    def __init__(self, files: TensorFiles, name: str, device: torch.device = CPU) -> None:
        self._files = files
        self._name = name
        self._device = device

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        rows, *others = index if isinstance(index, tuple) else (index,)
        return self._files.read(self._name, rows, device=self._device)[(slice(None), *others)]


class Reader(Protocol):
    """Where experts' tensors are kept beside their files, such as a GPU's memory."""

    device: torch.device

    def wait_for(self, file: Path) -> None:
        """Wait until a file that is written in the background is complete."""

    def read(self, expert: "Expert", name: str) -> Tensor:
        """One tensor of an expert, on the device."""

    def write_once(self, file: Path, tensors: Iterable[tuple[str, Tensor]], specs: Specs, fingerprint: str) -> None:
        """Write a file in the background, unless it is there."""

    def written(self, track: Callable[..., Iterable[Path]]) -> dict[Path, str]:
        """sha256 of all files of :meth:`write_once`, once they are complete."""


@dataclass
class Expert:
    """One expert's parameters on disk, named as in the dense state dict."""

    file: Path
    sha256: str
    dtype: str
    step: int = 0
    epoch: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)  # where it comes from, in plain types, for the lineage
    rest: Path | None = None  # file or directory with the other parameters of its checkpoint, where they were kept
    rest_sha256: str | None = None  # of that file, where a pool keeps it
    names: Mapping[str, str] | None = None  # what the file calls each tensor, where that differs
    residence: "Reader | None" = None  # a device that its tensors are read to

    @cached_property
    def tensors(self) -> TensorFiles:
        """What the file holds; one that is still being written is waited for."""
        if self.residence:
            self.residence.wait_for(self.file)
        files = TensorFiles(self.file)
        return files.renamed(self.names) if self.names else files

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each expert tensor, in order of names; a checkpoint directory holds others too."""
        own = filter(is_expert, self.tensors) if self.file.is_dir() else self.tensors
        return {name: self.tensors[name].shape for name in sorted(own)}

    @property
    def specs(self) -> Specs:
        """Dtype and shape of each tensor, as :func:`write_expert` wants them."""
        return {name: (self.tensors[name].dtype, shape) for name, shape in self.shapes.items()}

    @property
    def device(self) -> torch.device:
        """Where a tensor is once it is read."""
        return self.residence.device if self.residence else CPU

    def read(self, name: str, *, out: Tensor | None = None, device: torch.device = CPU) -> Tensor:
        """One tensor, read from disk now, or from the residence; see
        :meth:`upit.core.tensor_files.TensorFiles.read`.
        """
        if self.residence:
            return self.residence.read(self, name)
        return self.tensors.read(name, out=out, device=device)

    def get_slice(self, name: str, device: torch.device = CPU) -> Rows:
        """One tensor, of which only the part that is indexed is read, to a device."""
        return Rows(self.tensors, name, device)

    def check(self) -> None:
        """Raises: TensorFileError: a file is missing, truncated, or its sha256 is another."""
        _check_sha256(self.file, self.sha256)
        if self.rest and self.rest_sha256:
            _check_sha256(self.rest, self.rest_sha256)


def _check_sha256(file: Path, sha256: str) -> None:
    if not file.exists():
        raise TensorFileError(f"expert file {str(file)!r} is missing; harvest again or restore it")
    TensorFiles(file)
    found = file_sha256(file)
    if found != sha256:
        raise TensorFileError(
            f"expert file {str(file)!r} has sha256 {found}, the manifest says {sha256}; harvest again or restore it"
        )


def file_sha256(path: Path) -> str:
    """Of a file's content, read once a process for as long as its size and time stay."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, time: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
