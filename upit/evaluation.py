"""Held-out evaluation: response loss and exact match of greedy answers, per domain."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from upit.distributed import all_sum, own_share, world_size
from upit.examples import PADDING, Batch, Example, collate, length_grouped
from upit.forward import response_logits, response_losses
from upit.losses import grouped_losses
from upit.scoring import Autocast, score_examples, to_device

Verify = Callable[[Mapping[str, Any], str], bool]
Scores = dict[str, Any]
Track = Callable[[Iterable], Iterable]


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, tokenizer, prompts: Sequence[Sequence[int]], *, max_new_tokens: Sequence[int]
) -> list[str]:
    """Answer a batch of prompts greedily with a KV cache, left-padded; stops at the end of the turn.

    Each answer is cut at its own ``max_new_tokens``, so that it does not depend on the batch it is in. A collective
    when the model is sharded: every rank must call it the same number of times.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    batch = to_device(
        {
            "input_ids": torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        },
        device,
    )
    ids = model.generate(
        **batch,
        max_new_tokens=max(max_new_tokens),
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        synced_gpus=world_size() > 1,
    )
    answers = [row[:most] for row, most in zip(ids[:, width:].tolist(), max_new_tokens, strict=True)]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def answer_budget(example: Example, *, margin: int = 16) -> int:
    """Tokens to allow the answer to an example: one and a half times its reference response, and a margin."""
    return (len(example["input_ids"]) - example["prompt_length"]) * 3 // 2 + margin


def summed_losses(model: PreTrainedModel, batch: Batch, data) -> tuple[Tensor, Tensor]:
    """Summed response loss and number of response tokens of each domain in a held-out batch, two float32 (C,)."""
    losses_L, targets_L, ids_L = response_losses(model, batch)
    domains_L = [data.domains.index(data.heldout_set[i]["domain"]) for i in ids_L.tolist()]
    groups_L = torch.tensor(domains_L, device=losses_L.device, dtype=torch.long)
    return grouped_losses(losses_L=losses_L, targets_L=targets_L, groups_L=groups_L, num_groups=len(data.domains))


def summed_matches(
    model: PreTrainedModel, batch: Batch, data, *, max_new_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Right greedy answers and questions of each domain in a held-out batch, two float32 (C,); padding is neither.

    Args:
        max_new_tokens: of an answer; default :func:`answer_budget`.
    """
    ids_B = batch["example_ids"][:, 0].tolist()
    rows = [data.heldout_set[max(0, i)] for i in ids_B]
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    budgets = [max_new_tokens or answer_budget(row) for row in rows]
    answers = greedy_answers(model, data.tokenizer, prompts, max_new_tokens=budgets)
    sums_2C = torch.zeros(2, len(data.domains), dtype=torch.float32)
    for i, row, answer in zip(ids_B, rows, answers, strict=True):
        if i != PADDING:
            sums_2C[:, data.domains.index(row["domain"])] += torch.tensor([data.verify(row, answer), 1.0])
    right_C, asked_C = sums_2C.to(batch["input_ids"].device)
    return right_C, asked_C


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer,
    dataset: Sequence[Example],
    verify: Verify,
    *,
    max_new_tokens: int | None = None,
    max_tokens: int = 8192,
    autocast: Autocast = nullcontext,
    track: Callable[[Iterable], Iterable] = lambda batches: batches,
) -> Scores:
    """Loss and exact match on held-out examples; the ranks share the work.

    Args:
        verify: says whether a completion answers an example (the task's own verifier).
        max_new_tokens: of an answer; default :func:`answer_budget`.
        max_tokens: of a batch, with padding and answers.
    Returns: ``{"domains": {name: {"loss", "exact_match"}}, "average": {"loss", "exact_match"}}``. A domain's loss
        is in nats, the mean over its response tokens; exact match lies in 0..1; the average weighs domains alike.
    """
    was_training = model.training
    model.eval()
    rows = [dataset[i] for i in range(len(dataset))]
    indices = list(range(len(rows)))
    loss_S, tokens_S = score_examples(
        model, indices, rows, pad_id=tokenizer.pad_token_id, max_tokens=max_tokens, autocast=autocast, track=track
    )
    budgets = [max_new_tokens or answer_budget(row) for row in rows]
    right_S = torch.zeros(len(rows), dtype=torch.float64, device=next(model.parameters()).device)
    lengths = [row["prompt_length"] + budget for row, budget in zip(rows, budgets, strict=True)]
    groups = length_grouped(indices, lengths, max_tokens=max_tokens)
    for group, counts in track(own_share(groups)):
        prompts = [rows[i]["input_ids"][: rows[i]["prompt_length"]] for i in group]
        with autocast():
            answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=[budgets[i] for i in group])
        if counts:
            for i, answer in zip(group, answers, strict=True):
                right_S[i] = float(verify(rows[i], answer))
    all_sum(right_S)
    model.train(was_training)
    return summarise([row["domain"] for row in rows], loss_S.tolist(), tokens_S.tolist(), right_S.tolist())


def summarise(
    domains: Sequence[str], losses: Sequence[float], tokens: Sequence[float], right: Sequence[float]
) -> Scores:
    """Scores per domain and their average, from one entry per example; see :func:`evaluate`."""
    scores = {}
    for name in sorted(set(domains)):
        own = [i for i, domain in enumerate(domains) if domain == name]
        scores[name] = {
            "loss": sum(losses[i] for i in own) / max(1.0, sum(tokens[i] for i in own)),
            "exact_match": sum(right[i] for i in own) / len(own),
        }
    average = {key: sum(s[key] for s in scores.values()) / len(scores) for key in ("loss", "exact_match")}
    return {"domains": scores, "average": average}


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
    device = next(model.parameters()).device
    indices = list(range(min(num_examples, len(data.heldout_set))))
    lengths = {i: len(data.heldout_set[i]["input_ids"]) for i in indices}
    logits = []
    for group in track(length_grouped(indices, lengths, max_tokens=4096)):
        batch = collate([[i] for i in group], data.heldout_set, pad_id=data.tokenizer.pad_token_id)
        with autocast():
            logits_LV, _, _ = response_logits(model, to_device(batch, device))
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
    """How far the swap moved the model: mean KL(before || now) in nats over held-out response tokens."""
    now = reference_logits(model, data, num_examples, autocast=autocast, track=track)
    total = sum(
        float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
        for a, b in zip(before, now, strict=True)
    )
    return total / max(1, sum(len(logits) for logits in before))
