"""The pool of harvested experts on disk: safetensors files and a manifest, each written beside and renamed."""

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from upit.core.files import (
    MAKE_AGAIN,
    MANIFEST_VERSION,
    RECORD_VERSION,
    FileError,
    check_fields,
    check_version,
    plain_name,
    read_json,
    write_json,
)
from upit.core.prefetch import ahead
from upit.core.tensor_files import Specs, TensorFileError, write_tensors
from upit.preparation.expert import READERS, Expert, file_sha256


def write_expert(path: Path, tensors: Iterable[tuple[str, Tensor]], specs: Specs) -> str:
    """Stream tensors into a safetensors file, one in memory at a time.

    Args:
        path: appears only when complete.
        tensors: (name, tensor) in the order of ``specs``.
        specs: dtype and shape of every tensor.
    Returns: the file's sha256.
    Raises: TensorFileError: a tensor differs from its spec, or holds NaN or infinity.
    """
    digest = hashlib.sha256()
    write_tensors(path, tensors, specs, watch=digest.update)
    return digest.hexdigest()


def _specs(tensors: Mapping[str, Tensor]) -> Specs:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_once(path: Path, tensors: Iterable[tuple[str, Tensor]], specs: Specs, fingerprint: str) -> str:
    """Like :func:`write_expert`, but an undamaged file that was made under this fingerprint is taken as it is.

    A record beside the file keeps the fingerprint and the file's sha256: ``merged_00.json`` of
    ``merged_00.safetensors``.

    Args:
        tensors: not touched when the file is there, so give a generator.
        fingerprint: of all that the tensors depend on, see :func:`upit.core.files.digest`.
    Returns: the file's sha256.
    """
    return finished(path, fingerprint) or record(path, fingerprint, write_expert(path, tensors, specs))


def record(path: Path, fingerprint: str, sha256: str) -> str:
    """Note beside a finished file what it was made from; returns its sha256."""
    write_json(path.with_suffix(".json"), {"version": RECORD_VERSION, "fingerprint": fingerprint, "sha256": sha256})
    return sha256


def recorded(path: Path, fingerprint: str) -> str | None:
    """The sha256 that a file made under this fingerprint was written with; None where there is no such file."""
    try:
        content = read_json(path.with_suffix(".json"), dict)
        check_version(content, RECORD_VERSION, path, "it is made again")
    except FileError:  # not finished, damaged, or of an older format
        return None
    return content.get("sha256") if content.get("fingerprint") == fingerprint and path.exists() else None


def finished(path: Path, fingerprint: str) -> str | None:
    """sha256 of an undamaged file made under this fingerprint, or None; warns of a damaged one."""
    sha256 = recorded(path, fingerprint)
    if sha256 is None or file_sha256(path) == sha256:
        return sha256
    warnings.warn(f"{str(path)!r} is damaged: its sha256 is not {sha256}. It is made again", stacklevel=2)
    return None


ENTRY = {"file": str, "sha256": str, "dtype": str, "step": int, "epoch": float}  # what a manifest says of an expert


def _check_entry(entry: Any, manifest: Path, where: str) -> None:
    """Raises: FileError: a part of the manifest does not describe an expert of its folder."""
    check_fields(entry, ENTRY, manifest, where)
    for name in ("file", "rest"):
        if name in entry:
            plain_name(entry[name], manifest, f"{where}.{name}")
    for name in ("metrics", "origin"):
        if not isinstance(entry.get(name) or {}, dict):
            raise FileError(f"{str(manifest)!r}: {where}.{name} is {entry[name]!r:.80}, expected an object")
    metrics = entry.get("metrics") or {}
    check_fields(metrics, dict.fromkeys(metrics, float), manifest, f"{where}.metrics")
    if "rest" in entry:
        check_fields(entry, {"rest_sha256": str}, manifest, where)


def _name(step: int) -> str:
    """How the files of a step's expert begin."""
    return f"step_{step:07d}"


class Pool:
    """A directory of harvested experts and the base they started from.

    ``manifest.json``: ``{"version", "base": {...}, "experts": [{file, step, epoch, sha256, dtype, base, metrics}]}``;
    experts that were not harvested here also have an ``origin``. Where experts were pruned, ``pruned`` lists their
    steps.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest_file = directory / "manifest.json"

    @classmethod
    def load(cls, directory: Path) -> "Pool":
        """Raises: TensorFileError: there is no manifest."""
        pool = cls(directory)
        if not pool.manifest_file.exists():
            raise TensorFileError(f"no harvested experts in {str(directory)!r}: manifest.json is missing")
        return pool

    def manifest(self) -> dict[str, Any]:
        """What the pool holds.

        Raises: FileError: manifest.json is damaged, of another version, or names a file outside of the pool.
        """
        if not self.manifest_file.exists():
            return {"version": MANIFEST_VERSION, "base": None, "experts": []}
        manifest = read_json(self.manifest_file, dict)
        check_version(manifest, MANIFEST_VERSION, self.manifest_file, MAKE_AGAIN)
        check_fields(manifest, {"base": dict, "experts": list}, self.manifest_file, "the manifest")
        _check_entry(manifest["base"], self.manifest_file, "base")
        for i, entry in enumerate(manifest["experts"]):
            _check_entry(entry, self.manifest_file, f"experts[{i}]")
        files = [entry["file"] for entry in manifest["experts"]]
        if len(set(files)) < len(files):
            raise FileError(f"{str(self.manifest_file)!r}: experts names a file twice: {files}")
        pruned = manifest.get("pruned", [])
        if not isinstance(pruned, list) or not all(isinstance(step, int) for step in pruned):
            raise FileError(f"{str(self.manifest_file)!r}: pruned is {pruned!r:.80}, expected a list of steps")
        return manifest

    @property
    def base(self) -> Expert:
        """The model before instruction tuning, where task vectors start."""
        return self._expert(self.manifest()["base"], "base")

    @property
    def experts(self) -> list[Expert]:
        """Harvested experts, by step."""
        return [self._expert(entry) for entry in self.manifest()["experts"]]

    def at_step(self, step: int) -> Expert:
        """The expert of an optimizer step; of step 0, the base."""
        return next(expert for expert in (self.base, *self.experts) if expert.step == step)

    def set_base(self, tensors: Mapping[str, Tensor], *, rest: Mapping[str, Tensor] | None = None) -> None:
        """Store the base; a new base forgets the experts of an older one."""
        entry = self._write("base", tensors, rest, {"step": 0, "epoch": 0.0})
        write_json(self.manifest_file, {"version": MANIFEST_VERSION, "base": entry, "experts": []})

    def add(
        self,
        tensors: Mapping[str, Tensor],
        *,
        step: int,
        epoch: float,
        metrics: Mapping[str, float],
        rest: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Store the experts of a step; one already there is replaced (a resumed run harvests again).

        Args:
            rest: the model's other parameters, where they are wanted too.
        """
        manifest = self.manifest()
        entry = self._write(_name(step), tensors, rest, {"step": step, "epoch": epoch})
        entry |= {"base": manifest["base"]["sha256"], "metrics": dict(metrics)}
        others = [other for other in manifest["experts"] if other["step"] != step]
        manifest["experts"] = sorted([*others, entry], key=lambda other: other["step"])
        manifest["pruned"] = [other for other in manifest.get("pruned", []) if other != step]
        write_json(self.manifest_file, {key: value for key, value in manifest.items() if key != "pruned" or value})

    @property
    def pruned(self) -> list[int]:
        """Steps of the experts that were harvested and then removed."""
        return self.manifest().get("pruned", [])

    def prune(self, steps: Collection[int]) -> int:
        """Remove the harvested experts of some steps; the base stays.

        The manifest changes first: interrupted, the next call removes the files that are left.

        Returns: bytes freed.
        """
        manifest = self.manifest()
        manifest["pruned"] = sorted({*manifest.get("pruned", []), *steps})
        manifest["experts"] = [entry for entry in manifest["experts"] if entry["step"] not in manifest["pruned"]]
        write_json(self.manifest_file, manifest)
        freed = 0
        for step in manifest["pruned"]:
            for file in self.directory.glob(f"{_name(step)}.*"):
                freed += file.stat().st_size
                file.unlink()
        return freed

    def check_steps(self, steps: Iterable[int]) -> None:
        """Raises: TensorFileError: the pool has no experts of some of these steps."""
        missing = sorted(set(steps) - {expert.step for expert in self.experts})
        if missing:
            why = "were pruned" if set(missing) <= set(self.pruned) else "are not in its manifest.json"
            raise TensorFileError(
                f"{str(self.directory)!r}: the experts harvested at steps {missing} {why}, and the swap needs them: "
                "resume a checkpoint from after the swap, or start a new run"
            )

    def forget_after(self, step: int) -> None:
        """Leave out the experts of later steps: of a future that a resumed run may not have."""
        manifest = self.manifest()
        manifest["experts"] = [entry for entry in manifest["experts"] if entry["step"] <= step]
        write_json(self.manifest_file, manifest)

    def gather(
        self,
        base: Expert,
        experts: Sequence[Expert],
        *,
        track: Callable[[Iterable[int]], Iterable[int]] = lambda numbers: numbers,
    ) -> list[Expert]:
        """Make a pool of a base and experts from elsewhere: copy what is not in the directory, then list it all.

        Args:
            track: wraps the experts' numbers, for a progress bar.
        Returns: the experts, where they now are.
        """
        base = self._copy(base, "base")
        own = list(ahead(lambda i: self._copy(experts[i], f"expert_{i:02d}"), track(range(len(experts)))))
        entries = [
            {"file": expert.file.name}
            | {key: getattr(expert, key) for key in ("step", "epoch", "sha256", "dtype", "metrics", "origin")}
            for expert in [base, *own]
        ]
        entries = [entry | {"base": base.sha256} for entry in entries]
        write_json(self.manifest_file, {"version": MANIFEST_VERSION, "base": entries[0], "experts": entries[1:]})
        return own

    def _copy(self, expert: Expert, name: str) -> Expert:
        path = self.directory / f"{name}.safetensors"
        if expert.file.parent == self.directory:
            return expert
        tensors = ahead(lambda name: (name, expert.read(name)), expert.shapes)
        return replace(
            expert,
            file=path,
            sha256=write_once(path, tensors, expert.specs, expert.sha256),
            rest=None,
            rest_sha256=None,
        )

    def verify(self) -> None:
        """Raises: TensorFileError: a file is missing, truncated or changed, or its tensors differ from the base's."""
        base, experts = self.base, self.experts
        for _ in ahead(Expert.check, [base, *experts], workers=READERS):
            pass
        shapes = base.shapes
        for expert in experts:
            own = expert.shapes
            for name in sorted(shapes.keys() | own.keys()):
                if shapes.get(name) != own.get(name):
                    raise TensorFileError(
                        f"{expert.file}: tensor {name!r} has shape {own.get(name)}, the base has {shapes.get(name)}"
                    )

    def _write(
        self, name: str, tensors: Mapping[str, Tensor], rest: Mapping[str, Tensor] | None, when: dict[str, Any]
    ) -> dict[str, Any]:
        file = f"{name}.safetensors"
        sha256 = write_expert(self.directory / file, tensors.items(), _specs(tensors))
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        entry = {"file": file, **when, "sha256": sha256, "dtype": dtype}
        if rest:
            entry["rest"] = f"{name}.rest.safetensors"
            entry["rest_sha256"] = write_expert(self.directory / entry["rest"], rest.items(), _specs(rest))
        return entry

    def _expert(self, entry: Mapping[str, Any], kind: str = "harvested") -> Expert:
        return Expert(
            file=self.directory / entry["file"],
            sha256=entry["sha256"],
            dtype=entry["dtype"],
            step=entry["step"],
            epoch=entry["epoch"],
            metrics=entry.get("metrics", {}),
            rest=self.directory / entry["rest"] if "rest" in entry else None,
            rest_sha256=entry.get("rest_sha256"),
            origin=entry.get("origin") or {"kind": kind, "step": entry["step"], "epoch": entry["epoch"]},
        )
