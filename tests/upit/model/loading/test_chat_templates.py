"""Templates by name, and the training templates of families whose own rewrite earlier turns: renderings as facts."""

import json

import pytest

from datamodules.chat import encode_batch
from datamodules.reasoning_gym import train_tokenizer
from tests.datamodules.conftest import turns
from tests.datamodules.test_chat import responses
from tests.upit.model.test_generation import PHI3_OWN
from upit.model.loading.chat_templates import TEMPLATES, training_template
from upit.model.loading.sources import set_chat_template

# the behaviour of the models' own templates, in short
QWEN3_OWN = (
    "{% set ns = namespace(last_query_index=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last_query_index = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% if loop.index0 > ns.last_query_index %}"
    "{{ '<think>\n' + (m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m['content'] else '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1_OWN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}"
    "{{ '<｜User｜>' + m['content'] }}{% else %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + "
    "'<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
OWN = {"qwen3": QWEN3_OWN, "phi3": PHI3_OWN, "deepseek-r1": R1_OWN}
TALK = turns("Hi", "<think>\nA greeting.\n</think>\n\nHello.", "Why?", "So.")
RENDERED = {
    "qwen3": (
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nA greeting.\n</think>\n\nHello.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>\n"
    ),
    "phi3": (
        "<|user|>\nHi<|end|>\n<|assistant|>\n<think>\nA greeting.\n</think>\n\nHello.<|end|>\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>\nSo.<|end|>\n"
    ),
    "deepseek-r1": (
        "<s><｜User｜>Hi<｜Assistant｜><think>\nA greeting.\n</think>\n\nHello.<｜end▁of▁sentence｜>"
        "<｜User｜>Why?<｜Assistant｜><think>\n\n</think>\n\nSo.<｜end▁of▁sentence｜>"
    ),
}
TRAINED = {
    "qwen3": ["<think>\nA greeting.\n</think>\n\nHello.<|im_end|>", "<think>\n\n</think>\n\nSo.<|im_end|>"],
    "phi3": ["<think>\nA greeting.\n</think>\n\nHello.<|end|>", "So.<|end|>"],
    "deepseek-r1": ["A greeting.\n</think>\n\nHello.<｜end▁of▁sentence｜>", "\n</think>\n\nSo.<｜end▁of▁sentence｜>"],
}


@pytest.fixture
def tokenizer():
    tokenizer = train_tokenizer(["Hi so why not? Hello. A greeting."] * 5, vocab_size=320, chat_template=None)
    tokens = {token for template in TEMPLATES.values() for token in template.tokens} | {"<s>", "</s>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(tokens)})
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


@pytest.mark.parametrize("family", OWN)
def test_a_family_s_training_template_takes_the_place_of_its_own(tokenizer, family):
    tokenizer.chat_template = OWN[family]
    prompts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in (turns("Hi"), turns("Hi", system="Be brief."))
    ]
    with pytest.warns(UserWarning, match=rf"training template '{family}' takes its place.*data\.chat_template=own"):
        set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == TEMPLATES[family].text
    for prompt, messages in zip(prompts, (turns("Hi"), turns("Hi", system="Be brief.")), strict=True):
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == RENDERED[family]
    (example,) = encode_batch(tokenizer, [{"id": "a", "domain": "d", "messages": TALK}], max_length=1000)
    assert responses(example["input_ids"], example["labels"], tokenizer) == TRAINED[family]


def test_a_family_s_own_template_on_request(tokenizer):
    tokenizer.chat_template = QWEN3_OWN
    set_chat_template(tokenizer, "own")
    assert tokenizer.chat_template == QWEN3_OWN
    examples = encode_batch(tokenizer, [{"id": "a", "domain": "d", "messages": TALK}], max_length=1000)
    assert [example["id"] for example in examples] == ["a", "a#2"], "each response as it is generated"


@pytest.mark.parametrize("name", [*TEMPLATES, "own Qwen2.5"])
def test_a_template_that_rewrites_nothing_stays(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name].text if name in TEMPLATES else TEMPLATES["chatml"].text
    assert training_template(tokenizer) is None


def test_a_family_s_template_with_other_prompts_stays(tokenizer):
    tokenizer.chat_template = QWEN3_OWN.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    assert training_template(tokenizer) is None


def test_qwen3_s_tools_calls_and_reasoning(tokenizer):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "reasoning_content": "Add.",
         "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "3.0"},
        {"role": "assistant", "content": "3"},
    ]  # fmt: skip
    tokenizer.chat_template = TEMPLATES["qwen3"].text
    assert tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
        "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{json.dumps(tool)}\n</tools>\n\nFor each function call, return a json object with function name and "
        'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
        "<args-json-object>}\n</tool_call><|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nAdd.\n</think>\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n3.0\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n3<|im_end|>\n"
    )


def test_templates_by_name(tokenizer):
    for name, template in TEMPLATES.items():
        set_chat_template(tokenizer, name)
        assert tokenizer.chat_template == template.text
    with pytest.raises(ValueError, match=r"data\.chat_template='lama3' is neither Jinja.* nor one of \['chatml'"):
        set_chat_template(tokenizer, "lama3")


def test_a_name_whose_tokens_are_missing_is_refused():
    tokenizer = train_tokenizer(["Hi"] * 5, vocab_size=300, chat_template=None)
    with pytest.raises(ValueError, match=r"'llama3' needs tokens .* lacks: \['<\|begin_of_text\|>'.*'chatml'.* fit"):
        set_chat_template(tokenizer, "llama3")


def test_a_tokenizer_with_several_templates(tokenizer, tmp_path):
    from upit.model.loading.sources import load_tokenizer

    plain, tools = TEMPLATES["chatml"].text, TEMPLATES["qwen3"].text
    tokenizer.chat_template = {"default": plain, "tool_use": tools}
    tokenizer.save_pretrained(tmp_path)
    row = {"id": "a", "domain": "d", "messages": turns("Hi", "So.")}
    loaded = load_tokenizer(str(tmp_path))
    plain_text, tool_text = (
        loaded.decode(encode_batch(loaded, [{**row, **more}], max_length=1000)[0]["input_ids"])
        for more in ({}, {"tools": [{"name": "add"}]})
    )
    assert "# Tools" in tool_text
    assert "<think>" not in plain_text
    assert load_tokenizer(str(tmp_path), chat_template="tool_use").chat_template == tools
    tokenizer.chat_template = {"short": plain, "tool_use": tools}
    with pytest.raises(ValueError, match=r"several chat templates; set .* to one of \['short', 'tool_use'\]"):
        set_chat_template(tokenizer, None)
