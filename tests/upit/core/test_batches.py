"""The batch format, and batches of similar length."""

import pytest
import torch

from tests.upit.conftest import make_examples
from upit.core.batches import IGNORE, PADDING, ROUND_SEQUENCES, block_causal_mask, collate, length_grouped

EXAMPLES = make_examples(5)


def test_packed_and_padded_rows_hold_the_examples_as_they_are():
    batch = collate([[0, 3], [4]], EXAMPLES, pad_id=63, length=40)
    used = [len(EXAMPLES[i]["input_ids"]) for i in (0, 3, 4)]
    lengths = [used[0], used[1], 40 - used[0] - used[1], used[2], 40 - used[2]]
    assert batch["lengths"].tolist() == lengths + [0] * (ROUND_SEQUENCES - len(lengths))
    assert torch.equal(batch["predictors"] + 1, (batch["labels"].flatten() != IGNORE).nonzero().flatten())
    assert {value.dtype for value in batch.values() if isinstance(value, torch.Tensor)} == {torch.int64}
    for row, index in ((0, 0), (0, 3), (1, 4)):
        own = batch["example_ids"][row] == index
        assert batch["input_ids"][row][own].tolist() == EXAMPLES[index]["input_ids"]
        assert batch["labels"][row][own].tolist() == EXAMPLES[index]["labels"]
        assert batch["position_ids"][row][own].tolist() == list(range(int(own.sum())))
    padding = batch["example_ids"] == PADDING
    assert padding.any()
    assert set(batch["input_ids"][padding].tolist()) == {63}
    assert set(batch["labels"][padding].tolist()) == {IGNORE}


def test_a_row_is_as_long_as_the_longest_unless_told():
    lengths = [len(example["input_ids"]) for example in EXAMPLES]
    assert collate([[i] for i in range(5)], EXAMPLES, pad_id=0)["input_ids"].shape == (5, max(lengths))
    with pytest.raises(ValueError, match=f"a row of {lengths[0]} tokens does not fit length=2"):
        collate([[0]], EXAMPLES, pad_id=0, length=2)


def test_padding_is_cut_into_sequences_no_longer_than_the_longest():
    used = len(EXAMPLES[0]["input_ids"])
    whole = collate([[0], [0]], EXAMPLES, pad_id=63, length=3 * used + 1)
    cut = collate([[0], [0]], EXAMPLES, pad_id=63, length=3 * used + 1, longest=used)
    assert (whole.pop("longest"), cut.pop("longest")) == (3 * used + 1, used)
    assert whole.pop("lengths")[:5].tolist() == [used, 2 * used + 1, used, 2 * used + 1, 0]
    assert cut.pop("lengths")[:9].tolist() == [used, used, used, 1, used, used, used, 1, 0]
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert collate([[0]], EXAMPLES, pad_id=63, longest=used + 9)["longest"] == used
    with pytest.raises(ValueError, match=f"an example of {used} tokens is longer than longest={used - 1}"):
        collate([[0]], EXAMPLES, pad_id=63, longest=used - 1)


def test_no_query_is_without_a_key():
    """An empty row of the softmax would be NaN."""
    batch = collate([[0], [1]], EXAMPLES, pad_id=0, length=40)
    assert block_causal_mask(batch).any(-1).all()


@pytest.mark.parametrize("max_tokens", [1, 20, 64])
def test_grouped_batches_take_all_within_the_limit_longest_first(max_tokens):
    lengths = {i: (7 * i) % 13 + 1 for i in range(30)}
    batches = length_grouped(list(lengths), lengths, max_tokens=max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(lengths)
    sizes = [max(lengths[i] for i in batch) * len(batch) for batch in batches]
    assert all(size <= max_tokens for size, batch in zip(sizes, batches, strict=True) if len(batch) > 1)
    assert lengths[batches[0][0]] == max(lengths.values())
    assert length_grouped(list(lengths)[::-1], lengths, max_tokens=max_tokens) == batches
