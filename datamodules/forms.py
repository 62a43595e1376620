"""Forms that conversations come in, and what is wrong with a conversation.

A form is recognised by the columns of a file's first record, or set. All become OpenAI's messages: a list of
``{role, content}``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args

FormName = Literal["messages", "sharegpt", "alpaca", "prompt_completion"]
FORMS = get_args(FormName)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))  # columns of one turn each
MESSAGE_LISTS = ("messages", "conversations", "conversation")


class ConversationError(ValueError):
    """A conversation can't be trained on; the message says why, alike for all conversations with the same fault."""


@dataclass
class Forms:
    """Turns records into conversations.

    Args:
        format: the form of all records; None recognises it in each file.
        messages_column: column of message lists, where it is not one of ``MESSAGE_LISTS``.
        prompt_column, response_column: columns of one turn each, text or messages; given, they are the form.
        roles: the data's role names to ours, e.g. ``{bot: assistant}``.
        message_keys: a message's keys for ``role`` and ``content``, where they are others than ``role`` and
            ``content``, or ``from`` and ``value``.
    """

    format: FormName | None = None
    messages_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    message_keys: Mapping[str, str] = field(default_factory=dict)

    def recognise(self, record: Mapping[str, Any], source: str) -> "Form":
        """The form of a file, by its first record.

        Raises: ValueError: none fits; names the columns.
        """
        name = self.format or self._guess(record)
        columns = name and self._columns(name, record)
        if name is None or columns is None:
            raise ValueError(
                f"{source} has no column {self._wanted(record)}, only {sorted(map(str, record))}; "
                "set data.messages_column, or data.prompt_column and data.response_column"
            )
        return Form(name, columns, self)

    def _guess(self, record: Mapping[str, Any]) -> FormName | None:
        if self.prompt_column is not None:
            return "prompt_completion"
        if self.messages_column is not None or "messages" in record:
            return "messages"
        if any(column in record for column in MESSAGE_LISTS):
            return "sharegpt"
        if {"instruction", "output"} <= record.keys():
            return "alpaca"
        return "prompt_completion" if any({*pair} <= record.keys() for pair in PAIRS) else None

    def _columns(self, name: FormName, record: Mapping[str, Any]) -> tuple[str, ...] | None:
        """The columns that a form reads in this file; None where they are not there."""
        choices: list[tuple[str, ...]]
        if name == "alpaca":
            choices = [("instruction", "output")]
        elif name == "prompt_completion":
            given = self.prompt_column is not None and self.response_column is not None
            choices = [(self.prompt_column, self.response_column)] if given else list(PAIRS)  # type: ignore[list-item]
        else:
            choices = [(self.messages_column,)] if self.messages_column else [(column,) for column in MESSAGE_LISTS]
        return next((columns for columns in choices if {*columns} <= record.keys()), None)

    def _wanted(self, record: Mapping[str, Any]) -> str:
        if self.format == "alpaca":
            pair: tuple[str | None, ...] = ("instruction", "output")
        elif self.prompt_column is None and self.format != "prompt_completion":
            pair = (self.messages_column or "messages",)
        else:
            pair = (self.prompt_column or "prompt", self.response_column or "completion")
        return " or ".join(repr(column) for column in pair if column not in record)


@dataclass(frozen=True)
class Form:
    """The form of one file."""

    name: FormName
    columns: tuple[str, ...]
    settings: Forms

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.columns)})"

    def conversation(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record's ``messages``, and its ``tools`` if it has any.

        Raises: ConversationError: see :func:`check_conversation`; or the record lacks a column.
        """
        for column in self.columns:
            if column not in record:
                raise ConversationError(f"no column {column!r}")
        messages = self._messages(record)
        check_conversation(messages)
        return {"messages": messages, **({"tools": tools} if (tools := _tools(record.get("tools"))) else {})}

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.name == "alpaca":
            return self._alpaca(record)
        if self.name == "prompt_completion":
            prompt, completion = (record[column] for column in self.columns)
            before = self._turns(prompt, "user")
            for message in before:
                if message["role"] == "assistant":
                    message["weight"] = 0  # part of the prompt
            return before + self._turns(completion, "assistant")
        messages = self._list(record[self.columns[0]])
        system = record.get("system") if self.name == "sharegpt" else None
        return [{"role": "system", "content": system}, *messages] if system else messages

    def _turns(self, value: Any, role: str) -> list[dict[str, Any]]:
        return self._list(value) if isinstance(value, list) else [{"role": role, "content": _text(value)}]

    def _list(self, messages: Any) -> list[dict[str, Any]]:
        if not isinstance(messages, list) or not messages:
            raise ConversationError(f"{NOT_MESSAGES}; got {messages!r:.200}")
        return [self._message(message) for message in messages]

    def _message(self, message: Any) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise ConversationError(f"{NOT_MESSAGES}; got {message!r:.200}")
        theirs = "role" not in message and "from" in message
        role_key = self.settings.message_keys.get("role", "from" if theirs else "role")
        content_key = self.settings.message_keys.get("content", "value" if theirs else "content")
        role = message.get(role_key)
        if not isinstance(role, str) or (content_key not in message and not message.get("tool_calls")):
            raise ConversationError(f"{NOT_MESSAGES}; got {dict(message)!r:.200}")
        rest = {k: v for k, v in message.items() if k not in (role_key, content_key) and v is not None}
        content = message.get(content_key)
        if not (content is None and role == "assistant" and rest.get("tool_calls")):
            content = _text(content)
        return {"role": self._role(role, theirs), "content": content or "", **rest}

    def _role(self, role: str, theirs: bool) -> str:
        if role in self.settings.roles:
            return self.settings.roles[role]
        if theirs and role in SHAREGPT_ROLES:
            return SHAREGPT_ROLES[role]
        if role not in ROLES:
            nearest = SHAREGPT_ROLES.get(role.lower()) or next(iter(get_close_matches(role, ROLES, 1, 0.5)), None)
            alike = f", nearest is {nearest!r}" if nearest else ""
            remedy = f"{{{role}: {nearest or 'user'}}}"
            raise ConversationError(f"unknown role {role!r}{alike}; set data.roles={remedy}")
        return role

    def _alpaca(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        messages = []
        if record.get("system"):
            messages.append({"role": "system", "content": _text(record["system"])})
        for question, answer in record.get("history") or []:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        parts = [_text(record["instruction"])] + ([_text(record["input"])] if record.get("input") else [])
        messages.append({"role": "user", "content": "\n\n".join(parts)})
        return [*messages, {"role": "assistant", "content": _text(record["output"])}]


def prompt_messages(record: Any) -> list[dict[str, Any]]:
    """The conversation to answer, of a record of prompts: ``messages``, ``prompt`` or Alpaca's ``instruction``.

    Raises: ConversationError: it has none of these columns, or they hold something else.
    """
    if not isinstance(record, Mapping):
        raise ConversationError(f"not an object of columns; got {record!r:.200}")
    form = Form("messages", (), Forms())
    if (column := next((name for name in MESSAGE_LISTS if record.get(name)), None)) is not None:
        return form._list(record[column])
    for name in ("prompt", "question"):
        if name in record:
            return form._turns(record[name], "user")
    if "instruction" in record:
        return form._alpaca({**record, "output": ""})[:-1]
    raise ConversationError(f"no column messages, prompt or instruction, only {sorted(map(str, record))}")


NOT_MESSAGES = "messages must be a list of {role, content}"


def _text(content: Any) -> str:
    """A message's content as text; parts of text are joined.

    Raises: ConversationError: it is null, or holds something else than text.
    """
    if content is None:
        raise ConversationError("null content")
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise ConversationError(f"content must be text; got {content!r:.200}")
    return content


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ConversationError(f"content has a part of type {kind!r}; only text can be trained on")


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Tools of a record, given as a list or as JSON."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except ValueError:
            raise ConversationError("tools is not valid JSON") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise ConversationError("tools must be a list of objects")
    return tools or []


def check_text(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises: ConversationError: a message's text is not Unicode."""
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise ConversationError("a lone surrogate: half of a character in \\u escapes") from None


def check_conversation(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises: ConversationError: no response, a response first, or text that is not Unicode."""
    check_text(messages)
    for message in messages:
        weight = message.get("weight")
        if weight is not None and weight not in (0, 1):
            raise ConversationError(f"weight must be 0 or 1; got {weight!r}")
    if messages[0]["role"] == "assistant":
        raise ConversationError("it begins with the assistant, so there is no prompt to answer")
    if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
        raise ConversationError("no response")


class Dropped:
    """Counts conversations that were left out, by reason, with the first of each."""

    def __init__(self, reasons: dict[str, dict[str, Any]] | None = None) -> None:
        self.reasons = reasons if reasons is not None else {}

    def add(self, reason: str, where: str) -> None:
        self.reasons.setdefault(reason, {"count": 0, "first": where})["count"] += 1

    @property
    def count(self) -> int:
        """Conversations of all reasons."""
        return sum(own["count"] for own in self.reasons.values())

    def __str__(self) -> str:
        return "; ".join(f"{own['count']}: {reason} (first {own['first']})" for reason, own in self.reasons.items())
