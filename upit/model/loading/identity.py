"""Read training checkpoints without unpickling code: what model they hold, and its weights.

A checkpoint is one file, or the folder that ``ModelParallelStrategy`` writes (a shard a rank).
"""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers import AutoConfig, PretrainedConfig

from upit.core.files import CHECKPOINT_VERSION, Fields, FileError, check_fields, check_version
from upit.model.generation import generation_settings

IDENTITY = "upit"
IDENTITY_FIELDS: Fields = {
    "phase": str,
    "num_experts": (int, type(None)),
    "swap_step": (int, type(None)),
    "config": dict,
}
METADATA_GLOBALS = {  # what torch pickles into a sharded checkpoint's .metadata, beside dtypes
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}  # fmt: skip


def identity_of(model, *, phase: str, swap_step: int | None) -> dict[str, Any]:
    """What a checkpoint says about its model, in plain types."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    return {
        "version": CHECKPOINT_VERSION,
        "phase": phase,
        "num_experts": getattr(model.config, "num_experts", None),
        "top_k": config.get("num_experts_per_tok"),
        "swap_step": swap_step,
        "config": config,
        "generation": generation_settings(model.generation_config),  # of the model that training started from
    }


def read_identity(path: str | Path) -> dict[str, Any]:
    """The identity a checkpoint was saved with.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileError: it is damaged, can't be read without running code, or was not written by one of upit's modules.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"ckpt_path={str(path)!r} does not exist")
    file = path / "meta.pt" if path.is_dir() else path
    content = _load(file, mmap=file == path)
    if path.is_dir():
        _read_metadata(path)
    identity = identity_in(content, path)
    return {**identity, "global_step": content.get("global_step"), "epoch": content.get("epoch")}


def identity_in(checkpoint: Any, path: str | Path) -> dict[str, Any]:
    """The identity in a checkpoint's content.

    Args:
        path: the checkpoint's, for errors.
    Raises: FileError: there is none, it is of another format version, or damaged.
    """
    if not isinstance(checkpoint, dict) or IDENTITY not in checkpoint:
        raise FileError(f"{str(path)!r} does not say which model it holds: no checkpoint of a upit module")
    identity = checkpoint[IDENTITY]
    check_version(
        identity, CHECKPOINT_VERSION, path, "train again with this version, or use the version that wrote it"
    )
    check_fields(identity, IDENTITY_FIELDS, path, IDENTITY)
    check_fields(identity["config"], {"model_type": str}, path, f"{IDENTITY}.config")
    return identity


def resumable_in(directory: str | Path) -> dict[Path, dict[str, Any]]:
    """The complete checkpoints in a directory that a fit can resume, and what each says about its model."""
    found: dict[Path, dict[str, Any]] = {}
    for path in sorted(Path(directory).rglob("*.ckpt")):
        try:
            identity = read_identity(path)
            content = _load(path / "meta.pt" if path.is_dir() else path, mmap=path.is_file())
        except (FileNotFoundError, FileError):
            continue  # being written, being removed, or not one of ours
        if "callbacks" in content:  # not of the weights alone
            found[path] = identity
    return found


def _load(file: Path, *, mmap: bool) -> Any:
    """``torch.load`` without running code.

    Raises: FileError: the file is damaged, or needs code to be loaded; torch promises no type of error for either.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise _unreadable(file, error) from None


def _unreadable(path: Path, error: Exception) -> FileError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return FileError(f"{str(path)!r} is damaged, or not a checkpoint that loads without running code: {reason}")


def config_of(identity: dict[str, Any]) -> PretrainedConfig:
    fields = dict(identity["config"])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The causal LM's state dict, its names as in transformers.

    Raises: FileError: the checkpoint is damaged, or holds no model.
    """
    path = Path(path)
    if path.is_dir():
        state = _read_shards(path)
    else:
        content = _load(path, mmap=True)
        check_fields(content, {"state_dict": dict}, path, "the checkpoint")
        state = content["state_dict"]
    for prefix in ("dense.model.", "moe.model.", "model."):
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if own:
            return own
    raise FileError(f"{str(path)!r} holds no model weights")


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what torch writes, and names nothing else: torch itself reads ``.metadata`` with a plain unpickler."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}")


def _read_metadata(path: Path) -> Metadata:
    """Raises: FileError: it is damaged, or names what does not belong into a sharded checkpoint's metadata."""
    try:
        with (path / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # a pickle that is damaged raises errors of any type
        raise _unreadable(path / ".metadata", error) from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise FileError(f"{str(path / '.metadata')!r} is not the metadata of a sharded checkpoint")
    return metadata


def _read_shards(path: Path) -> dict[str, Tensor]:
    """The tensors of a sharded checkpoint's state dict, and nothing of its optimizer."""
    prefix = "state_dict."
    entries = {
        name: entry
        for name, entry in _read_metadata(path).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    needed = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries.values())
    present = sum(file.stat().st_size for file in path.glob("*.distcp"))
    if needed > present:
        raise FileError(f"{str(path)!r}: its weights need {needed} bytes, its shards hold {present}: it is truncated")
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()
    }
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that this is a single process
            dcp.load(state, checkpoint_id=path, no_dist=True)
    except Exception as error:
        raise _unreadable(path, error) from None
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def last_checkpoint(trainer: Any) -> Path | None:
    """The checkpoint that a trainer's fit wrote last, or else the one it was resumed from."""
    paths: list[Any] = []
    for callback in trainer.checkpoint_callbacks:
        paths += [getattr(callback, name, None) for name in ("best_model_path", "last_model_path")]
        paths += getattr(callback, "best_k_models", {})
    found = [Path(path) for path in paths if path and Path(path).exists()]
    if not found and trainer.ckpt_path:
        return Path(trainer.ckpt_path)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
