"""Build dense and MoE models: from pretrained weights, or from a config."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from upit.model import attention
from upit.model.experts import dispatch as experts
from upit.model.families import MOE_TYPES, family_of
from upit.model.generation import stop_ids
from upit.model.loading.identity import config_of
from upit.model.loading.sources import loading, resolve
from upit.model.rotary import keep_frequencies
from upit.model.routers import prepare_routers

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def scratch_config(fields: dict[str, Any], tokenizer) -> LlamaConfig:
    """Config of a Llama to train from scratch, its vocabulary and special tokens the tokenizer's.

    Raises: ValueError: a field is unknown, the tokenizer's, or does not go with the others.
    """
    own = {"vocab_size": len(tokenizer)}
    own |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    known = {field.name for field in dataclasses.fields(LlamaConfig)} - own.keys()
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"DenseModule.config has no field {unknown}; LlamaConfig takes {sorted(known)}")
    if fields.get("hidden_act", "silu") not in ACT2FN:
        raise ValueError(f"DenseModule.config.hidden_act={fields['hidden_act']!r} must be one of {sorted(ACT2FN)}")
    try:
        return LlamaConfig(**{"tie_word_embeddings": True, **fields}, **own)
    except StrictDataclassError as error:
        raise ValueError(f"DenseModule.config: {error}") from None


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config with freshly initialised weights, in torch's default dtype."""
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.NAME, dtype=torch.get_default_dtype()
    )
    return _prepare(model)


def from_scratch(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """A model to train from random weights: the same ones on every device, in any number of processes.

    They are drawn on the CPU in float32 and then take torch's default device and dtype.

    Args:
        seed: of the weights; torch's own generator is left as it was.
    """
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            model = build(config)
    finally:
        torch.set_default_dtype(dtype)
    return model.to(device=device, dtype=dtype)


def rebuild(identity: dict[str, Any]) -> PreTrainedModel:
    """The model that a checkpoint's identity describes, with fresh weights and its source's generation settings."""
    model = build(config_of(identity))
    model.generation_config = GenerationConfig(**identity.get("generation", {}))
    return model


def outline(config: PretrainedConfig) -> PreTrainedModel:
    """A model of this config without weights, on the meta device: names and shapes, for checks before a run."""
    with torch.device("meta"):
        return build(config)


def read_config(source: str, *, moe: bool = False, trust_remote_code: bool = False) -> PretrainedConfig:
    """Config of a pretrained causal LM; arguments and errors as for :func:`load_pretrained`."""
    with loading("model", source):
        name, kwargs = resolve(source)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    if moe and config.model_type not in MOE_TYPES:
        raise ValueError(f"{source!r} is a {config.model_type!r}, no MoE; supported: {sorted(MOE_TYPES)}")
    if not moe:
        family_of(config)
    return config


def load_pretrained(source: str, *, moe: bool = False, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal LM in torch's default dtype.

    Args:
        source: see :func:`upit.model.loading.sources.resolve`.
        moe: expect an exported MoE, not a dense model.
    Raises:
        ValueError: the architecture is unsupported, or a weight is missing.
        FileNotFoundError: no such source.
    """
    read_config(source, moe=moe, trust_remote_code=trust_remote_code)
    name, kwargs = resolve(source)
    model, info = AutoModelForCausalLM.from_pretrained(
        name,
        attn_implementation=attention.NAME,
        dtype=torch.get_default_dtype(),
        trust_remote_code=trust_remote_code,
        use_safetensors=None if kwargs else True,
        output_loading_info=True,
        **kwargs,
    )
    if info["missing_keys"]:  # transformers would train on with random ones
        raise ValueError(f"{source!r} is not complete: tensors {sorted(info['missing_keys'])} are missing")
    if kwargs:  # a GGUF's config carries a quantisation that save_pretrained refuses: start from a clean one
        model = _dequantised(model)
    return _prepare(model)


def _dequantised(model: PreTrainedModel) -> PreTrainedModel:
    fields = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype"):
        fields.pop(key, None)
    clean = build(type(model.config)(**fields))
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    return clean


def _prepare(model: PreTrainedModel) -> PreTrainedModel:
    keep_frequencies(model)
    if model.config.model_type in MOE_TYPES:
        experts.use(model)
        prepare_routers(model)
    return model


def check_tokenizer(config: PretrainedConfig, tokenizer, *, source: str) -> None:
    """Check that a tokenizer is the model's: its size, its end of turn, and its vocabulary where the model has one.

    Tokens that were added to a vocabulary are not compared, they may be renamed. Vocabularies in GGUF
    files are not compared.

    Raises: ValueError: the model's embedding lacks some of the tokenizer's ids, or means other tokens by them.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens but {source!r} embeds {config.vocab_size}: "
            "set data.tokenizer to the model's own"
        )
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.eos_token_id is not None and not {tokenizer.eos_token_id, *stop_ids(tokenizer)} & set(ends):
        raise ValueError(
            f"the tokenizer ends a turn with id {tokenizer.eos_token_id} but {source!r} with {ends}: "
            "set data.tokenizer to the model's own"
        )
    own = _own_tokenizer(config)
    if own is not None and (found := _first_difference(tokenizer, own)):
        index, theirs, ours = found
        raise ValueError(
            f"the tokenizer's id {index} is {ours!r} but that of {source!r} is {theirs!r}: it belongs to another "
            "model; set data.tokenizer to the model's own"
        )


def _own_tokenizer(config: PretrainedConfig):
    """The tokenizer that lies beside a model's weights, or None."""
    place = config._name_or_path
    if not place or (Path(place).is_dir() and not any((Path(place) / name).exists() for name in TOKENIZER_FILES)):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, ImportError):  # the hub's repository has none, or one that needs code of its own
        return None


def _first_difference(tokenizer, own) -> tuple[int, str, str] | None:
    """The first id that stands for one token in the model's own vocabulary and for another in the tokenizer's."""
    added = own.added_tokens_decoder.keys() | tokenizer.added_tokens_decoder.keys()
    ours = {index: token for token, index in tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in own.get_vocab().items()}
    different = [index for index in ours.keys() & theirs.keys() - added if ours[index] != theirs[index]]
    return (first := min(different), theirs[first], ours[first]) if different else None
