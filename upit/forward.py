"""Forward passes that every stage shares: response logits, per-example losses, and taps on the FFN's input."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upit.examples import IGNORE, Batch, block_causal_mask
from upit.families import ROUTER


def response_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the response tokens only; the head never sees the other positions.

    Args:
        model: a causal LM of transformers with an ``lm_head``.
        batch: see :mod:`upit.examples`.
    Returns: ``logits_LV``, ``targets_L``, ``example_ids_L`` for the L response tokens of the batch.
    """
    keep_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)
    keep_BT[:, :-1] = batch["labels"][:, 1:] != IGNORE
    select = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0][keep_BT],))
    try:
        logits_LV = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=block_causal_mask(batch, window=getattr(model.config, "sliding_window", None)),
            use_cache=False,
        ).logits
    finally:
        select.remove()
    return logits_LV, batch["labels"][:, 1:][keep_BT[:, :-1]], batch["example_ids"][keep_BT]


def moe_routers(model: PreTrainedModel) -> list:
    """The router of each MoE layer, in order."""
    return [layer.get_submodule(ROUTER) for layer in model.model.layers]


@contextmanager
def router_logits_of(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect router logits, one (tokens, experts) tensor a layer, of the forward passes within."""
    logits: list[Tensor] = []

    def collect(_, __, output):
        logits.append(output[0])

    handles = [router.register_forward_hook(collect) for router in moe_routers(model)]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def ffn_inputs_of(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the hidden states that enter each FFN, one (B, T, H) tensor a layer, of the passes within."""
    inputs: list[Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in model.model.layers
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
