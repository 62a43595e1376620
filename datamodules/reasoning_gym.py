"""Procedural questions with exact verifiers, from reasoning-gym; and a tokenizer for models from scratch."""

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from datamodules.base import ConversationDataModule, Row, check_at_least
from datamodules.split import domain_name
from upit.model.loading.chat_templates import CHATML
from upit.model.loading.sources import content_key, load_tokenizer, set_chat_template, template_text

HELDOUT_SEED = 2**31
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


class ReasoningGymDataModule(ConversationDataModule):
    """A mapping of domains to reasoning-gym families; training and held-out questions are disjoint.

    Args:
        families: ``{domain: {family: settings}}``; the families of a domain share its size evenly.
        train_size: training questions a domain.
        heldout_size: held-out questions a domain.
        tokenizer: as in :class:`InstructionDataModule`; None trains a byte-level BPE on the training text.
        vocab_size: of the trained BPE; the 256 bytes and its special tokens are part of it.
        chat_template: as in :class:`InstructionDataModule`; default ChatML for a trained tokenizer.
        system_prompt: first message of every conversation; of a prompt to answer too, unless it has its own.
        trust_remote_code: allow tokenizer code that comes with the files.
    Raises:
        ImportError: reasoning-gym is not installed; ``pip install "upit[demo]"``.
        ValueError: an unknown family, one without reference answers, or one with too few distinct questions.
    """

    def __init__(
        self,
        families: dict[str, dict[str, dict[str, Any]]],
        train_size: int = 1000,
        heldout_size: int = 100,
        tokenizer: str | None = None,
        vocab_size: int = 2048,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        trust_remote_code: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if find_spec("reasoning_gym") is None:
            raise ImportError('ReasoningGymDataModule needs reasoning-gym, an extra: pip install "upit[demo]"')
        if not families or not all(families.values()):
            raise ValueError(f"data.families={families!r}: every domain needs a family")
        check_at_least(1, train_size=train_size, heldout_size=heldout_size)
        if tokenizer is None:
            check_at_least(len(SPECIAL) + len(pre_tokenizers.ByteLevel.alphabet()), vocab_size=vocab_size)
        self.families = families
        self.train_size = train_size
        self.heldout_size = heldout_size
        self.tokenizer_source = tokenizer
        self.vocab_size = vocab_size
        self.template_source = chat_template
        self.chat_template = chat_template and template_text(chat_template)
        self.system_prompt = system_prompt
        self.trust_remote_code = trust_remote_code

    @override
    def source_key(self) -> dict[str, Any]:
        return {
            "families": self.families,
            "sizes": [self.train_size, self.heldout_size],
            "seed": self.seed,
            "tokenizer": [content_key(self.tokenizer_source), self.vocab_size, self.chat_template],
            "system_prompt": self.system_prompt,
            "reasoning_gym": version("reasoning-gym"),
        }

    @override
    def prompt_tokenizer(self) -> Any:
        return None if self.tokenizer_source is None else self.make_tokenizer([])

    @override
    def make_tokenizer(self, train_rows: Iterable[Row]):
        if self.tokenizer_source is not None:
            return load_tokenizer(
                self.tokenizer_source, chat_template=self.chat_template, trust_remote_code=self.trust_remote_code
            )
        texts = [message["content"] for row in train_rows for message in row["messages"]]
        return train_tokenizer(texts, vocab_size=self.vocab_size, chat_template=self.chat_template)

    @override
    def make_rows(self) -> tuple[list[Row], list[Row]]:
        # held out first: every question in it is kept from the training set, in whatever domain
        seen: set[str] = set()
        heldout = self._all_questions(self.heldout_size, HELDOUT_SEED, seen, "held-out")
        return self._all_questions(self.train_size, 0, seen, "training"), heldout

    def _all_questions(self, size: int, offset: int, seen: set[str], what: str) -> list[Row]:
        rows: list[Row] = []
        pairs = [(domain, family) for domain in self.families for family in self.families[domain]]
        for domain, family in tqdm(pairs, desc=f"Generating {what} questions", leave=False):
            rows += self._questions(domain, family, -(-size // len(self.families[domain])), offset, seen)
        return rows

    def _questions(self, domain: str, family: str, count: int, offset: int, seen: set[str]) -> list[Row]:
        rows: list[Row] = []
        seed, size = self.seed + offset, 4 * count + 100
        questions = _dataset(family, json.dumps(self.families[domain][family]), seed, size)
        for i in range(size):
            if len(rows) == count:
                return rows
            entry = questions[i]
            if entry["answer"] is None:
                raise ValueError(f"data.families.{domain}.{family} has no reference answers to train on; leave it out")
            if entry["question"] not in seen:
                seen.add(entry["question"])
                rows.append(self._row(domain, f"{family}:{seed}:{size}:{i}", entry))
        if len(rows) == count:
            return rows
        raise ValueError(
            f"data.families.{domain}.{family} has only {len(rows)} distinct questions of the {count} asked for; "
            "widen its settings, or lower data.train_size or data.heldout_size"
        )

    def _row(self, domain: str, name: str, entry: Mapping[str, Any]) -> Row:
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        messages += [
            {"role": "user", "content": entry["question"]},
            {"role": "assistant", "content": str(entry["answer"])},
        ]
        return {"id": name, "domain": domain, "messages": messages, "metadata": name}

    @override
    def conversation(self, row: Row) -> list[dict[str, Any]]:
        messages = super().conversation(row)
        if self.system_prompt is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    @override
    def verify(self, example: Mapping[str, Any], completion: str) -> bool:
        """By the domain's verifier, else by the family's own, on the entry that the example came from."""
        if example["domain"] in self.verifiers:
            return super().verify(example, completion)
        family, *numbers = example["metadata"].split(":")
        seed, size, index = map(int, numbers)  # the size too: some families' entries depend on it
        families = next(own for name, own in self.families.items() if domain_name(name) == example["domain"])
        questions = _dataset(family, json.dumps(families[family]), seed, size)
        return questions.score_answer(completion.strip(), questions[index]) >= 1.0 - 1e-6


@cache
def _dataset(family: str, settings: str, seed: int, size: int):
    import reasoning_gym

    if family not in reasoning_gym.factory.DATASETS:
        alike = get_close_matches(family, reasoning_gym.factory.DATASETS, n=5, cutoff=0.4)
        raise ValueError(f"data.families: reasoning_gym has no family {family!r}; alike: {alike}")
    try:
        return reasoning_gym.create_dataset(family, seed=seed, size=size, **json.loads(settings))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"data.families: {family!r} can't have the settings {settings}: {error}") from None


def train_tokenizer(texts: list[str], *, vocab_size: int, chat_template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training text; digits stand alone, turns end with ``<|im_end|>``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        [*texts, "system\nuser\nassistant\n"],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], chat_template=CHATML
    )
    set_chat_template(tokenizer, chat_template)
    return tokenizer
