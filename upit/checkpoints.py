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

from upit.generation import generation_settings

IDENTITY = "upit"
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
        ValueError: it can't be read without running code, or was not written by one of upit's modules.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"ckpt_path={str(path)!r} does not exist")
    file = path / "meta.pt" if path.is_dir() else path
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=file == path)
        if path.is_dir():
            _read_metadata(path)
    except (RuntimeError, pickle.UnpicklingError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{str(path)!r} is no checkpoint that loads without running code: {reason}") from None
    if IDENTITY not in content:
        raise ValueError(f"{str(path)!r} does not say which model it holds: no checkpoint of a upit module")
    return {**content[IDENTITY], "global_step": content.get("global_step"), "epoch": content.get("epoch")}


def config_of(identity: dict[str, Any]) -> PretrainedConfig:
    fields = dict(identity["config"])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The causal LM's state dict, its names as in transformers."""
    path = Path(path)
    if path.is_dir():
        state = _read_shards(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    for prefix in ("dense.model.", "moe.model.", "model."):
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if own:
            return own
    raise ValueError(f"{str(path)!r} holds no model weights")


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what torch writes, and names nothing else: torch itself reads ``.metadata`` with a plain unpickler."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in METADATA_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}")


def _read_metadata(path: Path) -> Metadata:
    """Raises: UnpicklingError: it names what is no part of a sharded checkpoint's metadata."""
    with (path / ".metadata").open("rb") as file:
        return _MetadataUnpickler(file).load()


def _read_shards(path: Path) -> dict[str, Tensor]:
    """The tensors of a sharded checkpoint's state dict, and nothing of its optimizer."""
    prefix = "state_dict."
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _read_metadata(path).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that this is a single process
        dcp.load(state, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
