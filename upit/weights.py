"""Named tensors of one or several safetensors files, each read from disk when it is asked for."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from upit.files import digest


class Weights:
    """The tensors of safetensors files as one mapping.

    Raises: ValueError: a file can't be read, or holds a name that another has.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._file_of: dict[str, Path] = {}
        for path in self.files:
            try:
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{str(path)!r} can't be read (truncated?): {error}") from error
            for name in names:
                if name in self._file_of:
                    raise ValueError(f"tensor {name!r} is in {str(self._file_of[name])!r} and in {str(path)!r}")
                self._file_of[name] = path

    @classmethod
    def open(cls, directory: Path) -> "Weights":
        """The weights of a transformers directory, sharded or not."""
        return cls(sorted(directory.glob("*.safetensors")))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        found: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            with safe_open(path, "pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return found

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.get_slice(name)[:]

    def get_slice(self, name: str):
        """One tensor, of which only the part that is indexed is read.

        Raises: ValueError: there is none of this name.
        """
        if name not in self._file_of:
            raise ValueError(f"{[str(path) for path in self.files]} hold no tensor {name!r}")
        with safe_open(self._file_of[name], "pt") as file:
            return file.get_slice(name)

    def fingerprint(self) -> str:
        """Changes when a file does: of names, sizes and times."""
        stats = [(str(path), path.stat()) for path in self.files]
        return digest([[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats])
