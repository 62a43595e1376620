"""Instruction data from files or from a dataset's name."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import load_dataset
from typing_extensions import override

from datamodules.base import ConversationDataModule, Row
from datamodules.chat import check_messages
from datamodules.files import file_digest, read_rows
from upit.sources import content_key, load_tokenizer, template_text


class InstructionDataModule(ConversationDataModule):
    """JSONL, JSON or parquet files, or a dataset of the hub: ``messages``, or prompt and response columns.

    Args:
        tokenizer: directory, hub id, ``.gguf`` file or ``package://NAME/FILE.gguf``.
        train_files: files; one domain a file (its stem) unless ``domain_column`` is set.
        dataset: name for ``datasets.load_dataset``, instead of files.
        split: of ``dataset``.
        heldout_files: held-out data; default ``heldout_fraction`` of the training data.
        heldout_fraction: part held out, drawn with ``seed``; at least one example a domain.
        messages_column: list of {role, content}; used where there are no prompt and response columns.
        prompt_column, response_column: one turn each.
        domain_column: names each row's domain.
        chat_template: Jinja text or a file; default the tokenizer's own.
        trust_remote_code: allow tokenizer code that comes with the files.
    Raises: ValueError, FileNotFoundError: what is wrong with the data: file, line, column, remedy.
    """

    def __init__(
        self,
        tokenizer: str,
        train_files: list[str] | None = None,
        dataset: str | None = None,
        split: str = "train",
        heldout_files: list[str] | None = None,
        heldout_fraction: float = 0.05,
        messages_column: str = "messages",
        prompt_column: str | None = None,
        response_column: str | None = None,
        domain_column: str | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if (train_files is None) == (dataset is None):
            raise ValueError(f"give one of data.train_files and data.dataset: got {train_files!r} and {dataset!r}")
        for field, files in (("train_files", train_files), ("heldout_files", heldout_files)):
            if files == []:
                raise ValueError(f"data.{field}=[] names no file")
        if (prompt_column is None) != (response_column is None):
            raise ValueError("data.prompt_column and data.response_column go together")
        if not 0.0 < heldout_fraction < 1.0:
            raise ValueError(f"data.heldout_fraction={heldout_fraction} must lie in (0, 1)")
        self.tokenizer_source = tokenizer
        self.train_files = train_files
        self.dataset = dataset
        self.split = split
        self.heldout_files = heldout_files
        self.heldout_fraction = heldout_fraction
        self.messages_column = messages_column
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.domain_column = domain_column
        self.template_source = chat_template
        self.chat_template = chat_template and template_text(chat_template)
        self.trust_remote_code = trust_remote_code

    @override
    def source_key(self) -> dict[str, Any]:
        return {
            "train_files": {name: file_digest(Path(name), "data.train_files") for name in self.train_files or []},
            "heldout_files": {
                name: file_digest(Path(name), "data.heldout_files") for name in self.heldout_files or []
            },
            "dataset": [content_key(self.dataset), self.split],
            "heldout": [self.heldout_files, self.heldout_fraction, self.seed],
            "columns": [self.messages_column, self.prompt_column, self.response_column, self.domain_column],
            "tokenizer": [content_key(self.tokenizer_source), self.chat_template],
        }

    @override
    def prompt_tokenizer(self) -> Any:
        return self.make_tokenizer([])

    @override
    def make_tokenizer(self, train_rows: list[Row]):
        return load_tokenizer(
            self.tokenizer_source, chat_template=self.chat_template, trust_remote_code=self.trust_remote_code
        )

    @override
    def make_rows(self) -> tuple[list[Row], list[Row]]:
        if self.dataset is not None:
            train = self._rows(load_dataset(self.dataset, split=self.split), self.dataset, self.dataset.split("/")[-1])
        else:
            train = self._file_rows(self.train_files or [], "data.train_files")
        if self.heldout_files is not None:
            return train, self._file_rows(self.heldout_files, "data.heldout_files")
        return self._split(train)

    def _split(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        heldout: set[int] = set()
        for domain in sorted({row["domain"] for row in rows}):
            own = [i for i, row in enumerate(rows) if row["domain"] == domain]
            heldout |= set(random.Random(self.seed).sample(own, max(1, round(self.heldout_fraction * len(own)))))
        if len(heldout) == len(rows):
            raise ValueError(f"all {len(rows)} examples would be held out; add data or give data.heldout_files")
        train = [row for i, row in enumerate(rows) if i not in heldout]
        return train, [rows[i] for i in sorted(heldout)]

    def _file_rows(self, files: list[str], field: str) -> list[Row]:
        rows: list[Row] = []
        for name in files:
            rows += self._rows(read_rows(Path(name), field=field), name, Path(name).stem)
        return rows

    def _rows(self, records: Iterable[dict[str, Any]], source: str, domain: str) -> list[Row]:
        rows = []
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict):
                raise ValueError(f"{source}: example {number} is no object of columns: {record!r:.200}")
            messages = self._messages(record, source)
            check_messages(messages, f"{source}: example {number}")
            rows.append(
                {
                    "id": f"{source}:{number}",
                    "domain": str(self._column(record, self.domain_column, source)) if self.domain_column else domain,
                    "messages": messages,
                    "metadata": "",
                }
            )
        if not rows:
            raise ValueError(f"{source} holds no examples")
        return rows

    def _messages(self, record: dict[str, Any], source: str) -> list[dict[str, str]]:
        if self.prompt_column is None or self.response_column is None:
            return self._column(record, self.messages_column, source)
        return [
            {"role": "user", "content": self._column(record, self.prompt_column, source)},
            {"role": "assistant", "content": self._column(record, self.response_column, source)},
        ]

    @staticmethod
    def _column(record: dict[str, Any], column: str, source: str) -> Any:
        if column not in record:
            raise ValueError(
                f"{source} has no column {column!r}, only {sorted(record)}; "
                "set data.messages_column, data.domain_column, or data.prompt_column and data.response_column"
            )
        return record[column]
