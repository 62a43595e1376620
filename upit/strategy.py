"""What every choice of the method shares: it says what it is, in plain types."""

from abc import ABC
from typing import Any


class Strategy(ABC):  # noqa: B024
    """One choice of the method, picked by ``class_path`` in YAML; its attributes are its constructor's arguments."""

    def describe(self) -> dict[str, Any]:
        """Name and arguments, for lineages and for the fingerprints that decide whether a finished file still fits."""
        return {"name": type(self).__name__, **vars(self)}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"
