"""Tokenised examples and the one batch format that every stage shares.

Shapes: ``B`` rows, ``T`` tokens a row. A batch is a dict of int64 tensors, (B, T) but for two, and a number:

- ``input_ids``: tokens; padding holds the tokenizer's pad id.
- ``labels``: the token itself where it belongs to a response, else ``IGNORE``. Not shifted.
- ``position_ids``: restart at 0 with every example.
- ``example_ids``: index of the token's example in its dataset; ``PADDING`` where there is no token. It says
  which tokens may attend to each other, which tokens count for the balance of experts, and which example
  a token's loss belongs to, whether rows are packed or padded.
- ``lengths``: (S,), tokens of each sequence: the examples of the first row, then its padding, which is cut into
  sequences too, and so on; zeros up to a round S.
- ``predictors``: (L,), where in the flattened batch a token predicts a response token.
- ``longest``: int, no sequence is longer. Attention's kernels are launched for sequences of this length; the same for
  all batches, so that one compiled step serves them. T always holds.

The last three follow from the others; they are worked out here, on the host, so that a training step need not wait for
the device to learn a shape. S is round, so that compiled layers meet few shapes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
PADDING = -1
ROUND_SEQUENCES = 64


class Batch(TypedDict):
    """What a step works on; see the module's docstring."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    example_ids: Tensor
    lengths: Tensor
    predictors: Tensor
    longest: int


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
    rows: Sequence[Sequence[int]],
    dataset: Sequence[Example],
    *,
    pad_id: int,
    length: int | None = None,
    longest: int | None = None,
) -> Batch:
    """Lay examples side by side in rows.

    Args:
        rows: B rows of indices into ``dataset``; a row of several indices is packed.
        dataset: tokenised examples.
        pad_id: token written into padding.
        length: T; default the longest row.
        longest: tokens of the longest example of all batches, see the module's docstring; default T.
    Returns: a batch, see the module's docstring.
    Raises: ValueError: a row is longer than ``length``, or an example than ``longest``.
    """
    parts = [[tokens_of(dataset, index) for index in row] for row in rows]
    widths = [sum(len(ids) for ids, _ in row) for row in parts]
    length = max(widths) if length is None else length
    longest = length if longest is None else min(longest, length)
    if max(widths) > length:
        raise ValueError(f"a row of {max(widths)} tokens does not fit length={length}")
    largest = max((len(ids) for row in parts for ids, _ in row), default=0)
    if largest > longest:
        raise ValueError(f"an example of {largest} tokens is longer than longest={longest}")
    ids_N = np.full(len(rows) * length, pad_id, dtype=np.int64)
    labels_N = np.full(len(rows) * length, IGNORE, dtype=np.int64)
    owners: list[int] = []
    lengths: list[int] = []
    for number, (row, part, width) in enumerate(zip(rows, parts, widths, strict=True)):
        start = number * length
        for index, (ids, labels) in zip(row, part, strict=True):
            ids_N[start : start + len(ids)] = ids
            labels_N[start : start + len(ids)] = labels
            start += len(ids)
            owners.append(index)
            lengths.append(len(ids))
        padding = [min(longest, length - begin) for begin in range(width, length, longest)]
        owners += [PADDING] * len(padding)
        lengths += padding
    return _batch(
        torch.from_numpy(ids_N),
        torch.from_numpy(labels_N),
        torch.tensor(owners, dtype=torch.long),
        torch.tensor(lengths, dtype=torch.long),
        shape=(len(rows), length),
        longest=longest,
    )


def tokens_of(dataset: Sequence[Example], index: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of an example. A dataset with a method ``tokens`` gives them without making Python numbers."""
    if hasattr(dataset, "tokens"):
        return dataset.tokens(index)
    row = dataset[index]
    return np.asarray(row["input_ids"]), np.asarray(row["labels"])


def lengths_of(dataset: Sequence[Example]) -> list[int]:
    """Tokens of each example."""
    if hasattr(dataset, "lengths"):
        return dataset.lengths.tolist()
    return [len(row["input_ids"]) for row in dataset]


def domains_of(dataset: Sequence[Example], names: Sequence[str]) -> np.ndarray:
    """Index of each example's domain in ``names``, int64."""
    if hasattr(dataset, "domain_ids") and hasattr(dataset, "domain_names"):
        place = {name: i for i, name in enumerate(names)}
        return np.array([place.get(name, -1) for name in dataset.domain_names])[dataset.domain_ids]
    return np.array([names.index(row["domain"]) for row in dataset])


def _batch(
    ids_N: Tensor, labels_N: Tensor, owners_S: Tensor, lengths_S: Tensor, *, shape: tuple[int, int], longest: int
) -> Batch:
    """A batch of N = B * T tokens in S sequences, padding among them."""
    example_ids_N = owners_S.repeat_interleave(lengths_S)
    starts_N = (lengths_S.cumsum(0) - lengths_S).repeat_interleave(lengths_S)
    position_ids_N = (torch.arange(len(ids_N)) - starts_N) * (example_ids_N != PADDING)
    return {
        "input_ids": ids_N.view(shape),
        "labels": labels_N.view(shape),
        "position_ids": position_ids_N.view(shape),
        "example_ids": example_ids_N.view(shape),
        "lengths": F.pad(lengths_S, (0, -len(lengths_S) % ROUND_SEQUENCES)),
        "predictors": (labels_N[1:] != IGNORE).nonzero().flatten(),
        "longest": longest,
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``, on their way there if they are pinned; its number stays."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items() if isinstance(value, Tensor)}
    return cast(Batch, {**batch, **moved})


def token_mask(batch: Batch) -> Tensor:
    """True for real tokens, False for padding, (B * T,)."""
    return (batch["example_ids"] != PADDING).flatten()


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
