"""Tokenised examples and the one batch format that every stage shares.

Shapes: ``B`` rows, ``T`` tokens a row, ``S`` sequences a row. A batch is a dict of tensors, int64 and (B, T) but for
the last two:

- ``input_ids``: tokens; padding holds the tokenizer's pad id.
- ``labels``: the token itself where it belongs to a response, else ``IGNORE``. Not shifted.
- ``position_ids``: restart at 0 with every example.
- ``example_ids``: index of the token's example in its dataset; ``PADDING`` where there is no token. It says
  which tokens may attend to each other, which tokens count for the balance of experts, and which example
  a token's loss belongs to, whether rows are packed or padded.
- ``lengths``: int32 (B, S), tokens of each example of a row, then of its padding, then zeros up to a round S.
- ``predictors``: (L,), where in the flattened batch a token predicts a response token.

The last two follow from the others; they are worked out here, on the host, so that a training step need not wait for
the device to learn a shape. S is round, so that compiled layers meet few shapes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

IGNORE = -100
PADDING = -1
ROUND_SEQUENCES = 16

Batch = dict[str, Tensor]


class Example(TypedDict):
    """One tokenised conversation, a row of the data modules' datasets."""

    id: str
    domain: str
    input_ids: list[int]
    labels: list[int]  # as ``Batch["labels"]``; the first label is always IGNORE
    prompt_length: int  # tokens before the last response: what a generation starts from
    answer: str  # reference text of the last response
    metadata: str  # JSON for the task's own verifier, "" where there is none


class TrainingData(Protocol):
    """What the method asks of a data module; its own, and any other with the same examples."""

    train_set: Sequence[Example]
    tokenizer: Any

    def prepare_data(self) -> None: ...
    def setup(self, stage: str) -> None: ...


def collate(
    rows: Sequence[Sequence[int]], dataset: Sequence[Example], *, pad_id: int, length: int | None = None
) -> Batch:
    """Lay examples side by side in rows.

    Args:
        rows: B rows of indices into ``dataset``; a row of several indices is packed.
        dataset: tokenised examples.
        pad_id: token written into padding.
        length: T; default the longest row.
    Returns: a batch, see the module's docstring.
    Raises: ValueError: a row is longer than ``length``.
    """
    examples = [[(index, dataset[index]) for index in row] for row in rows]
    widths = [sum(len(example["input_ids"]) for _, example in row) for row in examples]
    length = max(widths) if length is None else length
    if max(widths) > length:
        raise ValueError(f"a row of {max(widths)} tokens does not fit length={length}")
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "example_ids": torch.full(shape, PADDING),
    }
    for b, row in enumerate(examples):
        start = 0
        for index, example in row:
            end = start + len(example["input_ids"])
            batch["input_ids"][b, start:end] = torch.tensor(example["input_ids"])
            batch["labels"][b, start:end] = torch.tensor(example["labels"])
            batch["position_ids"][b, start:end] = torch.arange(end - start)
            batch["example_ids"][b, start:end] = index
            start = end
    sequences = [[len(example["input_ids"]) for _, example in row] for row in examples]
    batch["lengths"] = _padded_lengths(sequences, length)
    batch["predictors"] = (batch["labels"].flatten()[1:] != IGNORE).nonzero().flatten()
    return batch


def _padded_lengths(sequences: list[list[int]], length: int) -> Tensor:
    rows = [[*row, length - sum(row)] for row in sequences]
    most = max(map(len, rows))
    width = most + -most % ROUND_SEQUENCES
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)


def length_grouped(indices: Sequence[int], lengths: Mapping[int, int] | Sequence[int], *, max_tokens: int):
    """Group indices into batches of similar length, each at most ``max_tokens`` tokens with its padding.

    Returns: list of lists of indices, longest first, so that a batch that does not fit fails at once.
    """
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def block_causal_mask(batch: Batch, *, window: int | None = None) -> Tensor:
    """Attention mask that keeps attention inside each example.

    Args:
        window: tokens that a token may see, itself included; None or 0 for all before it.
    Returns: (B, 1, T, T) bool, True where query (dim 2) may see key (dim 3). Padding sees padding, so no
        row of the softmax is empty.
    """
    ids = batch["example_ids"]
    same = ids[:, :, None] == ids[:, None, :]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    if window:
        causal = causal.triu(1 - window)
    return (same & causal)[:, None]
