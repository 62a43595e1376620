"""What every instruction data module shares: tokenising once, the cache, and the loaders."""

import hashlib
import json
import tempfile
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from tqdm.auto import tqdm
from typing_extensions import override

from datamodules.chat import check_messages, check_template, encode
from datamodules.files import read_json_lines
from datamodules.packing import group_by_length, pack
from upit.examples import IGNORE, PADDING, Batch, collate, length_grouped
from upit.files import read_json, write_json
from upit.run_seed import run_seed

PAD_MULTIPLE = 64
CACHE_VERSION = 2  # raised when the same source gives other examples than before
Row = dict[str, Any]  # id, domain, messages, metadata


class ConversationDataModule(L.LightningDataModule):
    """Conversations tokenised by the chat template, the loss on the responses.

    Args:
        max_length: tokens a row; longer examples are cut, and dropped (counted, reported) when no response is left.
        packing: several examples a row, attention kept inside each; else rows of similar length, padded.
        batch_size: rows a step over all devices.
        eval_batch_tokens: tokens of a held-out batch, with padding.
        train_domains: train on these domains only, as a domain's own expert is; the held-out examples stay all. The
            data is prepared as without it, so the tokenizer is the same.
        predict_file: JSONL with ``prompt`` or ``messages``, for ``upit predict``.
        num_workers: processes that build training batches.
        seed: of all that makes the data: questions, split, and what is packed or grouped together.
        order_seed: of the order of the rows, another in each epoch; default the run's ``seed_everything``, so that
            runs of several seeds see the same data in other orders.
        cache_dir: where tokenised data is kept under a fingerprint of all it depends on.
    """

    def __init__(
        self,
        max_length: int = 1024,
        packing: bool = True,
        batch_size: int = 8,
        eval_batch_tokens: int = 8192,
        train_domains: list[str] | None = None,
        predict_file: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        order_seed: int | None = None,
        cache_dir: str = ".cache/upit",
    ) -> None:
        super().__init__()
        check_at_least(1, max_length=max_length, batch_size=batch_size, eval_batch_tokens=eval_batch_tokens)
        check_at_least(0, num_workers=num_workers)
        self.max_length = max_length
        self.packing = packing
        self.batch_size = batch_size
        self.eval_batch_tokens = eval_batch_tokens
        self.train_domains = train_domains
        self.predict_file = predict_file
        self.num_workers = num_workers
        self.seed = seed
        self._order_seed = order_seed
        self.cache_dir = Path(cache_dir)
        self.tokenizer: Any = None

    @property
    def order_seed(self) -> int:
        """Seed of the order of the rows; the run's where none was given."""
        return run_seed() if self._order_seed is None else self._order_seed

    @abstractmethod
    def source_key(self) -> dict[str, Any]:
        """All that the rows and the tokenizer depend on, in plain types."""

    @abstractmethod
    def make_rows(self) -> tuple[list[Row], list[Row]]:
        """Training and held-out rows; runs once, then the cache serves."""

    @abstractmethod
    def make_tokenizer(self, train_rows: list[Row]) -> Any:
        """The tokenizer, which may be trained on the training rows; runs once, then the cache serves."""

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again, in plain types: the data and its order."""
        return {
            "kind": type(self).__name__,
            "content": self.folder.name,
            "max_length": self.max_length,
            "packing": self.packing,
            "batch_size": self.batch_size,
            "train_domains": self.train_domains,
            "seed": self.seed,
            "order_seed": self.order_seed,
        }

    def verify(self, example: Mapping[str, Any], completion: str) -> bool:
        """Whether a completion answers an example: equal up to white space."""
        return completion.split() == example["answer"].split()

    # --- tokenised once ------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        key = json.dumps([CACHE_VERSION, self.source_key(), self.max_length], sort_keys=True)
        return self.cache_dir / hashlib.sha256(key.encode()).hexdigest()[:20]

    @override
    def prepare_data(self) -> None:
        if (self.folder / "stats.json").exists():
            return
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache_dir={str(self.cache_dir)!r} can't be written: {error}") from None
        with tempfile.TemporaryDirectory(prefix="unfinished.", dir=self.cache_dir) as beside:
            self._prepare(Path(beside) / "data")
            try:
                (Path(beside) / "data").rename(self.folder)
            except OSError:  # a fit started together with this one was first: the same data
                if not (self.folder / "stats.json").exists():
                    raise

    def _prepare(self, folder: Path) -> None:
        train, heldout = self.make_rows()
        tokenizer = self.make_tokenizer(train)
        check_template(tokenizer)
        tokenizer.save_pretrained(folder / "tokenizer")
        stats = {
            name: self._tokenise(tokenizer, rows, folder / name)
            for name, rows in (("train", train), ("heldout", heldout))
        }
        write_json(folder / "stats.json", stats)

    def _tokenise(self, tokenizer, rows: list[Row], folder: Path) -> dict[str, int]:
        encoded = [
            encode(tokenizer, row, max_length=self.max_length)
            for row in tqdm(rows, desc=f"Tokenising {folder.name}", leave=False)
        ]
        kept = [example for example in encoded if any(label != IGNORE for label in example["labels"])]
        cut = sum(example.pop("cut") for example in encoded)
        if not kept:
            raise ValueError(
                f"none of the {len(rows)} {folder.name} examples has a response within "
                f"data.max_length={self.max_length} tokens; raise it"
            )
        disable_progress_bars()
        Dataset.from_list(kept).save_to_disk(folder)
        tokens = sum(len(example["input_ids"]) for example in kept)
        return {"examples": len(kept), "tokens": tokens, "cut": cut, "dropped": len(rows) - len(kept)}

    @override
    def setup(self, stage: str) -> None:
        if self.tokenizer is not None:
            return
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer", trust_remote_code=False)
        self.train_set: list = load_from_disk(self.folder / "train").to_list()
        if self.train_domains is not None:
            self.train_set = self._of_domains(self.train_set, self.train_domains)
        self.heldout_set: list = load_from_disk(self.folder / "heldout").to_list()
        self.domains = sorted({row["domain"] for row in self.heldout_set})
        self.stats = read_json(self.folder / "stats.json")
        for name, counts in self.stats.items():
            if counts["cut"] or counts["dropped"]:
                warnings.warn(
                    f"{name}: {counts['cut']} of {counts['examples'] + counts['dropped']} examples are longer than "
                    f"max_length={self.max_length}: cut; {counts['dropped']} have no response (left): dropped",
                    stacklevel=2,
                )
        self.longest_example = max(len(row["input_ids"]) for row in self.train_set)  # one for all batches
        self.rows = self._training_rows()

    def _of_domains(self, rows: list, domains: list[str]) -> list:
        known = sorted({row["domain"] for row in rows})
        if not domains or not set(domains) <= set(known):
            raise ValueError(f"data.train_domains={domains} must name some of the data's domains, {known}")
        return [row for row in rows if row["domain"] in domains]

    def _training_rows(self) -> list:
        """Packed rows, or whole batches when grouped by length: what the sampler draws."""
        lengths = [len(row["input_ids"]) for row in self.train_set]
        if self.packing:
            return pack(lengths, capacity=self.max_length, seed=self.seed)
        return group_by_length(lengths, batch_size=self.batch_size, seed=self.seed)

    # --- loaders -------------------------------------------------------------------------------------

    @property
    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _sampler(self, rows: list, *, shuffle: bool) -> StatefulDistributedSampler:
        world, rank = self._world
        return StatefulDistributedSampler(
            rows, num_replicas=world, rank=rank, shuffle=shuffle, seed=self.order_seed, drop_last=shuffle
        )

    @override
    def train_dataloader(self) -> StatefulDataLoader:
        world, _ = self._world
        if self.batch_size % world:
            raise ValueError(f"data.batch_size={self.batch_size} must be divisible by the {world} processes")
        if len(self.rows) < (self.batch_size if self.packing else 1):
            raise ValueError(
                f"data.batch_size={self.batch_size} but the training data fills only {len(self.rows)} rows of "
                f"data.max_length={self.max_length} tokens; lower one of them or add data"
            )
        if self.packing:
            return StatefulDataLoader(
                self.rows,
                batch_size=self.batch_size // world,
                sampler=self._sampler(self.rows, shuffle=True),
                collate_fn=self._collate_packed,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
                drop_last=True,
            )
        return StatefulDataLoader(
            self.rows,
            batch_size=None,
            sampler=StatefulDistributedSampler(self.rows, num_replicas=1, rank=0, shuffle=True, seed=self.order_seed),
            collate_fn=self._collate_grouped,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _collate_packed(self, rows: list[list[int]]) -> Batch:
        pad_id = self.tokenizer.pad_token_id
        return collate(rows, self.train_set, pad_id=pad_id, length=self.max_length, longest=self.longest_example)

    def _collate_grouped(self, batch: list[int]) -> Batch:
        world, rank = self._world
        longest = max(len(self.train_set[i]["input_ids"]) for i in batch)
        width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(longest, self.max_length))
        rows = [[i] for i in batch[rank::world]]
        return collate(rows, self.train_set, pad_id=self.tokenizer.pad_token_id, length=width)

    @override
    def val_dataloader(self) -> DataLoader:
        world, _ = self._world
        lengths = [len(row["input_ids"]) for row in self.heldout_set]
        groups = length_grouped(range(len(lengths)), lengths, max_tokens=self.eval_batch_tokens)
        # every rank takes the same number of batches; the ones added for that count for nothing
        batches = [(group, True) for group in groups]
        batches += [(groups[-1], False)] * (-len(groups) % world)
        return DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._sampler(batches, shuffle=False),
            collate_fn=self._collate_heldout,  # type: ignore[arg-type]
        )

    def _collate_heldout(self, group: tuple[list[int], bool]) -> Batch:
        indices, counts = group
        batch = collate([[i] for i in indices], self.heldout_set, pad_id=self.tokenizer.pad_token_id)
        if not counts:
            batch["labels"].fill_(IGNORE)
            batch["example_ids"].fill_(PADDING)
        return batch

    @override
    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()

    @override
    def predict_dataloader(self) -> DataLoader:
        if self.predict_file is None:
            raise ValueError("data.predict_file is not set: name a JSONL file with `prompt` or `messages`")
        self.predict_set = read_json_lines(Path(self.predict_file), field="data.predict_file")
        for number, row in enumerate(self.predict_set, 1):
            check_messages(prompt_of(row), f"{self.predict_file}: prompt {number}")
        return DataLoader(
            list(enumerate(self.predict_set)),  # type: ignore[arg-type]
            batch_size=16,
            collate_fn=self._collate_prompts,
            sampler=StatefulDistributedSampler(
                self.predict_set, num_replicas=self._world[0], rank=self._world[1], shuffle=False
            ),
        )

    def conversation(self, row: Row) -> list[dict[str, Any]]:
        """The messages to answer, of a row of ``predict_file``."""
        return prompt_of(row)

    def _collate_prompts(self, rows: list[tuple[int, Row]]) -> dict[str, torch.Tensor]:
        prompts = []
        for _, row in rows:
            encoded = self.tokenizer.apply_chat_template(
                self.conversation(row), add_generation_prompt=True, return_dict=True
            )
            prompts.append(encoded["input_ids"])
        width = max(map(len, prompts))
        return {
            "input_ids": torch.tensor([[self.tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            "index": torch.tensor([index for index, _ in rows]),
        }


def check_at_least(least: int, **fields: int) -> None:
    """Raises: ValueError: one of the data module's fields is below; names it."""
    for field, value in fields.items():
        if value < least:
            raise ValueError(f"data.{field}={value} must be at least {least}")


def prompt_of(row: Row) -> list[dict[str, Any]]:
    """The conversation that a row of prompts gives."""
    return row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
