"""Whether checkpoints from elsewhere are complete and fit the dense model: tensors, architecture and vocabulary."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upit.core.tensor_files import TensorFileError, TensorFiles
from upit.model.families import family_of, ffn_size, head_dim, is_expert
from upit.preparation.expert import Expert

Shapes = Mapping[str, tuple[int, ...]]

SAME = (  # fields of config.json that change what a model computes; others, such as use_cache, may differ
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
)
BY_CONTEXT = ("dynamic", "longrope")  # kinds of rope that depend on max_position_embeddings
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_shapes(expert: Expert, shapes: Shapes) -> None:
    """Compare what an expert came with, the other parameters of its checkpoint too, to the dense model.

    Args:
        shapes: of the dense model's parameters, or of its experts' alone.
    Raises: TensorFileError: a tensor is missing or has another shape.
    """
    own = expert.shapes
    others = {name: entry.shape for name, entry in TensorFiles(expert.rest).items()} if expert.rest else {}
    expected = {name: shape for name, shape in shapes.items() if expert.rest or is_expert(name)}
    check_tensors(expert.file, {**others, **own}, {**dict.fromkeys(own), **expected})


def check_tensors(
    place: Path, found: Shapes, expected: Mapping[str, tuple[int, ...] | None], *, whose: str = "the dense model's"
) -> None:
    """Compare the tensors at a place to those that should be there; more of them may be.

    Args:
        expected: None for a tensor that should not be there.
        whose: what the expected shapes are of, for the message.
    Raises: TensorFileError: a tensor is missing or has another shape.
    """
    for name, shape in sorted(expected.items()):
        if name not in found:
            raise TensorFileError(
                f"{place}: tensor {name!r} is missing, {whose} has {shape}; the checkpoint must be complete"
            )
        if found[name] != shape:
            raise TensorFileError(
                f"{place}: tensor {name!r} has shape {found[name]}, {whose} has {shape}; "
                "experts must share its architecture"
            )


def check_complete(directory: Path, files: TensorFiles, expected: Shapes) -> None:
    """Raises: TensorFileError: a model directory lacks a tensor, or its shape is not what config.json says."""
    found = {name: entry.shape for name, entry in files.items()}
    check_tensors(directory, found, expected, whose="a model of its config.json")


def dense_shapes(config: Any) -> Shapes:
    """Shape of every tensor of a complete dense checkpoint; see :meth:`upit.model.families.Family.dense_shapes`."""
    return family_of(config).dense_shapes(config)


def check_config(path: Path, own: Any, dense: Any, *, moe: bool = False) -> None:
    """Compare the config of a checkpoint directory to the dense model's.

    Args:
        moe: whether it may also be a MoE that such a dense model upcycles to.
    Raises: ValueError: another architecture or vocabulary; names the file, the field and both values.
    """
    file = path / "config.json"
    kinds = [dense.model_type, *([family_of(dense).moe_type] if moe else [])]
    if own.model_type not in kinds:
        raise ValueError(f"{file}: model_type={own.model_type!r}, the dense model has {dense.model_type!r}")
    check_architecture(file, architecture(own), dense)


def check_architecture(file: Path, theirs: Mapping[str, Any], dense: Any) -> None:
    """Compare what :func:`architecture` says of another model to the dense one.

    Raises: ValueError: they differ; names the file, the field and both values.
    """
    ours = architecture(dense)
    for field in {**ours, **theirs}:
        if (theirs.get(field) or None) != (ours.get(field) or None):  # one that is off may also be left out
            raise ValueError(f"{file}: {field}={theirs.get(field)!r}, the dense model has {ours.get(field)!r}")


def architecture(config: Any) -> dict[str, Any]:
    """What a config says about the computation, by field, in plain types."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") in BY_CONTEXT:
        rope["max_position_embeddings"] = config.max_position_embeddings
    return {
        **{field: getattr(config, field, None) for field in SAME},
        "intermediate_size": ffn_size(config),
        "head_dim": head_dim(config),
        **{f"rope_parameters.{key}": value for key, value in rope.items()},
    }


def check_same_vocabulary(ours: Path, theirs: Path) -> None:
    """Compare the tokenizer files of two checkpoint directories; one that only one of them has is left out.

    Raises: ValueError: they give a token other ids.
    """
    for name in VOCABULARIES:
        files = ours / name, theirs / name
        if all(file.exists() for file in files):
            contents = [file.read_bytes() for file in files]
            if contents[0] != contents[1] and _vocabulary(name, contents[0]) != _vocabulary(name, contents[1]):
                raise ValueError(f"{files[1]}: its vocabulary is not that of the base {str(ours)!r}")


def _vocabulary(name: str, content: bytes) -> Any:
    """What of a tokenizer file says which id a token has."""
    if not name.endswith(".json"):
        return content
    fields = json.loads(content)
    if name == "vocab.json":
        return fields
    return [fields["model"].get("vocab"), [(token["content"], token["id"]) for token in fields["added_tokens"]]]


def check_vocabulary(path: Path, tokenizer) -> None:
    """Raises: ValueError: a checkpoint directory has a tokenizer, and it gives tokens other ids than the run's."""
    from transformers import AutoTokenizer

    file = path / "tokenizer.json"
    if not file.exists():
        return
    if AutoTokenizer.from_pretrained(path, trust_remote_code=False).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{file}: its vocabulary is not that of the run's tokenizer")
