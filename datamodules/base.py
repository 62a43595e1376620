"""What every instruction data module shares: tokenising once, the cache, and the loaders."""

import math
import os
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from tqdm.auto import tqdm
from typing_extensions import override

from datamodules.cache import is_whole, make_entry
from datamodules.chat import check_template, warn_without_end
from datamodules.files import read_records
from datamodules.forms import ConversationError, Dropped, check_text, prompt_messages
from datamodules.loader import ResumableLoader, ResumableSampler
from datamodules.order import DomainBlocks, Drifting, Order, Shuffled
from datamodules.packing import Rows, group_by_length, pack
from datamodules.split import Split, chosen_examples, domain_name, split_by_content, split_given
from datamodules.table import INDEX, Examples, TableWriter
from datamodules.tokenising import tokenised
from upit.core.batches import IGNORE, PADDING, Batch, collate, length_grouped
from upit.core.files import digest, read_json, write_json
from upit.core.run_seed import run_seed
from upit.evaluation.verifiers import Exact, Verifier
from upit.model.loading.identity import read_identity

PAD_MULTIPLE = 64
CACHE_VERSION = 4  # raised when the same source gives other examples than before
ORDERS = ("shuffled", "domain_blocks", "drifting")
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
        verifiers: judges a domain's answers, by the domain's name, or ``default``; null turns scoring off for a domain
            of free text. Default: equal up to white space.
        score_examples: held-out examples of a domain whose answers are generated and verified; default all, 0 none.
            The loss is always over all.
        cache_dir: where tokenised data is kept under a fingerprint of all it depends on.
        order: ``shuffled``; ``domain_blocks``: one domain after the other, each once an epoch; or ``drifting``: the
            domains' shares of the mixture rise and fall linearly, one peak after the other. See
            :mod:`datamodules.order`. Not the paper's.
        drift_floor: part of each domain that ``drifting`` spreads over the whole epoch, so that no domain is ever
            absent; ours.
        domain_weights: how often a domain's examples are trained on in an epoch, default 1; 0.5 takes a random half.
        domain_caps: most examples of a domain in an epoch.
        num_processes: processes that tokenise; default one a core. The result does not depend on it.
    """

    heldout_fraction = 0.05  # of each domain, where make_rows gives no held-out rows

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
        verifiers: dict[str, Verifier | None] | None = None,
        score_examples: int | None = None,
        cache_dir: str = ".cache/upit",
        order: Literal["shuffled", "domain_blocks", "drifting"] = "shuffled",
        drift_floor: float = 0.2,
        domain_weights: dict[str, float] | None = None,
        domain_caps: dict[str, int] | None = None,
        num_processes: int | None = None,
    ) -> None:
        super().__init__()
        if score_examples is not None:
            check_at_least(0, score_examples=score_examples)
        check_at_least(1, max_length=max_length, batch_size=batch_size, eval_batch_tokens=eval_batch_tokens)
        check_at_least(1, num_processes=1 if num_processes is None else num_processes)
        if order not in ORDERS:
            raise ValueError(f"data.order={order!r} must be one of {ORDERS}")
        if not 0.0 <= drift_floor <= 1.0:
            raise ValueError(f"data.drift_floor={drift_floor} must lie in [0, 1]")
        for name, weight in (domain_weights or {}).items():
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"data.domain_weights: {name}: {weight} must be 0 or more")
        check_at_least(0, **{f"domain_caps.{name}": cap for name, cap in (domain_caps or {}).items()})
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
        self.order = order
        self.drift_floor = drift_floor
        self.domain_weights = domain_weights or {}
        self.domain_caps = domain_caps or {}
        self.num_processes = num_processes
        self.verifiers: dict[str, Verifier | None] = {"default": Exact()}
        self.verifiers |= {domain_name(name): own for name, own in (verifiers or {}).items()}
        self.score_examples = score_examples
        self.tokenizer: Any = None
        self.invalid = "refuse"  # what is done about conversations that the template refuses
        self.dropped = {"train": Dropped(), "heldout": Dropped()}  # conversations left out before tokenising
        self._folder: Path | None = None
        self._domain_names: dict[str, str] = {}  # as in tags: as in the data
        self._made_rows: tuple[int, Rows] | None = None

    @property
    def order_seed(self) -> int:
        """Seed of the order of the rows; the run's where none was given."""
        return run_seed() if self._order_seed is None else self._order_seed

    @abstractmethod
    def source_key(self) -> dict[str, Any]:
        """All that the rows and the tokenizer depend on, in plain types."""

    @abstractmethod
    def make_rows(self) -> tuple[Iterable[Row], Iterable[Row] | None]:
        """Training and held-out rows, or None to hold out ``heldout_fraction`` of each domain.

        Runs once, then the cache serves. Rows may be a stream, which is read once.
        """

    @abstractmethod
    def make_tokenizer(self, train_rows: Iterable[Row]) -> Any:
        """The tokenizer, which may be trained on the training rows if they are a list; runs once, as above."""

    def count_rows(self, part: str) -> int | None:
        """About how many rows a stream will give, for the progress bar; None where it is not known."""
        return None

    def prompt_tokenizer(self) -> Any:
        """The tokenizer for prompts alone, made without the data; None where it is trained on the data."""
        return None

    @property
    def _predicts(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == "predict"

    @property
    def template_name(self) -> str:
        """The chat template in words, for messages."""
        given: str | None = getattr(self, "template_source", None)
        if given is None:
            return "the tokenizer's own chat template"
        return f"the chat template {given!r}" if "{" not in given else "the chat template in data.chat_template"

    def verify(self, example: Mapping[str, Any], completion: str) -> bool:
        """Whether a completion answers an example, by its domain's verifier."""
        verifier = self.verifiers.get(example.get("domain", "default"), self.verifiers["default"])
        return verifier is not None and verifier(example, completion)

    def scored_examples(self) -> list[int]:
        """Held-out examples whose answers are generated and verified."""
        chosen, taken = [], Counter[str]()
        for i, number in enumerate(self.heldout_set.domain_ids.tolist()):
            domain = self.heldout_set.domain_names[number]
            scored = self.verifiers.get(domain, self.verifiers["default"]) is not None
            if scored and (self.score_examples is None or taken[domain] < self.score_examples):
                chosen.append(i)
                taken[domain] += 1
        return chosen

    def identity(self) -> dict[str, Any]:
        """All that a resumed run must find again, in plain types; complete once the data is set up."""
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "content": self.folder.name,  # source, tokenizer, template, seed and max_length
            "max_length": self.max_length,
            "packing": self.packing,
            "batch_size": self.batch_size,
            "train_domains": self.train_domains,
            "domain_weights": self.domain_weights,
            "domain_caps": self.domain_caps,
            "order": self.order,
            "drift_floor": self.drift_floor if self.order == "drifting" else None,
            "seed": self.seed,
            "order_seed": self.order_seed,
            "eval_batch_tokens": self.eval_batch_tokens,
        }

    # --- tokenised once ------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The cache's entry: named by all that it depends on."""
        return self._folder or self._entry()

    def _entry(self) -> Path:
        try:
            return self.cache_dir / self._key()
        except FileNotFoundError as error:
            entry = self._trained_on()
            if entry is None or not is_whole(entry):
                raise
            warnings.warn(
                f"{error}; the scores are of the data that the checkpoint's run prepared, {entry}", stacklevel=2
            )
            return entry

    def _trained_on(self) -> Path | None:
        """The cache's entry that the checkpoint was trained on, in a test or a validation of one."""
        if self.trainer is None or self.trainer.state.fn not in ("test", "validate") or not self.trainer.ckpt_path:
            return None
        content = (read_identity(self.trainer.ckpt_path).get("settings") or {}).get("data.content")
        return self.cache_dir / content if content else None

    def _key(self) -> str:
        return digest([CACHE_VERSION, self.source_key(), self.max_length])[:20]

    @override
    def prepare_data(self) -> None:
        if self._predicts and self.prompt_tokenizer() is not None:
            return
        self._folder = self._entry()
        if is_whole(self._folder, digests=True):
            return
        waiting = f"{self._folder}: another process is preparing this data; waiting for it"
        make_entry(self._folder, self._prepare, wait_notice=waiting)

    def _prepare(self, folder: Path) -> None:
        train, heldout = self.make_rows()
        tokenizer = self.make_tokenizer(train)
        check_template(tokenizer)
        tokenizer.save_pretrained(folder / "tokenizer")
        writer = TableWriter(folder)
        self._tokenise(tokenizer, train, writer, "train")
        if heldout is not None:
            self._tokenise(tokenizer, heldout, writer, "heldout")
        kept, names = writer.close(), list(writer.domain_names)
        split = self._split(kept, names, given=heldout is not None)
        if self.folder.name != self._key():
            raise ValueError("a file of the data was written to while it was read; start again when it is complete")
        np.savez(
            folder / INDEX, lengths=kept["lengths"], domains=kept["domains"], train=split.train, heldout=split.heldout
        )
        stats = {
            name: _counts(kept, places, self.dropped[name])
            for name, places in (("train", split.train), ("heldout", split.heldout))
        }
        stats["train"]["copies"], stats["heldout"]["cut"] = split.copies, split.cut
        stats["heldout"]["given"] = heldout is not None
        write_json(folder / "stats.json", {**stats, "domains": names})

    def _tokenise(self, tokenizer, rows: Iterable[Row], writer: TableWriter, part: str) -> None:
        """Write the examples of some rows; those without tokens are counted in ``dropped``."""
        settings: dict[str, Any] = {
            "max_length": self.max_length,
            "invalid": self.invalid,
            "processes": self.num_processes,
        }
        total = self.count_rows(part) if not isinstance(rows, Sized) else len(rows)
        escaped = self._escaped(rows)
        with tqdm(total=total, desc=f"Tokenising {part}", unit=" rows", leave=False) as bar:
            for chunk in tokenised(tokenizer, escaped, **settings):
                writer.write(chunk.batch, heldout=part == "heldout")
                for reason, where in chunk.dropped:
                    self.dropped[part].add(reason, where)
                bar.update(chunk.rows)

    def _escaped(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, their domains named as in tags. Raises: ValueError: two domains would have one name."""
        for row in rows:
            name = domain_name(row["domain"])
            if (other := self._domain_names.setdefault(name, row["domain"])) != row["domain"]:
                raise ValueError(
                    f"the domains {other!r} and {row['domain']!r} both become {name!r}; rename one of them"
                )
            yield {**row, "domain": name}

    def _split(self, kept: dict[str, Any], names: list[str], *, given: bool) -> Split:
        columns = {name: kept[name] for name in ("conversations", "cut")}
        if given:
            split = split_given(heldout=kept["heldout"], **columns)
        else:
            split = split_by_content(
                domains=kept["domains"], domain_names=names, further=kept["further"],
                fraction=self.heldout_fraction, seed=self.seed, **columns,
            )  # fmt: skip
        for part, places in (("train", split.train), ("heldout", split.heldout)):
            asked = kept["heldout"] == (part == "heldout") if given else np.ones(len(kept["cut"]), bool)
            count = int(asked.sum()) + self.dropped[part].count
            if not asked.any():
                raise ValueError(
                    f"none of the {count} {part if given else 'train'} examples has a response within "
                    f"data.max_length={self.max_length} tokens; raise it"
                )
            if not len(places):
                raise ValueError(_nothing_left(part, split, given))
        return split

    @override
    def setup(self, stage: str) -> None:
        if self.tokenizer is not None:
            return
        if stage == "predict" and (tokenizer := self.prompt_tokenizer()) is not None:
            self.tokenizer = tokenizer
            return
        from transformers import AutoTokenizer

        self._folder = self.folder
        if not is_whole(self._folder):
            raise FileNotFoundError(
                f"the data is not in the cache, {str(self._folder)!r}: a file of it changed since prepare_data, or "
                "prepare_data did not run on this machine"
            )
        self.tokenizer = AutoTokenizer.from_pretrained(self._folder / "tokenizer", trust_remote_code=False)
        warn_without_end(self.tokenizer, self.template_name)
        self.stats = read_json(self._folder / "stats.json")
        names = self.stats.pop("domains")
        with np.load(self._folder / INDEX) as index:
            about = {"lengths": index["lengths"], "domain_ids": index["domains"], "domain_names": names}
            self.train_set = Examples(
                self._folder, self._epoch_of(index["train"], about["domain_ids"], names), **about
            )
            self.heldout_set = Examples(self._folder, index["heldout"], **about)
        self.domains = sorted(names[i] for i in np.unique(self.heldout_set.domain_ids))
        if unknown := sorted(self.verifiers.keys() - {"default", *self.domains}):
            raise ValueError(f"data.verifiers names {unknown}, but the data's domains are {self.domains}")
        self._warn()
        self.longest_example = int(self.train_set.lengths.max())  # one for all batches

    def _epoch_of(self, train: np.ndarray, domain_ids: np.ndarray, names: list[str]) -> np.ndarray:
        """The training examples of an epoch: of the chosen domains, by their weights and caps."""
        known = sorted(names[i] for i in np.unique(domain_ids[train]))
        chosen = known if self.train_domains is None else list(map(domain_name, self.train_domains))
        if not chosen or not set(chosen) <= set(known):
            raise ValueError(f"data.train_domains={self.train_domains} must name some of the data's domains, {known}")
        for field in ("domain_weights", "domain_caps"):
            if unknown := sorted({domain_name(name) for name in getattr(self, field)} - set(known)):
                raise ValueError(f"data.{field} names {unknown}; the data's domains are {known}")
        train = train[np.isin(domain_ids[train], [names.index(name) for name in chosen])]
        weights = {domain_name(name): weight for name, weight in self.domain_weights.items()}
        caps = {domain_name(name): cap for name, cap in self.domain_caps.items()}
        places = chosen_examples(domain_ids[train], names, weights=weights, caps=caps, seed=self.seed)
        if not len(places):
            raise ValueError("data.domain_weights and data.domain_caps leave no training example")
        return train[places]

    def _warn(self) -> None:
        train, heldout = self.stats["train"], self.stats["heldout"]
        for name, counts in self.stats.items():
            total = counts["examples"] + counts["dropped"]
            if counts["cut"]:
                done = "cut" if name == "train" else "left out, since no answer to them can be right"
                longer = f"{counts['cut']} of {total} examples are longer than max_length={self.max_length}"
                warnings.warn(f"{name}: {longer}: {done}", stacklevel=3)
            if counts["dropped"]:
                warnings.warn(
                    f"{name}: {counts['dropped']} of {total} examples are dropped: {Dropped(counts['reasons'])}",
                    stacklevel=3,
                )
            if counts["merged"]:
                warnings.warn(
                    f"{name}: in {counts['merged']} of {counts['examples']} examples the response's first characters "
                    "would merge with its prompt's last ones; they are tokenised apart, as at inference",
                    stacklevel=3,
                )
        if train["copies"]:
            warnings.warn(
                f"{train['copies']} training examples are copies of held-out conversations: left out of training",
                stacklevel=3,
            )
        trained = {self.train_set.domain_names[i] for i in np.unique(self.train_set.domain_ids)}
        missing = sorted(trained - set(self.domains))
        if missing and not heldout["given"]:  # else its files may be named otherwise
            warnings.warn(
                f"no examples of {missing} are held out ({heldout['examples']} in all): these domains get no scores",
                stacklevel=3,
            )

    # --- rows ----------------------------------------------------------------------------------------

    @property
    def rows(self) -> Rows:
        """Packed rows, or whole batches when grouped by length: what the sampler draws. Kept in the cache."""
        world, _ = self._world
        ranks = 1 if self.packing else world
        if self._made_rows is None or self._made_rows[0] != ranks:
            self._made_rows = ranks, self._stored_rows(ranks)
        return self._made_rows[1]

    def _stored_rows(self, ranks: int) -> Rows:
        settings = [
            self.packing, None if self.packing else [self.batch_size, ranks], self.seed, self.order != "shuffled",
            self.train_domains, self.domain_weights, self.domain_caps,
        ]  # fmt: skip
        file = self.folder / "rows" / f"{digest(settings)[:20]}.npz"
        try:
            with np.load(file) as found:
                return Rows(found["places"], found["ends"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # not there, or damaged
            rows = self._make_rows(ranks)
        with suppress(OSError):  # a cache that can only be read: made again next time
            file.parent.mkdir(exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}.tmp.npz")
            np.savez(unfinished, places=rows.places, ends=rows.ends)
            unfinished.replace(file)
        return rows

    def _make_rows(self, ranks: int) -> Rows:
        """Rows of all examples, or of each domain's where the order keeps domains apart."""
        lengths, domains = self.train_set.lengths, self.train_set.domain_ids
        groups = [np.arange(len(lengths))]
        if self.order != "shuffled":
            groups = [np.flatnonzero(domains == domain) for domain in np.unique(domains)]
        made = []
        for group in groups:
            if self.packing:
                rows = pack(lengths[group], capacity=self.max_length, seed=self.seed)
            else:
                rows = group_by_length(lengths[group], batch_size=self.batch_size, seed=self.seed, ranks=ranks)
            made.append((group[rows.places], rows.ends))
        starts = np.cumsum([0, *(len(places) for places, _ in made[:-1])])
        ends = [ends + start for (_, ends), start in zip(made, starts, strict=True)]
        return Rows(np.concatenate([places for places, _ in made]), np.concatenate(ends))

    def _order_of(self, rows: Rows) -> Order:
        if self.order == "shuffled":
            return Shuffled(len(rows), self.order_seed)
        domains = self.train_set.domain_ids[rows.places[np.concatenate([[0], rows.ends[:-1]])]]
        if self.order == "drifting":
            return Drifting(domains, self.order_seed, floor=self.drift_floor)
        return DomainBlocks(domains, self.order_seed, batch_rows=self.batch_size if self.packing else 1)

    # --- loaders -------------------------------------------------------------------------------------

    @property
    def _world(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @override
    def train_dataloader(self) -> ResumableLoader:
        world, rank = self._world
        if self.batch_size % world:
            raise ValueError(f"data.batch_size={self.batch_size} must be divisible by the {world} processes")
        order = self._order_of(self.rows)
        if len(order) < (self.batch_size if self.packing else 1):
            within = "" if self.order == "shuffled" else "of one domain each "
            raise ValueError(
                f"data.batch_size={self.batch_size} but the training data fills only {len(self.rows)} rows {within}of "
                f"data.max_length={self.max_length} tokens; lower one of them or add data"
            )
        # packed rows are dealt to the ranks; of a batch grouped by length, every rank takes its part
        dealt = {"num_replicas": world, "rank": rank} if self.packing else {"num_replicas": 1, "rank": 0}
        sampler = ResumableSampler(order, **dealt)
        return ResumableLoader(
            self.rows,  # type: ignore[arg-type]
            batch_size=self.batch_size // world if self.packing else None,
            sampler=sampler,
            collate_fn=self._collate_packed if self.packing else self._collate_grouped,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=self.packing,
        )

    def _collate_packed(self, rows: list[list[int]]) -> Batch:
        pad_id = self.tokenizer.pad_token_id
        return collate(rows, self.train_set, pad_id=pad_id, length=self.max_length, longest=self.longest_example)

    def _collate_grouped(self, batch: list[int]) -> Batch:
        world, rank = self._world
        longest = int(self.train_set.lengths[batch].max())
        width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, max(longest, self.max_length))
        rows = [[i] for i in batch[rank::world]]
        return collate(rows, self.train_set, pad_id=self.tokenizer.pad_token_id, length=width)

    @override
    def val_dataloader(self) -> DataLoader:
        world, rank = self._world
        lengths = self.heldout_set.lengths.tolist()
        groups = length_grouped(range(len(lengths)), lengths, max_tokens=self.eval_batch_tokens)
        # every rank takes the same number of batches; the ones added for that count for nothing
        batches = [(group, True) for group in groups]
        batches += [(groups[-1], False)] * (-len(groups) % world)
        return DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=DistributedSampler(batches, num_replicas=world, rank=rank, shuffle=False),  # type: ignore[arg-type]
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
            raise ValueError("data.predict_file is not set: name a file with `prompt` or `messages`")
        self.predict_set = read_prompts(Path(self.predict_file))
        return DataLoader(
            list(enumerate(self.predict_set)),  # type: ignore[arg-type]
            batch_size=16,
            collate_fn=self._collate_prompts,
            sampler=DistributedSampler(
                self.predict_set,  # type: ignore[arg-type]
                num_replicas=self._world[0],
                rank=self._world[1],
                shuffle=False,
            ),
        )

    def conversation(self, row: Row) -> list[dict[str, Any]]:
        """The messages to answer, of a row of ``predict_file``."""
        return prompt_messages(row)

    def _collate_prompts(self, rows: list[tuple[int, Row]]) -> dict[str, torch.Tensor]:
        prompts = []
        for _, row in rows:
            encoded = self.tokenizer.apply_chat_template(
                self.conversation(row), tools=row.get("tools") or None, add_generation_prompt=True, return_dict=True
            )
            prompts.append(encoded["input_ids"])
        width = max(map(len, prompts))
        return {
            "input_ids": torch.tensor([[self.tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            "index": torch.tensor([index for index, _ in rows]),
        }


def _counts(kept: dict[str, Any], places: np.ndarray, dropped: Dropped) -> dict[str, Any]:
    """What the warnings and the summary tell of one part of the data."""
    return {
        "examples": len(places),
        "tokens": int(kept["lengths"][places].sum()),
        "cut": int(kept["cut"][places].sum()),
        "dropped": dropped.count,
        "reasons": dropped.reasons,
        "merged": int(kept["merged"][places].sum()),
    }


def _nothing_left(part: str, split: Split, given: bool) -> str:
    if part == "train":
        return (
            f"nothing is left to train on: all examples would be held out, {split.copies} of them as copies; add data "
            "or give other data.heldout_files"
        )
    if given:
        return f"all {split.cut} held-out examples are longer than data.max_length: none can be answered; raise it"
    return (
        "nothing can be held out: each domain needs two different conversations that fit data.max_length; add data or "
        "give data.heldout_files"
    )


def check_at_least(least: int, **fields: int) -> None:
    """Raises: ValueError: one of the data module's fields is below; names it."""
    for field, value in fields.items():
        if value < least:
            raise ValueError(f"data.{field}={value} must be at least {least}")


def read_prompts(path: Path) -> list[Row]:
    """Rows of ``data.predict_file``; one that can't be answered is named."""
    rows = []
    for number, row in read_records(path, field="data.predict_file"):
        try:
            check_text(prompt_messages(row))
        except ConversationError as error:
            raise ValueError(f"{path}: prompt {number}: {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"data.predict_file: {path} holds no prompts")
    return rows
