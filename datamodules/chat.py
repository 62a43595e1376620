"""Tokenise conversations by a chat template, and tell the responses from the rest.

Every response is trained behind its prompt exactly as at inference: the messages before it, rendered with the
generation prompt and tokenised on their own. Tokenising the whole conversation at once would in some tokenizers merge
the first characters of a response with the last ones of its prompt, into tokens that no generation ever meets.
"""

import re
import signal
import threading
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from upit.core.batches import IGNORE
from upit.model.generation import Closing, closing, special_tokens, stop_ids

Message = Mapping[str, Any]
Row = Mapping[str, Any]  # id, domain, messages; may have tools and metadata

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_SECONDS = 5  # a probe takes less than a millisecond; ours
ANCHORS = ("\n", "a", ".", "0")  # texts to put before a response that must be tokenised apart from its prompt
END = itemgetter(1)  # of a token's offsets
RENDERING = (TemplateError, ValueError, TypeError, ArithmeticError, LookupError)  # what a template may raise


class Tokens(NamedTuple):
    """Tokens of a text, and where in it they stand; no offsets for tokenizers in Python."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None


@dataclass
class Turn:
    """A response that is trained, in a rendered conversation."""

    message: int  # its index
    prompt: int  # characters of its prompt
    spans: list[tuple[int, int]]  # characters that are trained


@dataclass
class Rendered:
    """A rendered conversation, or the part of it up to one response."""

    row: Row
    text: str
    turns: list[Turn]  # in order; all but the last are also in the prompts of later ones
    place: int  # of its row in the batch
    apart: bool = False  # rendered for the sake of one response


class Renderer:
    """Renders conversations by a tokenizer's chat template, and finds the responses."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self._closings: dict[bool, Closing] = {}
        self._templates: dict[bool, tuple[str, bool]] = {}

    def text(self, row: Row, upto: int, *, prompt: bool = False) -> str:
        """The first ``upto`` messages as text, on request with the generation prompt."""
        return self.tokenizer.apply_chat_template(
            row["messages"][:upto], tools=row.get("tools") or None, tokenize=False, add_generation_prompt=prompt
        )

    def marked_text(self, row: Row, upto: int) -> tuple[str, list[tuple[int, int]] | None]:
        """The first ``upto`` messages as text, and the template's generation marks if it has any."""
        template, has_marks = self._template(row)
        if not has_marks:
            return self.text(row, upto), None
        texts, spans = render_jinja_template(
            conversations=[
                [{k: v for k, v in message.items() if v is not None} for message in row["messages"][:upto]]
            ],
            tools=row.get("tools") or None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(a, b) for a, b in spans[0] if a < b]

    def _template(self, row: Row) -> tuple[str, bool]:
        key = bool(row.get("tools"))
        if key not in self._templates:
            template = self.tokenizer.get_chat_template(None, row.get("tools") or None)
            self._templates[key] = template, bool(GENERATION.search(template))
        return self._templates[key]

    def _closing(self, row: Row) -> Closing:
        key = bool(row.get("tools"))
        if key not in self._closings:
            self._closings[key] = closing(self.tokenizer, row.get("tools") or None)
        return self._closings[key]

    def render(self, row: Row, place: int) -> list[Rendered]:
        """Render a conversation once, and again up to each response that the whole shows otherwise than a generation.

        Templates of reasoning models rewrite earlier turns once later ones follow. There a response gets a rendering
        of its own, in which it is the last turn.

        Raises: ValueError: the template begins a response otherwise than its generation prompt does.
        """
        wanted = [
            i for i, message in enumerate(row["messages"]) if message["role"] == "assistant" and trained(message)
        ]
        turns, text, apart = self._turns(row, len(row["messages"]), wanted)
        rendered = [Rendered(row, text, turns, place)] if turns or not apart else []
        return rendered + [self.render_upto(row, i, place) for i in apart]

    def render_upto(self, row: Row, message: int, place: int) -> Rendered:
        """A conversation up to one response, the only one trained."""
        turns, text, _ = self._turns(row, message + 1, [message])
        if not turns:
            raise ValueError(
                "the chat template begins a response otherwise than its generation prompt does, so a model trained "
                "on it would not meet that prompt; set data.chat_template to a training template"
            )
        return Rendered(row, text, turns, place, apart=True)

    def _turns(self, row: Row, upto: int, wanted: Sequence[int]) -> tuple[list[Turn], str, list[int]]:
        """Responses in a rendering, its text, and those of the wanted that stand otherwise in it."""
        text, marks = self.marked_text(row, upto)
        turns, apart = [], []
        for i in wanted:
            prompt = self.text(row, i, prompt=True)
            end = self._end(row, text, i, upto, len(prompt)) if marks is None else len(prompt)
            if not text.startswith(prompt) or end is None:
                apart.append(i)
            else:
                turns.append(Turn(i, len(prompt), [(len(prompt), end)]))
        if marks is not None:
            responses = [i for i in range(upto) if row["messages"][i]["role"] == "assistant"]
            _assign(marks, turns, responses)
        return turns, text, apart

    def _end(self, row: Row, text: str, message: int, upto: int, start: int) -> int | None:
        """Where an unmarked response ends, its end of turn included; None where the rendering has it otherwise."""
        alone = text if message + 1 == upto else self.text(row, message + 1)
        after = self._closing(row)
        if alone.endswith(after.text) and len(alone) - len(after.text) >= start:
            end = len(alone) - len(after.text) + len(after.end)
        else:
            end = len(alone.rstrip("\n"))
        return end if text.startswith(alone[:end]) else None


def check_template(tokenizer) -> None:
    """Render two short conversations.

    Raises: ValueError: the chat template is broken, ignores the messages, or does not come to an end.
    """
    texts = [_probe(tokenizer, question) for question in ("Hi", "Why?")]
    if texts[0] == texts[1]:
        raise ValueError("the chat template ignores the messages; set data.chat_template to another")


def warn_without_end(tokenizer, name: str) -> None:
    """Warn where the template never trains an end of turn, so that answers run on until their limit.

    Args:
        name: of the template, for the message.
    """
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    labels = encode(tokenizer, {"id": "probe", "domain": "", "messages": messages}, max_length=10**6)["labels"]
    if not set(labels) & set(stop_ids(tokenizer)):
        warnings.warn(
            f"{name} never trains an end of turn: answers will run on. Let it write "
            f"{tokenizer.eos_token!r} or another special token after a response, inside the generation marks if it "
            "has any (data.chat_template)",
            stacklevel=2,
        )


def _probe(tokenizer, question: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{question} Yes"}]
    try:
        with time_limit(TEMPLATE_SECONDS):
            return tokenizer.apply_chat_template(turns, tokenize=False)
    except TimeoutError:
        reason = f"it takes more than {TEMPLATE_SECONDS} s for a conversation of two turns"
    except (*RENDERING, RecursionError, OverflowError, MemoryError) as error:
        where = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
        raise ValueError(f"the chat template can't be rendered{where}: {error}; set data.chat_template") from None
    raise ValueError(f"the chat template can't be rendered: {reason}; set data.chat_template")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer. Only the main thread can be interrupted; others are not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def trained(message: Message) -> bool:
    """Whether a response is trained: OpenAI's ``weight: 0`` leaves it out of the loss."""
    weight = message.get("weight")
    return weight is None or weight != 0


def _assign(marks: Sequence[tuple[int, int]], turns: Sequence[Turn], responses: Sequence[int]) -> None:
    """Give each turn the generation marks that are its own: one a response, or those behind its prompt."""
    ends = [*(turn.prompt for turn in turns[1:]), max([0, *(b for _, b in marks)])]
    for turn, end in zip(turns, ends, strict=False):
        if len(marks) == len(responses):
            own = [marks[responses.index(turn.message)]]
        else:
            own = [(a, b) for a, b in marks if turn.prompt < b <= end]
        turn.spans = [(max(a, turn.prompt), b) for a, b in own if b > turn.prompt]


class Encoder:
    """Turns rendered conversations into examples."""

    def __init__(self, tokenizer, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.special = special_tokens(tokenizer)
        self._known: dict[str, Tokens] = {}

    def tokenise(self, texts: Iterable[str]) -> list[Tokens]:
        """Tokens of several texts, in one call."""
        texts = list(texts)
        if not texts:
            return []
        fast = self.tokenizer.is_fast
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=fast,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        offsets = encoded["offset_mapping"] if fast else [None] * len(texts)
        return [Tokens(*pair) for pair in zip(encoded["input_ids"], offsets, strict=True)]

    def encode(self, rendered: Sequence[Rendered]) -> tuple[list[dict[str, Any]], list[tuple[Rendered, int]]]:
        """Examples of rendered conversations, and the responses that need a rendering of their own."""
        wholes = self.tokenise(item.text for item in rendered)
        tails = {
            self._tail(item.text, tokens, turn.prompt)[1]
            for item, tokens in zip(rendered, wholes, strict=True)
            for turn in item.turns
        }
        unknown = [tail for tail in tails if tail not in self._known]
        self._known.update(zip(unknown, self.tokenise(unknown), strict=True))
        examples, again = [], []
        for item, tokens in zip(rendered, wholes, strict=True):
            example, merged = self._example(item, tokens)
            examples.append(example)
            again += [(item, message) for message in merged]
        return examples, again

    def _tail(self, text: str, tokens: Tokens, end: int) -> tuple[int, str]:
        """Where the end of a prompt can be tokenised alone: index of its last special token, and the text from it."""
        if tokens.offsets is None:
            return 0, text[:end]
        for j in range(bisect_right(tokens.offsets, end, key=END) - 1, -1, -1):
            a, b = tokens.offsets[j]
            if tokens.ids[j] in self.special and text[a:b].strip() == self.special[tokens.ids[j]]:
                return j, text[a:end]
        return 0, text[:end]

    def _prompt_tokens(self, text: str, tokens: Tokens, end: int) -> int | None:
        """Tokens of a prompt of ``end`` characters; None where the whole is tokenised otherwise there."""
        first, tail = self._tail(text, tokens, end)
        if tail not in self._known:
            self._known[tail] = self.tokenise([tail])[0]
        expected = self._known[tail].ids
        return first + len(expected) if tokens.ids[first : first + len(expected)] == expected else None

    def _example(self, item: Rendered, tokens: Tokens) -> tuple[dict[str, Any], list[int]]:
        """An example, and the messages whose first token merged with a prompt that is not the last."""
        merged = 0
        if item.turns and self._prompt_tokens(item.text, tokens, item.turns[-1].prompt) is None:
            tokens, merged = self._appended(item.text, tokens, item.turns[-1]), 1
        starts = {turn.message: self._prompt_tokens(item.text, tokens, turn.prompt) for turn in item.turns}
        if item.turns and starts[item.turns[-1].message] is None:
            raise ValueError(f"{item.row['id']}: the tokenizer tokenises a prompt otherwise within a conversation")
        own = [turn for turn in item.turns if starts[turn.message] is not None]
        ids, labels = tokens.ids[: self.max_length], [IGNORE] * len(tokens.ids)
        last: Turn | None = None
        for turn in own:
            spans = self._spans(item.text, tokens, turn, starts[turn.message] or 0)
            if merged and turn is item.turns[-1] and tokens.offsets is None:
                spans = [(starts[turn.message] or 0, len(tokens.ids))]
            for a, b in spans:
                labels[a:b] = tokens.ids[a:b]
                last = turn if max(a, 1) < min(b, self.max_length) else last
        labels[:1] = [IGNORE] * len(labels[:1])
        row, cut = item.row, len(tokens.ids) > self.max_length
        example = {
            "id": f"{row['id']}#{item.turns[-1].message + 1}" if item.apart else row["id"],
            "domain": row["domain"],
            "input_ids": ids,
            "labels": labels[: self.max_length],
            "prompt_length": (starts[last.message] or 0) if last else 0,
            "answer": row["messages"][last.message].get("content") or "" if last else "",
            "metadata": row.get("metadata", ""),
            "cut": cut,
            "merged": merged,
            "reason": "" if last else "no response within max_length" if own and cut else "no response",
        }
        return example, [turn.message for turn in item.turns if starts[turn.message] is None]

    def _spans(self, text: str, tokens: Tokens, turn: Turn, start: int) -> list[tuple[int, int]]:
        """Tokens of a turn that are trained. A token without width ends where it stands, so it counts as before."""
        if tokens.offsets is None:  # by the tokens of the text up to there
            counts = [[_common(self.tokenise([text[:end]])[0].ids, tokens.ids) for end in span] for span in turn.spans]
            return [(max(a, start), b) for a, b in counts]
        spans = []
        for a, b in turn.spans:
            first = start if a == turn.prompt else bisect_right(tokens.offsets, a, key=END)
            stop = bisect_right(tokens.offsets, b, key=END)
            while a != turn.prompt and first < stop and tokens.offsets[first][0] < a:
                first += 1  # it began before the mark
            spans.append((first, stop))
        return spans

    def _appended(self, text: str, tokens: Tokens, turn: Turn) -> Tokens:
        """The prompt of the last response as at inference, then the response's own tokens; nothing behind it.

        Raises: ValueError: the response has no tokens of its own.
        """
        first, tail = self._tail(text, tokens, turn.prompt)
        prompt, begin = self._known[tail], turn.prompt - len(tail)
        end = max((b for _, b in turn.spans), default=turn.prompt)
        own = self._own_tokens(prompt.ids, text[begin:end], text[turn.prompt : end])
        ids = tokens.ids[:first] + prompt.ids + own.ids
        if tokens.offsets is None or prompt.offsets is None or own.offsets is None:
            return Tokens(ids, None)
        moved = _moved(prompt.offsets, begin) + _moved(own.offsets, turn.prompt)
        return Tokens(ids, tokens.offsets[:first] + moved)

    def _own_tokens(self, prompt: list[int], whole: str, response: str) -> Tokens:
        """A response's own tokens, such that they give the whole text behind those of its prompt.

        Tokenised alone, a response would get a space in front from some tokenizers. So it is tokenised behind a text
        whose tokens are left out again.

        Raises: ValueError: there are no such tokens.
        """
        expected = self._decode(self.tokenise([whole])[0].ids)
        candidates = []
        for anchor in [*self.tokenizer.all_special_tokens, *ANCHORS]:
            ids, offsets = self.tokenise([anchor + response])[0]
            skip = len(self.tokenise([anchor])[0].ids)
            candidates.append(Tokens(ids[skip:], offsets and _moved(offsets[skip:], -len(anchor))))
            if self._decode(prompt + ids[skip:]) == expected:
                return candidates[-1]
        for own in candidates:  # a special token that takes the spaces before it
            if "".join(self._decode(prompt + own.ids).split()) == "".join(expected.split()):
                return own
        raise ValueError(f"the tokenizer has no tokens for a response behind its prompt: {whole!r:.200}")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _moved(offsets: Iterable[tuple[int, int]], by: int) -> list[tuple[int, int]]:
    return [(a + by, b + by) for a, b in offsets]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def encode_batch(tokenizer, rows: Sequence[Row], *, max_length: int, invalid: str = "refuse") -> list[dict[str, Any]]:
    """Rows of the data as examples; a batch is tokenised in one call.

    Args:
        rows: id, domain, messages; tools and metadata if any.
        max_length: tokens of an example; it is cut there.
        invalid: ``refuse`` raises on a conversation that the template refuses; ``drop`` gives it an example without
            tokens, and the reason.
    Returns: the fields of :class:`upit.core.batches.Example`, and of each example

        - ``cut``: whether it was longer than ``max_length``;
        - ``merged``: 1 where tokenising the whole conversation would have merged its last response with the prompt;
        - ``reason``: why there is nothing to train on, else "".

        One example a row, in order. Where a template renders earlier turns otherwise once later ones follow, or where
        an earlier response would have merged with its prompt, that response has an example of its own behind the
        row's first, its id ``ID#MESSAGE``.
    Raises: ValueError: see ``invalid``; names the row's id.
    """
    renderer, encoder = Renderer(tokenizer), Encoder(tokenizer, max_length)
    rendered: list[Rendered] = []
    failed: list[tuple[int, dict[str, Any]]] = []
    for place, row in enumerate(rows):
        try:
            rendered += renderer.render(row, place)
        except RENDERING as error:
            if invalid == "refuse":
                raise ValueError(f"{row['id']}: {_refusal(error)}. data.invalid=drop leaves such rows out") from None
            failed.append((place, _without_tokens(row, _refusal(error))))
    examples, again = encoder.encode(rendered)
    alone = [renderer.render_upto(item.row, message, item.place) for item, message in again]
    found = [*zip((item.place for item in rendered), examples, strict=True), *failed]
    found += zip((item.place for item in alone), encoder.encode(alone)[0], strict=True)
    return [example for _, example in sorted(found, key=itemgetter(0))]


def encode(tokenizer, row: Row, *, max_length: int) -> dict[str, Any]:
    """The first example of :func:`encode_batch` for one row: all of it, unless the row needs several."""
    return encode_batch(tokenizer, [row], max_length=max_length)[0]


def _refusal(error: Exception) -> str:
    """Why a conversation can't be rendered."""
    if isinstance(error, ValueError):
        return str(error)
    return f"the chat template refuses the conversation: {error}"


def _without_tokens(row: Row, reason: str) -> dict[str, Any]:
    return {
        "id": row["id"], "domain": row["domain"], "input_ids": [], "labels": [], "prompt_length": 0, "answer": "",
        "metadata": row.get("metadata", ""), "cut": False, "merged": 0, "reason": reason,
    }  # fmt: skip
