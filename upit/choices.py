"""Errors of the command line in plain words: what is wrong, and what would be right."""

import inspect
import re
from collections.abc import Iterator
from importlib import import_module

_NOISE = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")


def explain(message: str) -> str:
    """The parser's message without what only repeats it, and the valid choices.

    For a class that does not fit, the classes that do; for an argument that a class does not take, those it takes.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    kept = [line for line in lines if not line.startswith(_NOISE)]
    return "\n  ".join([*kept, *_classes(message), *_arguments(message)])


def _classes(message: str) -> Iterator[str]:
    if "has no attribute" in message or "does not correspond to a subclass" in message or "No module" in message:
        for path in re.findall(r"<class '(upit\.[\w.]+)'>", message):
            kind = _find(path)
            names = ", ".join(sorted(_public_name(choice) for choice in _concrete(kind)))
            yield f"valid choices of {kind.__name__}: {names}"


def _arguments(message: str) -> Iterator[str]:
    for path in re.findall(r"class_path '([\w.]+)':\s+Option '[\w.]+' is not accepted", message):
        names = ", ".join(inspect.signature(_find(path)).parameters)
        yield f"{path} takes: {names or 'no arguments'}"


def _find(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _concrete(kind: type) -> Iterator[type]:
    child: type
    for child in kind.__subclasses__():
        if not inspect.isabstract(child) and not child.__name__.startswith("_"):
            yield child
        yield from _concrete(child)


def _public_name(kind: type) -> str:
    """Its import path, by the package that offers it."""
    package = kind.__module__.rpartition(".")[0]
    offered = getattr(import_module(package), kind.__name__, None) is kind
    return f"{package if offered else kind.__module__}.{kind.__name__}"
