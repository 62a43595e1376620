"""The ends of packed sequences, as compiled layers meet them."""

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from upit.attention import sequence_ends
from upit.models import build

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
            ends = sequence_ends(torch.ones(count, dtype=torch.int64), 8)
            model.model(**batch, attention_mask=ends, use_cache=False)
    assert counters["stats"]["unique_graphs"] == before + 1
