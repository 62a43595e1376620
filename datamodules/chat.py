"""Tokenise conversations by a chat template, and tell the responses from the rest."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from upit.examples import IGNORE

Message = Mapping[str, str]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_messages(messages: Any, where: str) -> None:
    """Raises: ValueError: not a list of {role, content}, both text."""
    good = isinstance(messages, list) and all(
        isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )
    if not (good and messages):
        raise ValueError(f"{where}: messages must be a list of {{role, content}}, both text; got {messages!r:.200}")


def check_template(tokenizer) -> None:
    """Raises: ValueError: the chat template is broken."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        where = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
        raise ValueError(f"the chat template can't be rendered{where}: {error}; set data.chat_template") from None


def tokenise(tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Tokens of a conversation and their labels: the token itself in a response, IGNORE elsewhere.

    A response runs from behind the generation prompt to the end of its turn, the end-of-turn token included.
    Uses the template's own generation marks where it has them, else the text of the conversation's prefixes.

    Raises: ValueError: the template renders a conversation's prefix otherwise than the conversation.
    """
    if _GENERATION.search(tokenizer.chat_template):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    else:
        text, spans = response_spans(tokenizer, messages)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        mask = [
            any(a <= start and end <= b and start < end for a, b in spans) for start, end in encoded["offset_mapping"]
        ]
    labels = [token if flag else IGNORE for token, flag in zip(ids, mask, strict=True)]
    labels[0] = IGNORE
    return list(ids), labels


def response_spans(tokenizer, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it each response stands, end of turn included."""

    def render(upto: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)

    text = render(len(messages), prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, prompt=True), render(i + 1, prompt=False)
        if not (text.startswith(before) and text.startswith(after)):
            raise ValueError(
                "this chat template renders earlier turns otherwise once later ones follow; "
                "mark the responses in it with {% generation %} (data.chat_template)"
            )
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip("\n"))))
    return text, spans


def encode(tokenizer, row: Mapping[str, Any], *, max_length: int) -> dict[str, Any]:
    """One row of the data (id, domain, messages, metadata) as an :class:`upit.examples.Example`.

    Cut to ``max_length`` tokens; what is left of it may hold no response, which the caller drops and counts.
    """
    messages = row["messages"]
    responses = [message["content"] for message in messages if message["role"] == "assistant"]
    ids, labels = tokenise(tokenizer, messages)
    cut = len(ids) > max_length
    ids, labels = ids[:max_length], labels[:max_length]
    starts = [i for i in range(1, len(labels)) if labels[i] != IGNORE and labels[i - 1] == IGNORE]
    return {
        "id": row["id"],
        "domain": row["domain"],
        "input_ids": ids,
        "labels": labels,
        "prompt_length": starts[-1] if starts else 0,
        "answer": responses[min(len(starts), len(responses)) - 1] if starts else "",  # of the last response left
        "metadata": row.get("metadata", ""),
        "cut": cut,
    }
