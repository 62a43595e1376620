"""Export the model of a training checkpoint."""

from pathlib import Path

from transformers import AutoTokenizer

from upit.core.files import FileError, check_output
from upit.core.finite import NotFiniteError
from upit.model.loading.identity import config_of, read_identity, read_weights
from upit.report.model_card import model_card
from upit.upcycling.export import export_model


def export_checkpoint(
    ckpt_path: str | Path, output: str | Path, *, tokenizer: str | None = None, untie: bool = False
) -> Path:
    """Export the dense or the MoE model of a training checkpoint.

    Args:
        untie: see :func:`export_model`.
        tokenizer: its directory; default ``tokenizer/`` of the run that the checkpoint lies in.
    Raises: FileNotFoundError: no such checkpoint or tokenizer; see also :func:`export_model`.
    """
    ckpt_path, output = Path(ckpt_path), Path(output)
    check_output(output)
    identity = read_identity(ckpt_path)
    run = ckpt_path.resolve().parent.parent
    folder = Path(tokenizer) if tokenizer else run / "tokenizer"
    if not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer at {str(folder)!r}; name its directory with --tokenizer")
    config, weights = config_of(identity), read_weights(ckpt_path)
    own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    card, generation = model_card(identity, run, name=output.name), identity.get("generation")
    try:
        return export_model(config, weights, own, output, card=card, generation=generation, untie=untie)
    except ValueError as error:
        kind = NotFiniteError if isinstance(error, NotFiniteError) else FileError
        raise kind(f"{str(ckpt_path)!r}: {error}") from None
