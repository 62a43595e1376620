"""Errors of the command line in plain words: what is wrong, and what would be right."""

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module

from upit.cli.moved import MOVED
from upit.core.choice import parameters_of

_NOISE = (
    "Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value",
    "Not a valid subclass", "Subclass types expect", "a class path (str)", "a dict with",
)  # fmt: skip
_NO_SUCH_CLASS = (
    "has no attribute", "does not correspond to a subclass", "No module", "dot import path string", "is abstract",
)  # fmt: skip
PACKAGES = ("upit", "callbacks", "datamodules", "lightning_modules")
_KIND = re.compile(r"<class '((?:upit|lightning|lightning_modules)\.[\w.]+)'>")


def explain(message: str) -> str:
    """The parser's message without what only repeats it, and the valid choices.

    For a class path of an earlier version, the new one alone. For a class that does not fit, the classes
    that do; for an argument that a class does not take, those it takes.
    """
    if moved := _moved(message):
        return moved
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    return "\n  ".join([*kept, *_classes(message), *_arguments(message)])


def _moved(message: str) -> str:
    """New names of the old class paths that a message names, in one line."""
    found = dict.fromkeys(re.findall(r"\bupit(?:\.\w+)+", message))
    return "; ".join(f"{old} is now {MOVED[old]}" for old in found if old in MOVED)


def _classes(message: str) -> Iterator[str]:
    kinds = _KIND.findall(message)
    if kinds and any(sign in message for sign in _NO_SUCH_CLASS):
        kind = _find(kinds[-1])  # the innermost
        found = {_public_name(choice) for choice in _concrete(kind)}
        names = sorted(found, key=lambda name: (name.partition(".")[0] not in PACKAGES, name))  # the user's last
        yield f"valid choices of {kind.__name__}: {', '.join(names)}"


def _arguments(message: str) -> Iterator[str]:
    for path in re.findall(r"class_path '([\w.]+)':\s+Option '[\w.]+' is not accepted", message):
        yield f"{path} takes: {', '.join(parameters_of(_find(path))) or 'no arguments'}"


def _find(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _concrete(kind: type) -> Iterator[type]:
    """Classes of a kind that can be named and made, lightning's own left out."""
    abstract = any(getattr(member, "__isabstractmethod__", False) for _, member in inspect.getmembers_static(kind))
    named = getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
    if named and not abstract and not kind.__name__.startswith("_") and not kind.__module__.startswith("lightning."):
        yield kind
    child: type
    for child in kind.__subclasses__():
        yield from _concrete(child)


def _public_name(kind: type) -> str:
    """Its import path, by the package that offers it."""
    package = kind.__module__.rpartition(".")[0]
    offered = package and getattr(import_module(package), kind.__name__, None) is kind
    return f"{package if offered else kind.__module__}.{kind.__name__}"
