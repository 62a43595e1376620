"""Instruction data from files or from a dataset's name."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from datasets import load_dataset
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from datamodules.base import ConversationDataModule, Row
from datamodules.files import DataFile, count_records, data_files, file_digest, read_records
from datamodules.forms import FORMS, ConversationError, Dropped, FormName, Forms
from upit.model.loading.sources import content_key, load_tokenizer, loading, template_text


class InstructionDataModule(ConversationDataModule):
    """Conversations from files, or from a dataset of the hub.

    Four forms are recognised by their columns, and named in the log: OpenAI's ``messages``, ShareGPT's
    ``conversations``, Alpaca's ``instruction``, ``input`` and ``output`` (joined by an empty line, ours), and a prompt
    with its completion or response.

    Args:
        tokenizer: directory, hub id, ``.gguf`` file or ``package://NAME/FILE.gguf``.
        train_files: files (JSON lines, JSON or parquet, also .gz or .zst), folders of them, globs, or folders that
            ``datasets`` saved to disk; one domain a file (its stem) unless ``domain_column`` is set.
        dataset: name for ``datasets.load_dataset``, instead of files.
        configuration, revision, split: of ``dataset``.
        heldout_files: held-out data; default ``heldout_fraction`` of the training data.
        heldout_fraction: part held out, drawn with ``seed``; at least one example a domain.
        format: the form of all records; default recognised in each file.
        messages_column: list of messages, where its column is neither ``messages`` nor ``conversations``.
        prompt_column, response_column: one turn each, text or messages.
        roles: the data's role names to ours, e.g. ``{bot: assistant}``.
        message_keys: a message's keys, e.g. ``{role: speaker, content: text}``.
        domain_column: names each row's domain.
        metadata_column: what a domain's verifier needs besides the answer, e.g. the tests of a program.
        invalid: ``refuse`` stops at a conversation that can't be trained on, and names file and row; ``drop`` leaves
            such conversations out, and counts them by reason.
        chat_template: Jinja text, a file, or a name, see :func:`upit.model.loading.sources.set_chat_template`; default
            the tokenizer's own.
        trust_remote_code: allow tokenizer code that comes with the files.
    Raises: ValueError, FileNotFoundError: what is wrong with the data: file, line, column, remedy.
    """

    def __init__(
        self,
        tokenizer: str,
        train_files: list[str] | None = None,
        dataset: str | None = None,
        configuration: str | None = None,
        revision: str | None = None,
        split: str = "train",
        heldout_files: list[str] | None = None,
        heldout_fraction: float = 0.05,
        format: FormName | None = None,
        messages_column: str | None = None,
        prompt_column: str | None = None,
        response_column: str | None = None,
        roles: dict[str, str] | None = None,
        message_keys: dict[str, str] | None = None,
        domain_column: str | None = None,
        metadata_column: str | None = None,
        invalid: Literal["refuse", "drop"] = "refuse",
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
        for name, value, known in (("format", format, (None, *FORMS)), ("invalid", invalid, ("refuse", "drop"))):
            if value not in known:
                raise ValueError(f"data.{name}={value!r} must be one of {[choice for choice in known if choice]}")
        if wrong := sorted((message_keys or {}).keys() - {"role", "content"}):
            raise ValueError(f"data.message_keys names {wrong}; it takes role and content")
        self.tokenizer_source = tokenizer
        self.train_files = train_files
        self.dataset = dataset
        self.configuration = configuration
        self.revision = revision
        self.split = split
        self.heldout_files = heldout_files
        self.heldout_fraction = heldout_fraction
        self.forms = Forms(format, messages_column, prompt_column, response_column, roles or {}, message_keys or {})
        self.domain_column = domain_column
        self.metadata_column = metadata_column
        self.invalid = invalid
        self.template_source = chat_template
        self.chat_template = chat_template and template_text(chat_template)
        self.trust_remote_code = trust_remote_code

    @override
    def source_key(self) -> dict[str, Any]:
        return {
            "train_files": self._digests(self.train_files, "data.train_files"),
            "heldout_files": self._digests(self.heldout_files, "data.heldout_files"),
            "dataset": [content_key(self.dataset), self.configuration, self.revision, self.split],
            "heldout": [self.heldout_files, self.heldout_fraction, self.seed],
            "forms": [vars(self.forms), self.domain_column, self.metadata_column, self.invalid],
            "tokenizer": [content_key(self.tokenizer_source), self.chat_template],
        }

    def _digests(self, names: list[str] | None, field: str) -> list[Any]:
        return [
            [str(file), source.domain, file_digest(file, field)]
            for source in data_files(names or [], field=field)
            for file in source.files
        ]

    @override
    def prompt_tokenizer(self) -> Any:
        return self.make_tokenizer([])

    @override
    def make_tokenizer(self, train_rows: Iterable[Row]):
        return load_tokenizer(
            self.tokenizer_source, chat_template=self.chat_template, trust_remote_code=self.trust_remote_code
        )

    @override
    def make_rows(self) -> tuple[Iterator[Row], Iterator[Row] | None]:
        return self.train_rows(), None if self.heldout_files is None else self.heldout_rows()

    @override
    def count_rows(self, part: str) -> int | None:
        names = self.train_files if part == "train" else self.heldout_files
        if names is None:
            return None
        paths = {source.path for source in data_files(names, field=f"data.{part}_files")}
        with suppress(OSError, ValueError):  # what is wrong with a file is told when it is read
            counts = [count_records(path) for path in paths]
            return None if None in counts else sum(count or 0 for count in counts)
        return None

    def train_rows(self) -> Iterator[Row]:
        """Stream the training conversations; what is left out is counted in ``dropped``."""
        self.dropped["train"] = Dropped()
        if self.dataset is None:
            yield from self._file_rows(self.train_files or [], "train")
        else:
            with loading("data.dataset", self.dataset):
                records = load_dataset(self.dataset, self.configuration, split=self.split, revision=self.revision)
            domain = self.dataset.split("/")[-1]
            yield from self._rows(enumerate(records, 1), self.dataset, domain, self.dropped["train"])

    def heldout_rows(self) -> Iterator[Row]:
        """Stream the held-out conversations of ``heldout_files``."""
        self.dropped["heldout"] = Dropped()
        yield from self._file_rows(self.heldout_files or [], "heldout")

    def _file_rows(self, names: list[str], part: str) -> Iterator[Row]:
        field = f"data.{part}_files"
        sources: dict[Path, DataFile] = {source.path: source for source in data_files(names, field=field)}
        for path, source in sources.items():
            yield from self._rows(read_records(path, field=field), str(path), source.domain, self.dropped[part])

    def _rows(self, records: Iterable[tuple[int, Any]], source: str, domain: str, dropped: Dropped) -> Iterator[Row]:
        form, count, kept = None, 0, 0
        for number, record in records:
            count += 1
            where = f"{source}: example {number}"
            try:
                if not isinstance(record, Mapping):
                    raise ConversationError(f"not an object of columns; got {record!r:.200}")
                if form is None:
                    form = self.forms.recognise(record, source)
                    rank_zero_info(f"{source}: read as {form}")
                conversation = form.conversation(record)
            except ConversationError as error:
                if self.invalid == "refuse":
                    raise ValueError(f"{where}: {error}. data.invalid=drop leaves such conversations out") from None
                dropped.add(str(error).partition("; got ")[0], where)
                continue
            kept += 1
            named = str(self._column(record, "domain_column", source)) if self.domain_column else domain
            metadata = self._column(record, "metadata_column", source) if self.metadata_column else ""
            if not isinstance(metadata, str):
                metadata = json.dumps(metadata)
            yield {"id": f"{source}:{number}", "domain": named, "metadata": metadata, **conversation}
        if not count:
            raise ValueError(f"{source} holds no examples")
        if not kept:
            raise ValueError(f"all {count} examples of {source} are dropped: {dropped}")

    def _column(self, record: Mapping[str, Any], field: str, source: str) -> Any:
        column = getattr(self, field)
        if column not in record:
            raise ValueError(f"{source} has no column {column!r}, only {sorted(record)}; set data.{field}")
        return record[column]
