"""The pool of harvested experts on disk: safetensors files and a manifest, each written beside and renamed."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upit.files import read_json, write_json

Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class ExpertFileError(ValueError):
    """An expert's file is missing, truncated, changed or of another shape."""


@dataclass
class Expert:
    """One expert's parameters on disk, named as in the dense state dict."""

    file: Path
    sha256: str
    dtype: str
    step: int = 0
    epoch: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, in the file's order of names."""
        with self._open() as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}

    def read(self, name: str) -> Tensor:
        """One tensor, read from disk now."""
        with self._open() as file:
            return file.get_tensor(name)

    def get_slice(self, name: str):
        """One tensor, of which only the part that is indexed is read."""
        with self._open() as file:
            return file.get_slice(name)

    def check(self) -> None:
        """Raises: ExpertFileError: the file is missing, truncated, or its sha256 is another."""
        if not self.file.exists():
            raise ExpertFileError(f"expert file {str(self.file)!r} is missing; harvest again or restore it")
        with self._open():
            pass
        found = file_sha256(self.file)
        if found != self.sha256:
            raise ExpertFileError(
                f"expert file {str(self.file)!r} has sha256 {found}, the manifest says {self.sha256}"
            )

    def _open(self):
        try:
            return safe_open(self.file, "pt")
        except (SafetensorError, OSError) as error:
            raise ExpertFileError(f"expert file {str(self.file)!r} can't be read (truncated?): {error}") from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_expert(
    path: Path, tensors: Iterable[tuple[str, Tensor]], specs: Specs, metadata: Mapping[str, str] | None = None
) -> str:
    """Stream tensors into a safetensors file, one in memory at a time.

    Args:
        path: appears only when complete.
        tensors: (name, tensor) in the order of ``specs``.
        specs: dtype and shape of every tensor.
        metadata: of the safetensors header.
    Returns: the file's sha256.
    Raises: ExpertFileError: a tensor differs from its spec, or holds NaN or infinity.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as stream:
        for part in (len(head).to_bytes(8, "little"), head):
            stream.write(part)
            digest.update(part)
        for (name, tensor), (expected, spec) in zip(tensors, specs.items(), strict=True):
            if (name, tensor.dtype, tuple(tensor.shape)) != (expected, *spec):
                raise ExpertFileError(
                    f"{path}: got {name} {tensor.dtype} {tuple(tensor.shape)}, not {expected} {spec}"
                )
            if not torch.isfinite(tensor).all():
                raise ExpertFileError(f"{path}: tensor {name!r} holds NaN or infinity")
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            stream.write(content)
            digest.update(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)
    return digest.hexdigest()


class Pool:
    """A directory of harvested experts and the base they started from.

    ``manifest.json``: ``{"version", "base": {...}, "experts": [{file, step, epoch, sha256, dtype, base, metrics}]}``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest_file = directory / "manifest.json"

    @classmethod
    def load(cls, directory: Path) -> "Pool":
        """Raises: ExpertFileError: there is no manifest."""
        pool = cls(directory)
        if not pool.manifest_file.exists():
            raise ExpertFileError(f"no harvested experts in {str(directory)!r}: manifest.json is missing")
        return pool

    def manifest(self) -> dict[str, Any]:
        if not self.manifest_file.exists():
            return {"version": 1, "base": None, "experts": []}
        return read_json(self.manifest_file)

    @property
    def base(self) -> Expert:
        """The model before instruction tuning, where task vectors start."""
        return self._expert(self.manifest()["base"])

    @property
    def experts(self) -> list[Expert]:
        """Harvested experts, by step."""
        return [self._expert(entry) for entry in self.manifest()["experts"]]

    def set_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Store the base; a new base forgets the experts of an older one."""
        entry = self._write("base.safetensors", tensors, {"step": 0, "epoch": 0.0})
        write_json(self.manifest_file, {"version": 1, "base": entry, "experts": []})

    def add(self, tensors: Mapping[str, Tensor], *, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Store the experts of a step; one already there is replaced (a resumed run harvests again)."""
        manifest = self.manifest()
        entry = self._write(f"step_{step:07d}.safetensors", tensors, {"step": step, "epoch": epoch})
        entry |= {"base": manifest["base"]["sha256"], "metrics": dict(metrics)}
        others = [other for other in manifest["experts"] if other["step"] != step]
        manifest["experts"] = sorted([*others, entry], key=lambda other: other["step"])
        write_json(self.manifest_file, manifest)

    def forget_after(self, step: int) -> None:
        """Leave out the experts of later steps: of a future that a resumed run may not have."""
        manifest = self.manifest()
        manifest["experts"] = [entry for entry in manifest["experts"] if entry["step"] <= step]
        write_json(self.manifest_file, manifest)

    def verify(self) -> None:
        """Raises: ExpertFileError: a file is missing, truncated or changed, or its tensors differ from the base's."""
        base = self.base
        base.check()
        shapes = base.shapes
        for expert in self.experts:
            expert.check()
            own = expert.shapes
            for name in sorted(shapes.keys() | own.keys()):
                if shapes.get(name) != own.get(name):
                    raise ExpertFileError(
                        f"{expert.file}: tensor {name!r} has shape {own.get(name)}, the base has {shapes.get(name)}"
                    )

    def _write(self, file: str, tensors: Mapping[str, Tensor], when: dict[str, Any]) -> dict[str, Any]:
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        sha256 = write_expert(self.directory / file, tensors.items(), specs)
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        return {"file": file, **when, "sha256": sha256, "dtype": dtype}

    def _expert(self, entry: Mapping[str, Any]) -> Expert:
        return Expert(
            file=self.directory / entry["file"],
            sha256=entry["sha256"],
            dtype=entry["dtype"],
            step=entry["step"],
            epoch=entry["epoch"],
            metrics=entry.get("metrics", {}),
        )
