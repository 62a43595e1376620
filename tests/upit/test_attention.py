"""The ends of packed sequences, as compiled layers meet them."""

import torch
from torch._dynamo.utils import counters

from upit.attention import sequence_ends


def test_ends_are_of_the_lengths_before():
    ends = sequence_ends(torch.tensor([3, 0, 5]))
    assert (ends.shape, ends.dtype) == ((1, 1, 1, 4), torch.int32)
    assert ends.flatten().tolist() == [0, 3, 3, 8]


def test_batches_of_other_numbers_of_sequences_compile_nothing_anew():
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    layer = torch.compile(lambda x, ends: x * ends.flatten()[-1] + ends.shape[-1], backend="eager")
    with torch.compiler.set_stance("default"):
        for count in (64, 128, 192):
            ends = sequence_ends(torch.ones(count, dtype=torch.int64))
            assert layer(torch.ones(2), ends).tolist() == [2 * count + 1] * 2
    assert counters["stats"]["unique_graphs"] == before + 1
