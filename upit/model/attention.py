"""Attention that stays inside each example of a packed row.

On GPUs in half precision: FlashAttention over the examples' lengths, which computes only what is inside them.
Elsewhere, and in generation: transformers' SDPA with a dense mask. Registered in transformers' attention interface.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from upit.core.batches import Batch, block_causal_mask

NAME = "upit_packed"
HALF = (torch.bfloat16, torch.float16)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that matrix products of ``tensor`` run in here: autocast's, or its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def packed_mask(batch: Batch, dtype: torch.dtype, *, window: int | None = None) -> Tensor:
    """What :func:`packed_attention` takes as the attention mask of a batch.

    Args:
        dtype: of queries and keys.
        window: tokens that a token may see, where the model has a sliding window; takes the dense mask.
    Returns: where FlashAttention can run, int32 (1, 1, W, S + 1): the ends of the batch's sequences, row after row,
        the first 0, as a view repeated W times; no sequence is longer than W. Else the dense mask of
        :func:`upit.core.batches.block_causal_mask`.
    """
    lengths_S = batch["lengths"]
    if window or not (lengths_S.is_cuda and dtype in HALF):
        return block_causal_mask(batch, window=window)
    return sequence_ends(lengths_S, batch["longest"])


def sequence_ends(lengths_S: Tensor, longest: int) -> Tensor:
    """Where sequences end that lie one after the other, the first 0; int32 (1, 1, longest, S + 1).

    The shape tells attention the longest, as any mask's tells it the number of queries. Layers compile once for all S,
    not for the first and then again for all others, at whatever step the second comes.
    """
    ends_S = lengths_S.cumsum(0, dtype=torch.int32)
    ends = torch.cat([ends_S.new_zeros(1), ends_S]).expand(1, 1, longest, -1)
    torch._dynamo.maybe_mark_dynamic(ends, 3)
    return ends


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs
) -> tuple[Tensor, None]:
    """An attention function of transformers, for either kind of mask that :func:`packed_mask` makes.

    Args:
        query: (B, heads, T, D); key and value (B, key-value heads, T, D).
    Returns: (B, T, heads, D), and no attention weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, width = query.shape

    def rows_of(states: Tensor) -> Tensor:
        """(B * T, heads, D); a key-value head is there once for each of its queries' heads."""
        # under autocast the rotation leaves queries and keys in float32
        rows = states.transpose(1, 2).to(value.dtype).flatten(0, 1)
        return rows.unsqueeze(2).expand(-1, -1, heads // rows.shape[1], -1).flatten(1, 2)

    longest, ends = attention_mask.shape[2], attention_mask[0, 0, 0]
    rows = rows_of(query), rows_of(key), rows_of(value)
    out: Any = varlen_attn(*rows, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
    return out.view(batch, length, heads, width), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
