"""Digests of code: whether a class still does what it did when a file was made with it."""

import ast
import hashlib
import json
import sys
import types
import uuid
import warnings
from abc import ABC
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = sys.stdlib_module_names | {"torch"}
GIVEN = {*vars(ABC), *vars(type("", (), {})), "__firstlineno__", "__static_attributes__"}  # of every class
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class NoSourceError(Exception):
    """The code of a class can't be read, or does not say all that the class depends on."""


def code_of(kind: type) -> list[list[str]]:
    """Module, qualified name and a digest of the code of a class and of each of its bases.

    The digest is of the syntax tree of the module that defines the class: comments, docstrings and layout do not
    count, every helper in that module does. Bases from the standard library and from torch are left out.
    A class without a file, as in a notebook, is known by the code of its methods and of what they call in its module.

    Limit: a function that the class imports from another module of the user's is not followed.

    If the code can't be read, the digest is a random one, so that nothing is reused, and a warning says so.
    """
    own = [base for base in kind.__mro__ if not _is_of_library(base)]
    return [[base.__module__, base.__qualname__, _digest_of(base)] for base in own]


def _is_of_library(kind: type) -> bool:
    """Whether a class belongs to the standard library or torch; one made by ``type()`` only says so."""
    if kind.__module__.partition(".")[0] not in LIBRARIES:
        return False
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


@cache
def _digest_of(kind: type) -> str:
    try:
        _refuse_closures(kind)
        content = _module_tree(kind) or _own_code(kind)
    except NoSourceError as error:
        warnings.warn(
            f"{kind.__module__}.{kind.__qualname__}: {error}. Files that it makes are never reused; to reuse them "
            "after an interruption, define the class at the top level of a Python file",
            stacklevel=2,
        )
        content = uuid.uuid4().hex
    return hashlib.sha256(content.encode()).hexdigest()


def _module_tree(kind: type) -> str | None:
    """Syntax tree of the module that defines a class, without docstrings; None where there is no source file."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None or not file.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    if not _defines(tree, Path(file).name, kind):
        return None
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def _defines(tree: ast.Module, file_name: str, kind: type) -> bool:
    """Whether a class comes from a file: a notebook's module is ``__main__``, which may have a file of its own."""
    files = {Path(function.__code__.co_filename).name for function in _functions_in(kind)}
    named = any(isinstance(node, ast.ClassDef) and node.name == kind.__name__ for node in ast.walk(tree))
    return named and (not files or file_name in files)


def _refuse_closures(kind: type) -> None:
    """Raises: NoSourceError: a method reads variables of a function that the class is defined in."""
    for function in _functions_in(kind):
        names = sorted(set(function.__code__.co_freevars) - {"__class__"})
        if names:
            raise NoSourceError(f"its code depends on {names} of the function that defines it")


def _functions_in(kind: type, *names: str) -> Iterator[types.FunctionType]:
    """The functions that a class defines, those of properties and the like too; only the named ones, if any are."""
    for value in map(vars(kind).get, names or vars(kind)):
        inner = (value, *(getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel", "func")))
        yield from (found for found in inner if isinstance(found, types.FunctionType))


def _own_code(kind: type) -> str:
    """Code of a class without a file, and of the functions and plain values of its module that the code names."""
    content: dict[str, Any] = {}
    for name in vars(kind).keys() - GIVEN:
        functions, plain = list(_functions_in(kind, name)), _plain(vars(kind)[name])
        if not functions and plain is None:
            raise NoSourceError(f"the code of its {name} is not available")
        for function in functions:
            _add_code(function, content)
        if plain is not None:
            content[f"{kind.__qualname__}.{name} ="] = plain
    return json.dumps(content, sort_keys=True)


def _add_code(function: types.FunctionType, content: dict[str, Any]) -> None:
    """Add a function's code, and what it names in its own module."""
    if function.__qualname__ in content:
        return
    code = _without_docstring(function)
    content[function.__qualname__] = [
        *map(_in_words, code),
        repr(function.__defaults__),
        repr(function.__kwdefaults__),
    ]
    for name in (name for part in code if isinstance(part, types.CodeType) for name in _names(part)):
        value = function.__globals__.get(name)
        if isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
            _add_code(value, content)
        elif isinstance(value, type) and value.__module__ == function.__module__:
            for method in _functions_in(value):
                _add_code(method, content)
        elif (plain := _plain(value)) is not None:
            content[name] = plain


def _without_docstring(function: types.FunctionType) -> list[Any]:
    code = function.__code__
    consts = tuple(const for i, const in enumerate(code.co_consts) if i or const != function.__doc__)
    return [code.replace(co_consts=()), *consts]


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _in_words(part: Any) -> Any:
    """A part of a function's code in plain types."""
    if isinstance(part, types.CodeType):
        return [part.co_code.hex(), part.co_names, part.co_varnames, [_in_words(const) for const in part.co_consts]]
    return sorted(map(repr, part)) if isinstance(part, frozenset) else repr(part)


def _plain(value: Any) -> str | None:
    """A value as JSON; None where it is none, or not in plain types."""
    try:
        return None if value is None else json.dumps(value)
    except (TypeError, ValueError):
        return None
