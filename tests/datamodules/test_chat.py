"""Response masks on the templates that are out there, by marks and by prefixes."""

import pytest

from datamodules.chat import CHATML, encode, tokenise
from tests.datamodules.conftest import turns
from upit.examples import IGNORE

# ChatML without marks
CHATML_PLAIN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# the same text again, marked
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# SmolLM2's and Qwen2.5's way: a system message where none is given
CHATML_DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
)
# Qwen3's way: reasoning is cut from earlier turns
FORGETS_REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "ours": (CHATML, "{}<|im_end|>"),
    "chatml_marked": (CHATML_MARKED, "{}<|im_end|>"),
    "chatml_plain": (CHATML_PLAIN, "{}<|im_end|>"),
    "chatml_default_system": (CHATML_DEFAULT_SYSTEM, "{}<|im_end|>"),
    "llama3": (LLAMA3, "{}<|eot_id|>"),
    "mistral": (MISTRAL, " {}</s>"),
}
ONE = turns("What is the capital of France?", "Paris.")
THREE = turns("What is 12 + 30?", "42", "Why? Überprüfe 中文!", "Because it is so.\nReally.", "And?", "So.")


def responses(ids, labels, tokenizer) -> list[str]:
    """Text of each run of labels."""
    runs: list[list[int]] = []
    for i, label in enumerate(labels):
        if label != IGNORE:
            assert label == ids[i]
            runs += [[]] if labels[i - 1] == IGNORE else []
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "messages", [ONE, THREE, turns("Hi", "Yes.", system="Be brief.")], ids=["one", "three", "system"]
)
def test_the_mask_is_each_response_and_its_end_of_turn(tokenizer, name, messages):
    tokenizer.chat_template, shape = TEMPLATES[name]
    ids, labels = tokenise(tokenizer, messages)
    expected = [shape.format(message["content"]) for message in messages if message["role"] == "assistant"]
    assert responses(ids, labels, tokenizer) == expected
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("messages", [ONE, THREE])
def test_marks_and_prefixes_agree(tokenizer, messages):
    tokenizer.chat_template = CHATML_MARKED
    marked = tokenise(tokenizer, messages)
    tokenizer.chat_template = CHATML_PLAIN
    assert tokenise(tokenizer, messages) == marked


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_begins_where_a_generation_begins(tokenizer, name):
    tokenizer.chat_template, _ = TEMPLATES[name]
    row = {"id": "a", "domain": "d", "messages": THREE}
    example = encode(tokenizer, row, max_length=1000)
    prompt = tokenizer.apply_chat_template(THREE[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example["input_ids"][: example["prompt_length"]] == prompt
    assert example["answer"] == "So."
    assert not example["cut"]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_remedy(tokenizer):
    tokenizer.chat_template = FORGETS_REASONING
    assert responses(*tokenise(tokenizer, ONE), tokenizer) == ["Paris.<|im_end|>"]
    thinking = turns("Hi", "<think>so</think>Yes.", "Why?", "Because.")
    with pytest.raises(ValueError, match=r"earlier turns otherwise.*\{% generation %\}.*data\.chat_template"):
        tokenise(tokenizer, thinking)


def test_the_first_token_is_never_a_target(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    _, labels = tokenise(tokenizer, [{"role": "assistant", "content": "Paris."}])
    assert labels[0] == IGNORE
    assert labels[-1] != IGNORE


def test_an_example_is_cut_at_its_end(tokenizer):
    row = {"id": "a", "domain": "d", "messages": ONE, "metadata": "m"}
    whole = encode(tokenizer, row, max_length=1000)
    length = len(whole["input_ids"])
    assert not encode(tokenizer, row, max_length=length)["cut"]
    cut = encode(tokenizer, row, max_length=length - 2)
    assert cut["cut"]
    assert cut["input_ids"] == whole["input_ids"][:-2]
    assert cut["labels"] == whole["labels"][:-2]
    assert cut["prompt_length"] == whole["prompt_length"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_reference_answer_is_that_of_the_last_response_left(tokenizer, name):
    tokenizer.chat_template, _ = TEMPLATES[name]
    whole = encode(tokenizer, {"id": "a", "domain": "d", "messages": THREE}, max_length=1000)
    for max_length in range(whole["prompt_length"] + 1, 0, -1):
        example = encode(tokenizer, {"id": "a", "domain": "d", "messages": THREE}, max_length=max_length)
        found = responses(example["input_ids"], example["labels"], tokenizer)
        if found:
            assert example["answer"] == [message["content"] for message in THREE[1::2]][len(found) - 1]
        else:
            assert example["answer"] == ""


def test_a_conversation_that_ends_with_a_question_is_scored_on_its_last_response(tokenizer):
    tokenizer.chat_template = CHATML
    messages = turns("Hi", "Yes.", "Why?")
    example = encode(tokenizer, {"id": "a", "domain": "d", "messages": messages}, max_length=1000)
    assert example["answer"] == "Yes."
