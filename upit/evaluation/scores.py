"""Held-out evaluation: response loss and exact match of greedy answers, per domain."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from upit.core.batches import PADDING, Batch, Example, collate, domains_of, length_grouped, lengths_of, to_device
from upit.core.distributed import own_share
from upit.core.progress import Autocast
from upit.evaluation.metrics import WeightedMeans
from upit.model.forward import response_logits, response_losses
from upit.model.generation import greedy_answers
from upit.model.losses import grouped_losses

MARGIN = 16  # tokens that an answer may be longer than expected; ours

Scores = dict[str, Any]
Track = Callable[[Iterable], Iterable]


def answer_budget(example: Example) -> int:
    """Tokens to allow the answer to an example: one and a half times its reference response, and ``MARGIN``."""
    return (len(example["input_ids"]) - example["prompt_length"]) * 3 // 2 + MARGIN


def heldout_batch(model: PreTrainedModel, data, indices: Sequence[int]) -> Batch:
    """Held-out examples as a batch, one a row, on the model's device."""
    batch = collate([[i] for i in indices], data.heldout_set, pad_id=data.tokenizer.pad_token_id)
    return to_device(batch, next(model.parameters()).device)


def summed_losses(model: PreTrainedModel, batch: Batch, data) -> tuple[Tensor, Tensor]:
    """Summed response loss and number of response tokens of each domain in a held-out batch, two float32 (C,)."""
    losses_L, targets_L, ids_L = response_losses(model, batch)
    domain_of = torch.from_numpy(domains_of(data.heldout_set, data.domains)).to(losses_L.device)
    groups_L = domain_of[ids_L]
    return grouped_losses(losses_L=losses_L, targets_L=targets_L, groups_L=groups_L, num_groups=len(data.domains))


def summed_answers(
    model: PreTrainedModel, indices: Sequence[int], data, *, max_new_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Number of right answers and of questions of each domain among held-out examples, two float32 (C,).

    Args:
        indices: into ``data.heldout_set``; ``PADDING`` is answered too, so that the ranks keep step, and not counted.
        max_new_tokens: of an answer; default :func:`answer_budget`.
    """
    right_C, asked_C = torch.zeros(2, len(data.domains), dtype=torch.float32).unbind()
    rows = [data.heldout_set[max(0, i)] for i in indices]
    if not rows:
        return right_C, asked_C
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    budgets = [max_new_tokens or answer_budget(row) for row in rows]
    answers = greedy_answers(model, data.tokenizer, prompts, max_new_tokens=budgets)
    for i, row, answer in zip(indices, rows, answers, strict=True):
        if i != PADDING:
            domain = data.domains.index(row["domain"])
            right_C[domain] += data.verify(row, answer)  # the task's own verifier
            asked_C[domain] += 1
    return right_C, asked_C


@torch.no_grad()
def _domain_means(
    model: PreTrainedModel,
    data,
    lengths: Mapping[int, int],
    sums_of: Callable[[list[int]], tuple[Tensor, Tensor]],
    *,
    autocast: Autocast,
    track: Track,
) -> dict[str, float]:
    """Mean of each domain over the held-out examples; the ranks share the work.

    Args:
        lengths: of each example that counts, the tokens that it takes in a batch.
        sums_of: sums and counts of each domain for a batch of examples.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    means = WeightedMeans(data.domains).to(device)
    groups = length_grouped(list(lengths), lengths, max_tokens=data.eval_batch_tokens)
    for group, counts in track(own_share(groups)):
        with autocast():
            found = sums_of(group)
        means.update(*(values_C.to(device) * counts for values_C in found))
    model.train(was_training)
    return {name: float(mean) for name, mean in means.compute().items()}


def domain_losses(
    model: PreTrainedModel, data, *, autocast: Autocast = nullcontext, track: Track = lambda batches: batches
) -> dict[str, float]:
    """Held-out response loss of each domain in nats, the mean over its tokens; the ranks share the work."""
    lengths = dict(enumerate(lengths_of(data.heldout_set)))

    def losses(group: list[int]) -> tuple[Tensor, Tensor]:
        return summed_losses(model, heldout_batch(model, data, group), data)

    return _domain_means(model, data, lengths, losses, autocast=autocast, track=track)


def domain_exact_match(
    model: PreTrainedModel,
    data,
    *,
    max_new_tokens: int | None = None,
    autocast: Autocast = nullcontext,
    track: Track = lambda batches: batches,
) -> dict[str, float]:
    """Share of each domain's held-out questions that greedy answers get right; the ranks share the work.

    Only ``data.scored_examples()`` are asked; a domain without any has no entry.

    Args:
        max_new_tokens: of an answer; default :func:`answer_budget`.
    """
    rows = {i: data.heldout_set[i] for i in data.scored_examples()}
    if not rows:
        return {}
    lengths = {i: row["prompt_length"] + (max_new_tokens or answer_budget(row)) for i, row in rows.items()}

    def answers(group: list[int]) -> tuple[Tensor, Tensor]:
        return summed_answers(model, group, data, max_new_tokens=max_new_tokens)

    return _domain_means(model, data, lengths, answers, autocast=autocast, track=track)


def evaluate(
    model: PreTrainedModel,
    data,
    *,
    max_new_tokens: int | None = None,
    autocast: Autocast = nullcontext,
    track: Track = lambda batches: batches,
) -> Scores:
    """Loss and exact match on held-out examples.

    Args:
        data: data module, for ``heldout_set``, ``domains``, ``tokenizer``, ``verify``, ``scored_examples`` and
            ``eval_batch_tokens``.
        max_new_tokens: of an answer; default :func:`answer_budget`.
        track: wraps the batches, for a progress bar.
    Returns: ``{"domains": {name: {"loss", "exact_match"}}, "average": {"loss", "exact_match"}}``. A domain's loss
        is in nats, the mean over its response tokens; exact match lies in 0..1, NaN where a domain is not scored; the
        average weighs domains alike.
    """
    losses = domain_losses(model, data, autocast=autocast, track=track)
    right = domain_exact_match(model, data, max_new_tokens=max_new_tokens, autocast=autocast, track=track)
    scores = {name: {"loss": losses[name], "exact_match": right.get(name, math.nan)} for name in data.domains}
    return {"domains": scores, "average": {"loss": _mean(losses), "exact_match": _mean(right)}}


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values) if values else math.nan


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel,
    data,
    num_examples: int,
    *,
    autocast: Autocast = nullcontext,
    track: Track = lambda batches: batches,
) -> list[Tensor]:
    """Response logits on the first held-out examples, one (tokens, vocabulary) float32 CPU tensor a batch.

    Every rank computes all of them.
    """
    indices = list(range(min(num_examples, len(data.heldout_set))))
    lengths = {i: len(data.heldout_set[i]["input_ids"]) for i in indices}
    logits = []
    for group in track(length_grouped(indices, lengths, max_tokens=4096)):
        with autocast():
            logits_LV, _, _ = response_logits(model, heldout_batch(model, data, group))
        logits.append(logits_LV.to("cpu", torch.float32))
    return logits


def drift(
    model: PreTrainedModel,
    before: list[Tensor],
    data,
    num_examples: int,
    *,
    autocast: Autocast = nullcontext,
    track: Track = lambda batches: batches,
) -> float:
    """How far a change moved the model: mean KL(before || now) in nats over held-out response tokens."""
    now = reference_logits(model, data, num_examples, autocast=autocast, track=track)
    total = sum(
        float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
        for a, b in zip(before, now, strict=True)
    )
    return total / max(1, sum(len(logits) for logits in before))
