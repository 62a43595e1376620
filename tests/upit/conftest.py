"""Tiny models, synthetic examples and experts on disk, without a tokenizer or a fit."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from tests.upit.tiny import SIZES
from upit.core.batches import IGNORE
from upit.model.families import is_expert
from upit.model.loading.build import build
from upit.preparation.pool import Pool


@pytest.fixture
def make_dense():
    """A Llama of two layers; ``seed`` chooses its weights."""

    def make(seed: int = 0, **fields):
        torch.manual_seed(seed)
        settings = {**SIZES, "initializer_range": 0.2, "tie_word_embeddings": True}
        return build(LlamaConfig(**{**settings, **fields})).eval()

    return make


@pytest.fixture
def dense(make_dense):
    return make_dense()


def make_examples(count: int, *, seed: int = 0, vocabulary: tuple[int, int] = (3, 64)) -> list[dict]:
    """Examples of random tokens and lengths; the second half of each is its response."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        length = int(torch.randint(4, 13, (), generator=generator))
        ids = torch.randint(*vocabulary, (length,), generator=generator).tolist()
        prompt = length // 2
        examples.append(
            {
                "id": f"example:{i}",
                "domain": ("odd", "even")[i % 2],
                "input_ids": ids,
                "labels": [IGNORE] * prompt + ids[prompt:],
                "prompt_length": prompt,
                "answer": "",
                "metadata": "",
            }
        )
    return examples


def make_data(count: int, **kwargs) -> SimpleNamespace:
    """What the stages ask of a data module."""
    examples = make_examples(count, **kwargs)
    return SimpleNamespace(
        train_set=examples, heldout_set=examples, tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=2)
    )


def expert_tensors(model) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if is_expert(name)}


def shift(tensors: dict[str, torch.Tensor], amount: float, seed: int) -> dict[str, torch.Tensor]:
    """The tensors moved in a random direction: a checkpoint some steps on."""
    generator = torch.Generator().manual_seed(seed)
    return {name: t + amount * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


@pytest.fixture
def make_pool(tmp_path):
    """A pool of harvested experts of ``model``; each is its base moved in a direction of its own."""

    def make(model, count: int, *, amount: float = 0.1) -> Pool:
        pool = Pool(tmp_path / "experts")
        base = expert_tensors(model)
        pool.set_base(base)
        for i in range(count):
            pool.add(shift(base, amount, seed=i), step=10 * (i + 1), epoch=0.25 * (i + 1), metrics={"val/loss": 1.0})
        return pool

    return make
