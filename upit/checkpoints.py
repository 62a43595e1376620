"""Read training checkpoints without unpickling code: what model they hold, and its weights.

A checkpoint is one file, or the folder that ``ModelParallelStrategy`` writes (a shard a rank).
"""

import json
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

IDENTITY = "upit"


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
    except (RuntimeError, UnpicklingError, OSError) as error:
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
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "whole.pt"
            dcp_to_torch_save(path, file)
            state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    else:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    for prefix in ("dense.model.", "moe.model.", "model."):
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if own:
            return own
    raise ValueError(f"{str(path)!r} holds no model weights")
