"""Which experts the tokens of held-out examples go to."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upit.core.batches import domains_of, length_grouped, lengths_of
from upit.core.distributed import own_share
from upit.core.progress import Autocast
from upit.evaluation.metrics import DomainRouting
from upit.evaluation.scores import heldout_batch
from upit.model.forward import response_logits
from upit.model.routers import moe_routers

SHOWN_TOKENS, SHOWN_DOMAINS = 80, 6  # in the token view: of an example, of all; ours


def expert_choices(model: PreTrainedModel) -> list[Tensor]:
    """The routers' choices in the last forward pass, one (tokens, top_k) tensor a layer."""
    return [router.last_experts for router in moe_routers(model)]


def domain_routing(model: PreTrainedModel, data) -> DomainRouting:
    """An empty count for a MoE and the held-out examples of a data module, on the model's device."""
    return DomainRouting(
        num_layers=len(moe_routers(model)),
        num_experts=moe_routers(model)[0].weight.shape[0],
        domains=domains_of(data.heldout_set, data.domains).tolist(),
        num_domains=len(data.domains),
    ).to(next(model.parameters()).device)


@torch.no_grad()
def count_heldout(
    model: PreTrainedModel,
    metric: DomainRouting,
    data,
    *,
    autocast: Autocast = nullcontext,
    track: Callable[[Iterable], Iterable] = lambda batches: batches,
) -> None:
    """Count the routing of all held-out examples; the ranks share the batches. The model is in evaluation mode."""
    lengths = lengths_of(data.heldout_set)
    groups = length_grouped(range(len(lengths)), lengths, max_tokens=data.eval_batch_tokens)
    for group, counts in track(own_share(groups)):
        batch = heldout_batch(model, data, group)
        with autocast():
            response_logits(model, batch)
        if counts:
            metric.update(expert_choices(model), batch["example_ids"].flatten())


@torch.no_grad()
def token_view(model: PreTrainedModel, data, *, autocast: Autocast = nullcontext) -> dict[str, Any]:
    """First expert of each token in the first, middle and last layer, for one held-out example of the first domains.

    Every rank computes all of it. Returns: ``{"layers": [...], "examples": [{"domain", "tokens", "experts"}]}``, the
    experts one list a layer.
    """
    domains = data.domains[:SHOWN_DOMAINS]
    of_all = domains_of(data.heldout_set, data.domains).tolist()
    first = {domain: of_all.index(i) for i, domain in enumerate(domains)}
    batch = heldout_batch(model, data, [first[domain] for domain in domains])
    with autocast():
        response_logits(model, batch)
    choices = expert_choices(model)
    layers = sorted({0, len(choices) // 2, len(choices) - 1})
    width = batch["input_ids"].shape[1]
    chosen = [choices[layer][:, 0].view(-1, width).tolist() for layer in layers]
    examples = []
    for row, domain in enumerate(domains):
        ids = data.heldout_set[first[domain]]["input_ids"][:SHOWN_TOKENS]
        examples.append(
            {
                "domain": domain,
                "tokens": [data.tokenizer.decode([token]) for token in ids],
                "experts": [layer[row][: len(ids)] for layer in chosen],
            }
        )
    return {"layers": layers, "examples": examples}
