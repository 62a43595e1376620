"""Response masks on the templates that are out there, by marks and by prefixes."""

import warnings

import pytest
from tokenizers import processors

from datamodules.chat import check_template, encode, encode_batch, warn_without_end
from datamodules.reasoning_gym import train_tokenizer
from tests.datamodules.conftest import turns
from upit.core.batches import IGNORE
from upit.model.loading.chat_templates import CHATML

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


def tokenise(tokenizer, messages) -> tuple[list[int], list[int]]:
    example = encode(tokenizer, {"id": "a", "domain": "d", "messages": messages}, max_length=1000)
    return example["input_ids"], example["labels"]


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


def test_a_response_that_later_turns_rewrite_gets_an_example_of_its_own(tokenizer):
    tokenizer.chat_template = FORGETS_REASONING
    assert responses(*tokenise(tokenizer, ONE), tokenizer) == ["Paris.<|im_end|>"]
    thinking = turns("Hi", "<think>so</think>Yes.", "Why?", "Because.")
    whole, first = encode_batch(tokenizer, [{"id": "a", "domain": "d", "messages": thinking}], max_length=1000)
    assert (whole["id"], first["id"]) == ("a", "a#2")
    assert responses(whole["input_ids"], whole["labels"], tokenizer) == ["Because.<|im_end|>"]
    assert responses(first["input_ids"], first["labels"], tokenizer) == ["<think>so</think>Yes.<|im_end|>"]
    for example, upto in ((whole, 3), (first, 1)):
        assert example["input_ids"][: example["prompt_length"]] == prompt_ids(tokenizer, thinking[:upto])


def prompt_ids(tokenizer, messages) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


ANSWER_SPACE = (  # ends a prompt with a space, which merges with the answer's first letters
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Question: ' + m['content'] + ' Answer: ' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
ANSWER_SPACE_MARKED = ANSWER_SPACE.replace(
    "{{ m['content'] + eos_token }}", "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
)


@pytest.fixture(scope="module")
def merging():
    """A tokenizer with a token for a space and a word, and for two newlines."""
    text = "Question: what is so? Answer: so is it Answer: 42 words\n\n so\n\n"
    return train_tokenizer([text] * 20, vocab_size=340, chat_template=CHATML)


@pytest.mark.parametrize("template", [ANSWER_SPACE, ANSWER_SPACE_MARKED])
def test_a_response_that_merges_with_its_prompt_is_tokenised_apart(merging, template):
    merging.chat_template = template
    messages = turns("what is so?", "so is it")
    whole = merging(merging.apply_chat_template(messages, tokenize=False))["input_ids"]
    example = encode(merging, {"id": "a", "domain": "d", "messages": messages}, max_length=1000)
    prompt = prompt_ids(merging, messages[:1])
    assert whole[: len(prompt)] != prompt, "the two would merge"
    assert example["input_ids"][: example["prompt_length"]] == prompt
    assert responses(example["input_ids"], example["labels"], merging) == ["so is it<|im_end|>"]
    assert example["merged"] == 1


@pytest.mark.parametrize("template", [ANSWER_SPACE, ANSWER_SPACE_MARKED])
def test_of_several_responses_that_merge_each_follows_its_prompt_as_at_inference(merging, template):
    merging.chat_template = template
    messages = turns("what is so?", "so is it", "is it so?", "words")
    examples = encode_batch(merging, [{"id": "a", "domain": "d", "messages": messages}], max_length=1000)
    assert [example["id"] for example in examples] == ["a", "a#2"]
    for example, upto, answer in zip(examples, (3, 1), ("words", "so is it"), strict=True):
        assert example["input_ids"][: example["prompt_length"]] == prompt_ids(merging, messages[:upto])
        assert responses(example["input_ids"], example["labels"], merging) == [f"{answer}<|im_end|>"]
        assert (example["answer"], example["merged"]) == (answer, 1)


@pytest.mark.parametrize("marked", [False, True])
def test_an_answer_that_begins_with_a_newline(merging, marked):
    merging.chat_template = CHATML if marked else CHATML_PLAIN
    messages = turns("so?", "\n42")
    example = encode(merging, {"id": "a", "domain": "d", "messages": messages}, max_length=1000)
    assert example["input_ids"][: example["prompt_length"]] == prompt_ids(merging, messages[:1])
    assert responses(example["input_ids"], example["labels"], merging) == ["\n42<|im_end|>"]
    assert example["merged"] == 1
    plain = encode(merging, {"id": "a", "domain": "d", "messages": turns("so?", "42")}, max_length=1000)
    assert plain["merged"] == 0


@pytest.mark.parametrize("template", [CHATML, CHATML_PLAIN, ANSWER_SPACE, ANSWER_SPACE_MARKED])
@pytest.mark.parametrize("answer", ["so  ", "  so", "so is it", "so 🙂", "🙂", "中文", " "])
def test_trimmed_offsets_lose_no_token(merging, template, answer):
    """``processors.ByteLevel()`` leaves spaces out of the offsets; marks and prefixes must not mind."""
    merging.chat_template = template
    row = {"id": "a", "domain": "d", "messages": turns("so?", answer, "what is so?", answer)}
    expected = encode_batch(merging, [row], max_length=1000)
    backend = merging.backend_tokenizer
    before = backend.post_processor
    try:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        assert encode_batch(merging, [row], max_length=1000) == expected
    finally:
        backend.post_processor = before or processors.Sequence([])
    trained = [text for e in expected for text in responses(e["input_ids"], e["labels"], merging)]
    assert trained == [f"{answer}<|im_end|>"] * 2


def test_a_batch_gives_what_its_rows_give_alone(tokenizer):
    rows = [{"id": f"r{i}", "domain": "d", "messages": m} for i, m in enumerate([ONE, THREE, turns("Hi", "Yes")])]
    assert encode_batch(tokenizer, rows, max_length=40) == [encode(tokenizer, row, max_length=40) for row in rows]


def test_a_response_of_weight_zero_is_not_trained(tokenizer):
    messages = turns("Hi", "bad", "Again", "good")
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    for template in (CHATML, CHATML_PLAIN):
        tokenizer.chat_template = template
        assert responses(*tokenise(tokenizer, messages), tokenizer) == ["good<|im_end|>"]
    messages[3]["weight"] = 0
    example = encode(tokenizer, {"id": "a", "domain": "d", "messages": messages}, max_length=1000)
    assert example["reason"] == "no response"


def test_a_conversation_that_the_template_refuses_is_named_or_left_out(tokenizer):
    tokenizer.chat_template = (
        "{{ raise_exception('no system here') if messages[0]['role'] == 'system' }}" + CHATML_PLAIN
    )
    good = {"id": "d.jsonl:1", "domain": "d", "messages": ONE}
    bad = {"id": "d.jsonl:2", "domain": "d", "messages": turns("Hi", "Yes", system="Be brief.")}
    with pytest.raises(ValueError, match=r"d\.jsonl:2: the chat template refuses the conversation: no system here"):
        encode_batch(tokenizer, [good, bad], max_length=100)
    first, second = encode_batch(tokenizer, [good, bad], max_length=100, invalid="drop")
    assert first["reason"] == "" != second["reason"]
    assert second["input_ids"] == second["labels"] == []


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Hello.", "ignores the messages"),
        ("{{ messages|length }}", "ignores the messages"),
        ("{{ messages[0]['content'] }}{{ 1 // 0 }}", "can't be rendered.*division"),
        ("{{ messages[0]['content'] }}" + LOOPS, "can't be rendered: it takes more than 0.2 s"),
    ],
    ids=["constant", "count", "division", "loop"],
)
def test_a_template_that_cannot_be_trained_on_is_refused(tokenizer, monkeypatch, template, message):
    monkeypatch.setattr("datamodules.chat.TEMPLATE_SECONDS", 0.2)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"chat template {message}.*data\.chat_template"):
        check_template(tokenizer)


CONTENT_MARKED = CHATML_PLAIN.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}",
)
GLM = (  # the next role closes a turn
    "{% for m in messages %}{{ '<|begin_of_text|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|begin_of_text|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [CONTENT_MARKED, GLM], ids=["marks", "no closing"])
def test_a_template_that_trains_no_end_of_turn_is_named_in_a_warning(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.warns(UserWarning, match=r"mine\.jinja never trains an end of turn.*data\.chat_template"):
        warn_without_end(tokenizer, "mine.jinja")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_trains_its_end_of_turn_gets_no_warning(tokenizer, name):
    tokenizer.chat_template, _ = TEMPLATES[name]
    tokenizer.eos_token = "<|pad|>"  # a base model's: not what the template ends turns with
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_end(tokenizer, name)


def test_turns_of_the_built_in_chatml_are_separated_by_a_newline(tokenizer):
    tokenizer.chat_template = CHATML
    assert tokenizer.apply_chat_template(turns("Hi", "Yes"), tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    )


def test_the_first_token_is_never_a_target(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    _, labels = tokenise(tokenizer, turns("", "Paris."))
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
