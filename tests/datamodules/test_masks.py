"""Masks of seven kinds of tokenizer and thirteen templates, against a renderer without Jinja and without offsets."""

from typing import NamedTuple

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from datamodules.chat import encode_batch
from tests.datamodules.conftest import turns
from tests.datamodules.test_chat import ANSWER_SPACE, CHATML_DEFAULT_SYSTEM, CHATML_PLAIN
from tests.upit.model.test_generation import PHI3_OWN
from upit.core.batches import IGNORE
from upit.model.loading.chat_templates import TEMPLATES

SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    *dict.fromkeys(token for template in TEMPLATES.values() for token in template.tokens),
]
TEXT = [
    "What is the capital of France? Paris. Question: Answer: user: assistant:\n Because it is so.\n\nReally. 中文 🙂"
] * 3
CONVERSATIONS = [
    turns("What is the capital of France?", "Paris."),
    turns("What is 12 + 30?", "42", "Why? Ü 中文!", "Because it is so.\nReally 🙂", "And?", "中文"),
    turns("Hi", "\nso", "Why", " so  "),
    turns("Hi", "", "Why", "a"),
]


class Spec(NamedTuple):
    """What a template writes, in plain text."""

    template: str
    user: str
    assistant: str  # the generation prompt
    end: str  # trained, behind a response
    bos: str = ""
    prefix: str = ""  # trained, before a response
    after: str = ""
    user_end: str = ""
    final: str = ""
    trim: bool = False

    def content(self, message) -> str:
        return message["content"].strip() if self.trim else message["content"]

    def prompt(self, messages) -> str:
        """The text that a generation starts from."""
        text = self.bos
        for message in messages:
            if message["role"] == "user":
                text += self.user + self.content(message) + self.user_end
            else:
                text += self.assistant + self.response(message) + self.after
        return text + self.assistant

    def response(self, message) -> str:
        return self.prefix + self.content(message) + self.end


IM = ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>")
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
PHI = ("<|user|>\n", "<|assistant|>\n", "<|end|>")
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECS = {
    "chatml": Spec(TEMPLATES["chatml"].text, *IM, after="\n", user_end="<|im_end|>\n"),
    "chatml_unmarked": Spec(CHATML_PLAIN, *IM, after="\n", user_end="<|im_end|>\n"),
    "chatml_system": Spec(CHATML_DEFAULT_SYSTEM, *IM, bos=HELPFUL, after="\n", user_end="<|im_end|>\n"),
    "llama3": Spec(TEMPLATES["llama3"].text, HEADER.format("user"), HEADER.format("assistant"), "<|eot_id|>",
                   bos="<|begin_of_text|>", user_end="<|eot_id|>", trim=True),
    "mistral": Spec(TEMPLATES["mistral"].text, "[INST] ", "", "</s>", bos="<s>", prefix=" ", user_end="[/INST]"),
    "gemma": Spec(TEMPLATES["gemma"].text, "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>",
                  bos="<s>", after="\n", user_end="<end_of_turn>\n", trim=True),
    "zephyr": Spec(TEMPLATES["zephyr"].text, "<|user|>\n", "<|assistant|>\n", "</s>", after="\n", user_end="</s>\n"),
    "phi3": Spec(TEMPLATES["phi3"].text, *PHI, after="\n", user_end="<|end|>\n"),
    "phi3_own": Spec(PHI3_OWN, *PHI, after="\n", user_end="<|end|>\n", final="</s>"),
    "qwen3": Spec(TEMPLATES["qwen3"].text, *IM, prefix="<think>\n\n</think>\n\n", after="\n", user_end="<|im_end|>\n"),
    "deepseek-r1": Spec(TEMPLATES["deepseek-r1"].text, "<｜User｜>", "<｜Assistant｜><think>\n",
                        "<｜end▁of▁sentence｜>", bos="<s>", prefix="\n</think>\n\n"),
    "space": Spec(ANSWER_SPACE, "Question: ", "", "</s>", user_end=" Answer: "),
    "plain": Spec(PLAIN, "user: ", "assistant: ", "", after="\n", user_end="\n"),
}  # fmt: skip


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def byte_bpe(*, trim: bool | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _trained_bytes(tokenizer, trim)


def split_bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _trained_bytes(tokenizer, True)


def _trained_bytes(tokenizer: Tokenizer, trim: bool | None) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if trim is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return wrapped(tokenizer)


def llama_bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([text.replace("中文 🙂", "") for text in TEXT], trainer)
    return wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return wrapped(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return wrapped(tokenizer)


def in_python() -> ByT5Tokenizer:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": SPECIAL[3:]})
    return tokenizer


TOKENIZERS = {
    "byte-level BPE": lambda: byte_bpe(trim=None),
    "byte-level BPE, trimmed offsets": lambda: byte_bpe(trim=True),
    "byte-level BPE, digits and lines split": split_bpe,
    "BPE with byte fallback": llama_bpe,
    "Unigram": unigram,
    "WordPiece": word_piece,
    "bytes, in Python": in_python,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def own_tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("name", SPECS)
def test_each_response_is_trained_whole_behind_its_prompt(own_tokenizer, name):
    spec, tokenizer = SPECS[name], own_tokenizer
    tokenizer.chat_template = spec.template

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [{"id": str(i), "domain": "d", "messages": messages} for i, messages in enumerate(CONVERSATIONS)]
    examples = encode_batch(tokenizer, rows, max_length=10_000)
    for row, messages in zip(rows, CONVERSATIONS, strict=True):
        own = [example for example in examples if example["id"].partition("#")[0] == row["id"]]
        runs = [run for example in own for run in trained_runs(example)]
        for i in range(1, len(messages), 2):
            prompt, text = spec.prompt(messages[:i]), spec.response(messages[i])
            expected = ids(prompt + text)
            if not text:
                continue
            matching = [run for before, run in runs if before == ids(prompt)]
            assert len(matching) == 1, "one response behind exactly this prompt"
            if expected[: len(ids(prompt))] == ids(prompt):
                assert matching[0] == expected[len(ids(prompt)) :]
            else:  # whole, they would merge
                texts = [tokenizer.decode(found) for found in (ids(prompt) + matching[0], expected)]
                if isinstance(tokenizer, ByT5Tokenizer):  # its special tokens take the spaces before them
                    texts = ["".join(text.split()) for text in texts]
                assert texts[0] == texts[1]
                assert any(example["merged"] for example in own)
        assert len(runs) == sum(bool(spec.response(message)) for message in messages[1::2])


def trained_runs(example) -> list[tuple[list[int], list[int]]]:
    """All tokens before each run of labels, and the run."""
    labels, runs = example["labels"], []
    for i, label in enumerate(labels):
        if label != IGNORE and (i == 0 or labels[i - 1] == IGNORE):
            stop = next((j for j in range(i, len(labels)) if labels[j] == IGNORE), len(labels))
            runs.append((example["input_ids"][:i], labels[i:stop]))
    return runs
