"""The ends of packed sequences, as compiled layers meet them."""

import itertools

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from tests.upit.conftest import make_examples
from upit.core.batches import PADDING, block_causal_mask, collate
from upit.model.attention import packed_attention, sequence_ends
from upit.model.loading.build import build

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 2,
}


def test_ends_are_of_the_lengths_before():
    ends = sequence_ends(torch.tensor([3, 0, 5]), 6)
    assert (ends.shape, ends.dtype) == ((1, 1, 6, 4), torch.int32)
    assert ends[0, 0, 0].tolist() == [0, 3, 3, 8]


def one_by_one(query, key, value, ends, _, longest, *__, scale, window_size):
    """In place of FlashAttention, which runs on GPUs alone: each sequence on its own."""
    assert window_size == (-1, 0)
    out = torch.zeros_like(query)
    for start, end in itertools.pairwise(ends.tolist()):
        assert end - start <= longest
        if end > start:
            states = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
            out[start:end] = F.scaled_dot_product_attention(*states, is_causal=True, scale=scale).transpose(0, 1)
    return out


def test_sequences_attend_as_the_dense_mask_says(monkeypatch):
    told = []

    def varlen(query, key, value, ends, ends_again, longest, *args, **kwargs):
        told.append(longest)
        return one_by_one(query, key, value, ends, ends_again, longest, *args, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    torch.manual_seed(0)
    batch = collate([[0, 1], [2]], make_examples(3), pad_id=0, length=60, longest=30)
    query, *key_value = (torch.randn(2, heads, 60, 8) for heads in (6, 2, 2))  # key-value heads of three queries each
    found, _ = packed_attention(None, query, *key_value, sequence_ends(batch["lengths"], 30), scaling=0.3)
    key, value = (tensor.repeat_interleave(3, dim=1) for tensor in key_value)
    mask = block_causal_mask(batch)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)
    real = batch["example_ids"] != PADDING  # padding attends within its own pieces
    torch.testing.assert_close(found[real], expected[real])
    assert told == [30]


def test_batches_of_other_numbers_of_sequences_compile_nothing_anew(monkeypatch):
    def varlen(query, key, value, ends, _, longest, *__, **___):  # FlashAttention runs on GPUs alone
        return query + ends.shape[0] + longest

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    model = build(LlamaConfig(**SHAPE))
    for layer in model.model.layers:
        layer.compile(backend="eager")
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.int64), "position_ids": torch.arange(8).repeat(2, 1)}
    with torch.compiler.set_stance("default"):
        for count in (64, 128, 192):
            ends = sequence_ends(torch.ones(count, dtype=torch.int64), 5)
            model.model(**batch, attention_mask=ends, use_cache=False)
    assert counters["stats"]["unique_graphs"] == before + 1
