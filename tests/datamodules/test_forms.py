"""Every form that users bring is read, or refused with file and row."""

import json

import pytest

from datamodules.forms import Forms
from tests.datamodules.conftest import ready, turns, write_jsonl

GOOD = [{"messages": turns(f"Question {i}?", f"Answer {i}.")} for i in range(12)]
PAIR = [{"conversations": [{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": f"A{i}"}]} for i in range(8)]
ALPACA = [{"instruction": f"Add {i}", "input": f"{i} and 1" if i % 2 else "", "output": f"{i + 1}"} for i in range(8)]
SEVERAL = turns("Hi", "Paris.", "Why?", "So.\nReally.")


def message(role, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def line(**changed) -> dict:
    return {"messages": [message("user", "Hi"), {**message("assistant", "Yes"), **changed}]}


def part(*texts) -> list:
    return [{"type": "text", "text": text} for text in texts]


def weighted(i) -> dict:
    return {"messages": [*turns("Hi"), message("assistant", "bad", weight=0), message("user", f"Again {i}"),
                         message("assistant", "good", weight=1)]}  # fmt: skip


def in_parts(i) -> dict:
    return {"messages": [message("user", part("Hi ", f"you {i}")), message("assistant", part("Yes"))]}


def as_messages(i) -> dict:
    return {"prompt": turns("a", "b", f"P{i}"), "completion": [message("assistant", f"C{i}")]}


READ = {  # records, a conversation that must be in the data, and its trained text
    "messages": (GOOD, turns("Question 3?", "Answer 3."), "Answer 3."),
    "sharegpt": (PAIR, turns("Q3", "A3"), "A3"),
    "sharegpt, system": ([{"system": "S", **row} for row in PAIR], turns("Q3", "A3", system="S"), "A3"),
    "alpaca with input": (ALPACA, turns("Add 3\n\n3 and 1", "4"), "4"),
    "alpaca without input": (ALPACA, turns("Add 2", "3"), "3"),
    "completion": ([{"prompt": f"P{i}", "completion": f"C{i}"} for i in range(8)], turns("P3", "C3"), "C3"),
    "response": ([{"prompt": f"P{i}", "response": f"C{i}"} for i in range(8)], turns("P3", "C3"), "C3"),
    "completion as messages": ([as_messages(i) for i in range(8)], turns("a", "b", "P3", "C3"), "C3"),
    "content parts": ([in_parts(i) for i in range(8)], turns("Hi you 3", "Yes"), "Yes"),
    "weight 0": ([weighted(i) for i in range(8)], turns("Hi", "bad", "Again 3", "good"), "good"),
    "several turns": ([*GOOD, {"messages": SEVERAL}], SEVERAL, "Paris.|So.\nReally."),
}
FIRST = {"messages": [message("assistant", "Hello!"), *turns("Hi", "Yes.")]}
HUMAN = {"messages": [message("human", "Hi"), message("gpt", "Yes")]}
REFUSED = {  # a record, and what is said about it
    "begins with the assistant": (FIRST, "begins with the assistant"),
    "role model": (line(role="model"), r"role 'model', nearest is 'assistant'; set data\.roles=\{model: assistant\}"),
    "role human": (HUMAN, "unknown role 'human', nearest is 'user'"),
    "role misspelt": (line(role="asistant"), "unknown role 'asistant', nearest is 'assistant'"),
    "null content": (line(content=None), "null content"),
    "number": (line(content=4), "content must be text; got 4"),
    "image": (line(content=[{"type": "image_url", "image_url": "x"}]), "a part of type 'image_url'"),
    "no response": ({"messages": turns("Hi")}, "no response"),
    "no trained response": (line(weight=0), "no response"),
    "half a weight": (line(weight=0.5), "weight must be 0 or 1; got 0.5"),
    "lone surrogate": (line(content="x \ud83d y"), "a lone surrogate"),
    "no messages": ({"messages": []}, "messages must be a list"),
    "another column": ({"texts": []}, "no column 'messages'"),
    "tools": ({**GOOD[0], "tools": "[{"}, "tools is not valid JSON"),
}


def trained_texts(module) -> set[str]:
    """Trained text of each example, without ends of turns; several responses joined by |."""
    texts = set()
    for row in module.train_set + module.heldout_set:
        marked = [token if label != -100 else -1 for token, label in zip(row["input_ids"], row["labels"], strict=True)]
        text = "".join("\0" if token < 0 else module.tokenizer.decode([token]) for token in marked)
        texts.add("|".join(run.removesuffix("<|im_end|>") for run in text.split("\0") if run))
    return texts


@pytest.mark.parametrize("name", READ)
def test_a_form_is_recognised_by_its_columns(make_instruction, tmp_path, name):
    rows, messages, trained = READ[name]
    module = ready(make_instruction(train_files=[write_jsonl(tmp_path / "rows.jsonl", rows)]))
    examples = [module.tokenizer.decode(row["input_ids"]) for row in module.train_set + module.heldout_set]
    assert len(examples) == len(rows)
    assert module.tokenizer.apply_chat_template(messages, tokenize=False) in examples
    assert trained in trained_texts(module)


@pytest.mark.parametrize("name", REFUSED)
def test_a_conversation_that_cannot_be_trained_on_is_refused_or_dropped(make_instruction, tmp_path, name):
    row, message = REFUSED[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*GOOD, row, *GOOD, row]))
    file = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=rf"rows\.jsonl: example 13: .*{message}"):
        make_instruction(train_files=[file]).prepare_data()
    module = make_instruction(train_files=[file], invalid="drop")
    module.prepare_data()
    with pytest.warns(
        UserWarning, match=r"train: 2 of \d+ examples are dropped: 2: .*\(first .*rows\.jsonl: example 13\)"
    ):
        module.setup("fit")
    assert len(module.train_set) + len(module.heldout_set) + module.stats["train"]["copies"] == 24
    assert module.stats["train"]["dropped"] == 2


def test_what_the_template_refuses_is_refused_or_dropped(make_instruction, tmp_path, tokenizer):
    refusing = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + tokenizer.chat_template
    rows = [*GOOD, {"messages": turns("Hi", "Yes.", system="Be brief.")}]
    file, heldout = (
        write_jsonl(tmp_path / "rows.jsonl", rows),
        write_jsonl(tmp_path / "heldout.jsonl", [line(content="Another")]),
    )
    settings = {"train_files": [file], "heldout_files": [heldout], "chat_template": refusing}
    with pytest.raises(ValueError, match=r"rows\.jsonl:13: the chat template refuses the conversation: no system"):
        make_instruction(**settings).prepare_data()
    module = make_instruction(**settings, invalid="drop")
    module.prepare_data()
    with pytest.warns(UserWarning, match=r"train: 1 of 13 examples are dropped: 1: the chat template .*:13"):
        module.setup("fit")


def test_everything_dropped_is_refused(make_instruction, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [line(content=None)] * 3)
    with pytest.raises(ValueError, match=r"all 3 examples of .*rows\.jsonl are dropped: 3: null content"):
        make_instruction(train_files=[file], invalid="drop").prepare_data()


def test_roles_and_keys_of_one_s_own(make_instruction, tmp_path):
    rows = [{"dialogue": [{"who": "me", "text": f"Q{i}"}, {"who": "bot", "text": "A"}]} for i in range(8)]
    settings = {
        "messages_column": "dialogue",
        "roles": {"me": "user", "bot": "assistant"},
        "message_keys": {"role": "who", "content": "text"},
    }
    module = ready(make_instruction(train_files=[write_jsonl(tmp_path / "rows.jsonl", rows)], **settings))
    assert trained_texts(module) == {"A"}


def test_the_form_that_is_set_is_used(make_instruction, tmp_path):
    rows = [{"messages": turns(f"no {i}", "no"), "instruction": "Add", "output": f"{i}"} for i in range(8)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert trained_texts(ready(make_instruction(train_files=[file]))) == {"no"}
    assert trained_texts(ready(make_instruction(train_files=[file], format="alpaca"))) == {str(i) for i in range(8)}
    with pytest.raises(ValueError, match=r"data\.format='csv' must be one of \['messages', 'sharegpt'"):
        make_instruction(train_files=[file], format="csv")


def test_the_form_is_named_in_the_log(make_instruction, tmp_path, caplog):
    with caplog.at_level("INFO"):
        make_instruction(train_files=[write_jsonl(tmp_path / "rows.jsonl", ALPACA)]).prepare_data()
    assert "rows.jsonl: read as alpaca (instruction, output)" in caplog.text


def test_tools_reach_the_template(make_instruction, tmp_path, tokenizer):
    template = "{% for tool in tools or [] %}{{ tool['name'] + ' ' }}{% endfor %}" + tokenizer.chat_template
    rows = [{**row, "tools": json.dumps([{"name": "adder"}])} for row in GOOD]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    module = ready(make_instruction(train_files=[file], chat_template=template))
    assert all(module.tokenizer.decode(row["input_ids"]).startswith("adder <|im_start|>") for row in module.train_set)


def test_a_call_of_a_tool_needs_no_content():
    call = [{"function": {"name": "adder", "arguments": {}}}]
    record = {"messages": [*turns("Hi"), {"role": "assistant", "content": None, "tool_calls": call}]}
    messages = Forms().recognise(record, "a").conversation(record)["messages"]
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": call}
