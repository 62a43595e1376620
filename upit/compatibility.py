"""Whether experts from elsewhere fit the dense model: their shapes, architecture and vocabulary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upit.families import is_expert
from upit.pool import Expert
from upit.tensor_files import TensorFileError, TensorFiles


def check_shapes(expert: Expert, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what an expert came with, the other parameters of its checkpoint too, to the dense model.

    Args:
        shapes: of the dense model's parameters, or of its experts' alone.
    Raises: TensorFileError: a tensor is missing or has another shape.
    """
    own = expert.shapes
    others = {name: entry.shape for name, entry in TensorFiles(expert.rest).items()} if expert.rest else {}
    for name in sorted(own.keys() | {name for name in shapes if expert.rest or is_expert(name)}):
        found = own.get(name, others.get(name))
        if found != shapes.get(name):
            raise TensorFileError(
                f"{expert.file}: tensor {name!r} has shape {found}, the dense model's has {shapes.get(name)}; "
                "experts must share its architecture"
            )


def check_config(path: Path, own: Any, dense: Any) -> None:
    """Compare the config of a checkpoint directory to the dense model's.

    Raises: ValueError: another architecture or vocabulary.
    """
    for field in ("model_type", "vocab_size", "hidden_act"):
        theirs, ours = getattr(own, field, None), getattr(dense, field)
        if theirs != ours:
            raise ValueError(f"{path / 'config.json'}: {field}={theirs!r}, the dense model has {ours!r}")


def check_vocabulary(path: Path, tokenizer) -> None:
    """Raises: ValueError: a checkpoint directory has a tokenizer, and it gives tokens other ids than the run's."""
    from transformers import AutoTokenizer

    file = path / "tokenizer.json"
    if not file.exists():
        return
    if AutoTokenizer.from_pretrained(path, trust_remote_code=False).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{file}: its vocabulary is not that of the run's tokenizer")
