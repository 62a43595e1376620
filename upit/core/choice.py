"""What every choice of the method shares: it says what it is in plain types, and which code it runs."""

import inspect
import json
from abc import ABC
from collections.abc import Iterator, Mapping
from typing import Any

from upit import __version__
from upit.core.code_digest import code_of


class Strategy(ABC):  # noqa: B024
    """One choice of the method, picked by ``class_path`` in YAML; its attributes are its constructor's arguments.

    An attribute is of a plain type (number, text, or lists and dicts of them) or another strategy. A class that needs
    something else overrides :meth:`describe`, and returns there in plain types all that its results depend on.
    """

    @property
    def class_path(self) -> str:
        """Module and name of the class, as in YAML."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def describe(self) -> dict[str, Any]:
        """Name and arguments in plain types, for lineages and pages."""
        return {"name": type(self).__name__, **{name: _described(value) for name, value in vars(self).items()}}

    def key(self) -> dict[str, Any]:
        """Arguments and code: what every file made by this choice depends on
        (:func:`upit.core.code_digest.code_of`).
        """
        code = [code_of(type(choice)) for choice in _choices_in(self)]
        return {"choice": self.describe(), "code": code, "upit": __version__}

    def check_description(self, field: str) -> None:
        """Check that the description can be written as JSON, and read the code while it is what was imported.

        Args:
            field: what the choice was set as, such as ``Upcycling.merge``.
        Raises: ValueError: an argument is not of a plain type, or not finite; names the class and the argument.
        """
        for name, value in self.describe().items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{field}={self.class_path}: its {name} can't be written to the lineage ({error}). Keep numbers, "
                    "text, and lists or dicts of them in its attributes, or override describe() to return those"
                ) from None
        self.key()

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


def check_descriptions(owner: object) -> None:
    """:meth:`Strategy.check_description` of all strategies that an object holds.

    Raises: ValueError: see there.
    """
    for name, value in vars(owner).items():
        if isinstance(value, Strategy):
            value.check_description(f"{type(owner).__name__}.{name}")


def _described(value: Any) -> Any:
    """A value with the strategies in it described."""
    if isinstance(value, Strategy):
        return value.describe()
    if isinstance(value, Mapping):
        return {name: _described(inner) for name, inner in value.items()}
    return [_described(inner) for inner in value] if isinstance(value, list | tuple) else value


def _choices_in(value: Any) -> Iterator[Strategy]:
    """A strategy and those in its attributes."""
    if isinstance(value, Strategy):
        yield value
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _choices_in(inner)


def parameters_of(kind: type) -> Iterator[str]:
    """Names of a class's arguments, with those that it hands on to its base."""
    for owner in kind.__mro__:
        if "__init__" in vars(owner):
            _, *given = inspect.signature(vars(owner)["__init__"]).parameters.values()
            own = [parameter.name for parameter in given if parameter.kind is not parameter.VAR_KEYWORD]
            yield from own
            if len(own) == len(given):
                return
