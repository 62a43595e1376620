"""Forward passes that every stage shares: response states, logits and losses, and taps on the FFN's input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from upit.core.batches import Batch
from upit.model.loss_head import head_loss, head_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def body_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states of a batch, (B, T, H); the head gets nothing to do.

    Args:
        model: a causal LM of transformers with an ``lm_head``.
        batch: see :mod:`upit.core.batches`.
    """
    body: Any = model.model
    states: list[Tensor] = []
    keep = body.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    try:
        model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=attention_mask(model, batch),
            use_cache=False,
            logits_to_keep=batch["input_ids"].new_empty(0),
        )
    finally:
        keep.remove()
    return states[0]


def attention_mask(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The mask that keeps a model's attention inside each example; see :func:`upit.model.attention.packed_mask`."""
    from upit.model.attention import (  # with transformers' models, which take seconds to import
        compute_dtype,
        packed_mask,
    )

    window = getattr(model.config, "sliding_window", None)
    return packed_mask(batch, compute_dtype(next(model.parameters())), window=window)


Body = Callable[["PreTrainedModel", Batch], Tensor]


def response_states(
    model: PreTrainedModel, batch: Batch, *, body: Body = body_states
) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states where a response token is predicted; the head is left for the caller to apply.

    Args:
        body: gives the hidden states of the whole batch.
    Returns: ``states_LH``, ``targets_L``, ``example_ids_L`` for the L response tokens of the batch; a target is
        ``IGNORE`` where the batch's labels were masked after it was collated.
    """
    at_L = batch["predictors"]
    states_LH = body(model, batch).flatten(0, 1).index_select(0, at_L)
    return states_LH, batch["labels"].flatten()[at_L + 1], batch["example_ids"].flatten()[at_L]


def response_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """``logits_LV``, ``targets_L``, ``example_ids_L`` of the response tokens; see :func:`response_states`."""
    states_LH, targets_L, example_ids_L = response_states(model, batch)
    return model.lm_head(states_LH), targets_L, example_ids_L


def response_losses(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of each response token, ``losses_L`` in float32 nats, ``targets_L``, ``example_ids_L``."""
    states_LH, targets_L, example_ids_L = response_states(model, batch)
    return head_losses(model.lm_head, states_LH, targets_L), targets_L, example_ids_L


def response_loss(model: PreTrainedModel, batch: Batch, *, body: Body = body_states) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over the response tokens, float32 nats, and ``targets_L``; what training needs."""
    states_LH, targets_L, _ = response_states(model, batch, body=body)
    return head_loss(model.lm_head, states_LH, targets_L), targets_L


@contextmanager
def _inputs_of(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the first argument of each call of the modules within."""
    inputs: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for module in modules]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def ffn_inputs_of(model: PreTrainedModel) -> AbstractContextManager[list[Tensor]]:
    """Collect the hidden states that enter each FFN, one (B, T, H) tensor a layer, of the passes within."""
    body: Any = model.model
    return _inputs_of(layer.mlp for layer in body.layers)


def layer_inputs_of(model: PreTrainedModel) -> AbstractContextManager[list[Tensor]]:
    """Collect the residual stream that enters each decoder layer, one (B, T, H) tensor a layer."""
    body: Any = model.model
    return _inputs_of(body.layers)
