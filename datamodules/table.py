"""Tokenised examples in one Arrow file, written as they come and memory-mapped: no process holds them all."""

from collections.abc import Iterator, Sequence
from operator import eq
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from upit.core.batches import Example

EXAMPLES, INDEX = "examples.arrow", "index.npz"
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "domain": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "prompt_length": pa.int32(),
        "answer": pa.string(),
        "metadata": pa.string(),
        "cut": pa.bool_(),  # longer than max_length
        "merged": pa.bool_(),  # see datamodules.chat.encode_batch
        "conversation": pa.int64(),  # digest of what it was made from: the same in copies
        "further": pa.bool_(),  # of the same conversation as the example before it
    }
)
FIELDS = tuple(Example.__annotations__)


class TableWriter:
    """Writes batches to ``folder``; keeps what the split needs to know of each example, some 20 bytes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = pa.OSFile(str(folder / EXAMPLES), "wb")
        self.writer = pa.ipc.new_file(self.file, SCHEMA)
        self.domain_names: dict[str, int] = {}
        self.columns: dict[str, list[np.ndarray]] = {
            name: [np.empty(0, kind)]
            for name, kind in (
                ("lengths", np.int32), ("domains", np.int32), ("conversations", np.int64), ("cut", bool),
                ("merged", bool), ("further", bool), ("heldout", bool),
            )
        }  # fmt: skip

    def write(self, batch: pa.RecordBatch, *, heldout: bool) -> None:
        if not len(batch):
            return
        self.writer.write_batch(batch)
        for domain in batch["domain"].unique().to_pylist():
            self.domain_names.setdefault(domain, len(self.domain_names))
        found = {
            "lengths": batch["input_ids"].value_lengths().to_numpy(),
            "domains": np.array([self.domain_names[domain] for domain in batch["domain"].to_pylist()], np.int32),
            "conversations": batch["conversation"].to_numpy().copy(),  # a view would keep the whole batch
            **{name: batch[name].to_numpy(zero_copy_only=False) for name in ("cut", "merged", "further")},
            "heldout": np.full(len(batch), heldout),
        }
        for name, values in found.items():
            self.columns[name].append(values)

    def close(self) -> dict[str, np.ndarray]:
        """Returns: the columns that were kept, over all examples."""
        self.writer.close()
        self.file.close()
        return {name: np.concatenate(parts) for name, parts in self.columns.items()}


class Examples(Sequence[Example]):
    """A choice of the examples of a folder, in the form of a list of dicts.

    Args:
        folder: of :class:`TableWriter`.
        chosen: their places in the file.
        lengths, domain_ids: of all examples of the file.
        domain_names: what the domain ids stand for.
    """

    def __init__(
        self, folder: Path, chosen: np.ndarray, *, lengths: np.ndarray, domain_ids: np.ndarray, domain_names: list[str]
    ) -> None:
        self.folder = folder
        self.chosen = chosen
        self.lengths = lengths[chosen]
        self.domain_ids = domain_ids[chosen]
        self.domain_names = domain_names
        self._open()

    def _open(self) -> None:
        self._batches = []
        with pa.memory_map(str(self.folder / EXAMPLES)) as file:
            reader = pa.ipc.open_file(file)
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._tokens = [
            tuple(column.to_numpy() for name in ("input_ids", "labels") for column in _list_parts(batch[name]))
            for batch in self._batches
        ]
        self._starts = np.cumsum([0, *map(len, self._batches)])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def choose(self, places: np.ndarray) -> Self:
        """Some of these examples; the file stays open once."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        for name in ("chosen", "lengths", "domain_ids"):
            setattr(other, name, getattr(self, name)[places])
        return other

    def __len__(self) -> int:
        return len(self.chosen)

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels of an example, int32 views of the file."""
        batch, row = self._place(index)
        id_starts, ids, label_starts, labels = self._tokens[batch]
        return ids[id_starts[row] : id_starts[row + 1]], labels[label_starts[row] : label_starts[row + 1]]

    def _place(self, index: int) -> tuple[int, int]:
        place = self.chosen[index]  # IndexError ends an iteration
        batch = int(np.searchsorted(self._starts, place, side="right")) - 1
        return batch, int(place - self._starts[batch])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, row = self._place(index)
        ids, labels = self.tokens(index)
        example = {
            name: self._batches[batch][name][row].as_py() for name in FIELDS if name not in ("input_ids", "labels")
        }
        return {**example, "input_ids": ids.tolist(), "labels": labels.tolist()}

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Sequence[Example]) -> list[Example]:
        return [*self, *other]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


def _list_parts(column: pa.ListArray) -> tuple[pa.Array, pa.Array]:
    return column.offsets, column.values
