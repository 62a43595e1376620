"""Forward passes that every stage shares: response states, logits and losses, and taps on the FFN's input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from upit.examples import Batch
from upit.families import ROUTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_TOKENS = 2048


def response_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states where a response token is predicted; the head is left for the caller to apply.

    Args:
        model: a causal LM of transformers with an ``lm_head``.
        batch: see :mod:`upit.examples`.
    Returns: ``states_LH``, ``targets_L``, ``example_ids_L`` for the L response tokens of the batch; a target is
        ``IGNORE`` where the batch's labels were masked after it was collated.
    """
    from upit.attention import compute_dtype, packed_mask  # with transformers' models, which take seconds to import

    body: Any = model.model
    states: list[Tensor] = []
    keep = body.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    try:
        model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=packed_mask(
                batch, compute_dtype(next(model.parameters())), window=getattr(model.config, "sliding_window", None)
            ),
            use_cache=False,
            logits_to_keep=batch["input_ids"].new_empty(0),  # the head gets nothing to do
        )
    finally:
        keep.remove()
    at_L = batch["predictors"]
    return states[0].flatten(0, 1)[at_L], batch["labels"].flatten()[at_L + 1], batch["example_ids"].flatten()[at_L]


def response_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """``logits_LV``, ``targets_L``, ``example_ids_L`` of the response tokens; see :func:`response_states`."""
    states_LH, targets_L, example_ids_L = response_states(model, batch)
    return model.lm_head(states_LH), targets_L, example_ids_L


def response_losses(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of each response token, ``losses_L`` in float32 nats, ``targets_L``, ``example_ids_L``.

    The vocabulary's logits exist for ``HEAD_TOKENS`` tokens at a time and are computed again in the backward pass.
    A target of ``IGNORE`` has no loss.
    """
    states_LH, targets_L, example_ids_L = response_states(model, batch)
    return chunked_head_losses(model.lm_head, states_LH, targets_L), targets_L, example_ids_L


def chunked_head_losses(head: torch.nn.Module, states_LH: Tensor, targets_L: Tensor) -> Tensor:
    """Cross entropy of each token, float32; ``HEAD_TOKENS`` rows of logits at a time, again in the backward pass."""
    chunks = [
        checkpoint(_head_losses, head, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(states_LH.split(HEAD_TOKENS), targets_L.split(HEAD_TOKENS), strict=True)
    ]
    return torch.cat(chunks)


def _head_losses(head: torch.nn.Module, states_LH: Tensor, targets_L: Tensor) -> Tensor:
    return F.cross_entropy(head(states_LH).float(), targets_L, reduction="none")


def moe_routers(model: PreTrainedModel) -> list:
    """The router of each MoE layer, in order."""
    body: Any = model.model
    return [layer.get_submodule(ROUTER) for layer in body.layers]


def record_routing(model: PreTrainedModel) -> None:
    """Let every router keep what it said last as ``last_logits`` (T, E) and ``last_experts`` (T, K).

    An attribute, not a list that a passing hook fills: compiled layers keep writing to it.
    """
    for router in moe_routers(model):
        router.register_forward_hook(_keep_routing)


def _keep_routing(router, _, output: tuple[Tensor, Tensor, Tensor]) -> None:
    router.last_logits, _, router.last_experts = output


def last_routing(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Of the last forward pass: router logits (D, T, E) and chosen experts (D, T, K), layer by layer."""
    routers = moe_routers(model)
    return torch.stack([r.last_logits for r in routers]), torch.stack([r.last_experts for r in routers])


@contextmanager
def ffn_inputs_of(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the hidden states that enter each FFN, one (B, T, H) tensor a layer, of the passes within."""
    inputs: list[Tensor] = []
    body: Any = model.model
    handles = [layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in body.layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
