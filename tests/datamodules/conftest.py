"""A small byte-level tokenizer with the special tokens of several chat formats."""

import json

import pytest

from datamodules import InstructionDataModule
from datamodules.reasoning_gym import train_tokenizer
from upit.model.loading.chat_templates import CHATML

SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "</s>", "[INST]", "[/INST]"]
TEXT = (
    "system user assistant You are a helpful assistant. What is the capital of France? Paris. Why? Because it is so.\n"
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    tokenizer = train_tokenizer([TEXT] * 4, vocab_size=400, chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def write_jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make_instruction(tokenizer_dir, tmp_path):
    def make(**kwargs) -> InstructionDataModule:
        settings = {"max_length": 96, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
        return InstructionDataModule(tokenizer=str(tokenizer_dir), **{**settings, **kwargs})

    return make


def ready(module):
    module.prepare_data()
    module.setup("fit")
    return module
