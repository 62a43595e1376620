"""Greedy generation, and the tokens that end a turn."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from upit.core.distributed import world_size

PROBE = "zq7"  # a response that no template contains
NOT_SETTINGS = {"transformers_version", "_from_model_config"}  # fields of a generation config that describe the file


class Closing(NamedTuple):
    """The text that a chat template writes after a conversation's last response."""

    text: str  # all of it
    end: str  # its part up to the end-of-turn token, that token included; "" where there is none
    token: int | None  # id of the end-of-turn token


def special_tokens(tokenizer) -> dict[int, str]:
    """The tokens that a tokenizer never merges with text, its added and its special ones: id to text."""
    ids = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return {token: tokenizer.convert_ids_to_tokens(token) for token in ids}


def closing(tokenizer, tools: list[dict[str, Any]] | None = None) -> Closing:
    """Find the end of turn from the chat template: the first special token after a response.

    A base model's tokenizer often has an eos token that its template does not use: Qwen2.5's is ``<|endoftext|>``
    where the template ends turns with ``<|im_end|>``.
    """
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PROBE}]
    rendered = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
    _, found, text = rendered.rpartition(PROBE)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if found and text else []
    special = special_tokens(tokenizer)
    for token in ids:
        name = special.get(token, "")
        if name and name in text:
            return Closing(text, text[: text.index(name) + len(name)], token)
    return Closing(text if found else "", "", None)


def stop_ids(tokenizer) -> list[int]:
    """Ids at which an answer ends: the template's end of turn, and the tokenizer's eos token where that is another."""
    ids = (closing(tokenizer).token, tokenizer.eos_token_id)
    return list(dict.fromkeys(token for token in ids if token is not None))


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel, tokenizer, prompts: Sequence[Sequence[int]], *, max_new_tokens: Sequence[int]
) -> list[str]:
    """Answer a batch of prompts greedily with a KV cache, left-padded; stops at :func:`stop_ids`.

    Always plain greedy: the model's own generation config (penalties, n-gram bans, sampling) is not used. Each answer
    is cut at its own ``max_new_tokens``, so it does not depend on the batch it is in. A collective when the model is
    sharded: every rank must call it the same number of times.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    gaps = [width - len(prompt) for prompt in prompts]
    inputs = [[pad] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)]
    masks = [[0] * gap + [1] * (width - gap) for gap in gaps]
    stops = stop_ids(tokenizer)
    with plain_greedy(model, eos_token_id=stops or None, pad_token_id=pad, max_new_tokens=max(max_new_tokens)):
        ids_BT = model.generate(
            input_ids=torch.tensor(inputs, device=device),
            attention_mask=torch.tensor(masks, device=device),
            synced_gpus=world_size() > 1,
        )[:, width:].cpu()
    stopped_BT = torch.isin(ids_BT, torch.tensor(stops, dtype=ids_BT.dtype))
    lengths = (stopped_BT.cumsum(1) == 0).sum(1).tolist()  # tokens before the first stop
    answers = [
        row[: min(length, most)] for row, length, most in zip(ids_BT.tolist(), lengths, max_new_tokens, strict=True)
    ]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@contextmanager
def plain_greedy(model: PreTrainedModel, **settings: Any) -> Iterator[None]:
    """Put a plain generation config in place of the model's own.

    ``generate`` fills what a config leaves out from the model's own one, so passing a config is not enough.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, **settings)
    try:
        yield
    finally:
        model.generation_config = own


def answer_column(rows: Iterable[Mapping[str, Any]]) -> str:
    """Name for the answers to rows of prompts: ``answer``, or ``answer-2`` and so on where a row has that already."""
    taken = {name for row in rows for name in row}
    names = itertools.chain(["answer"], (f"answer-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def generation_settings(config: GenerationConfig | None) -> dict[str, Any]:
    """The settings of a generation config that differ from transformers' defaults, in plain types."""
    settings = config.to_diff_dict() if config is not None else {}
    return {name: value for name, value in settings.items() if name not in NOT_SETTINGS and value is not None}


def exported_generation(source: Mapping[str, Any], tokenizer) -> GenerationConfig:
    """Generation config of an export: the source model's settings, with the trained end of turn among its stops.

    Args:
        source: :func:`generation_settings` of the model that training started from; its eos list is kept.
    """
    given = source.get("eos_token_id")
    own = given if isinstance(given, list) else [given]
    stops = list(dict.fromkeys(token for token in [*stop_ids(tokenizer), *own] if token is not None))
    tokens = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(**{**source, **tokens, "eos_token_id": stops[0] if len(stops) == 1 else stops or None})
