"""Chat templates by name, with generation marks: for tokenizers without one, and in place of those that can't be used.

The templates of some models rewrite earlier turns once later ones follow, or add text at the end of a conversation.
The training templates here give every turn of those models the form that it has as the last one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jinja2 import TemplateError


class Template(NamedTuple):
    """A chat template, and the special tokens that a tokenizer needs for it."""

    text: str
    tokens: tuple[str, ...]


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' }}{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}"
    "{% endif %}{{ message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% elif not loop.first or message['role'] != 'system' %}{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<start_of_turn>model\n' }}{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}"
    "{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ '<start_of_turn>user\n' }}{% if loop.index0 == 1 and "
    "messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim + '\n\n' }}{% endif %}"
    "{{ message['content'] | trim + '<end_of_turn>' }}{% elif not loop.first or message['role'] != 'system' %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% if message['role'] != 'system' %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (  # Phi-3's own also writes <|endoftext|> at the end of a conversation
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_THINKING = (  # sets thought and said from a message's reasoning_content, or from <think> in its content
    "{% set said = message['content'] if message['content'] is string else '' %}{% set thought = '' %}"
    "{% if message['reasoning_content'] is string %}{% set thought = message['reasoning_content'] | trim('\n') %}"
    "{% elif '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1] | trim('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_QWEN3_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ '# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>' }}"
    "{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n' }}"
    "{% elif messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% endif %}"
)
QWEN3 = (  # Qwen3's own takes the reasoning out of all turns but the last
    _QWEN3_TOOLS + "{% for message in messages %}{% if message['role'] == 'assistant' %}" + _THINKING + ""
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ '<think>\n' + thought + '\n</think>\n\n' + said }}"
    "{% for call in message['tool_calls'] or [] %}{% set call = call['function'] or call %}"
    "{{ '\n' if said or not loop.first else '' }}"
    "{{ '<tool_call>\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' }}"
    "{{ call['arguments'] if call['arguments'] is string else call['arguments'] | tojson }}{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{% if loop.first or loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif message['role'] == 'user' or not loop.first %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
DEEPSEEK_R1 = (  # DeepSeek-R1's own takes the reasoning out of every turn, though its generation prompt begins it
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + _THINKING + "{{ '<｜Assistant｜><think>\n' }}"
    "{% generation %}{{ thought + '\n</think>\n\n' + said + '<｜end▁of▁sentence｜>' }}{% endgeneration %}"
    "{% elif not loop.first or message['role'] != 'system' %}{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": Template(CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": Template(LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": Template(MISTRAL, ()),
    "gemma": Template(GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "zephyr": Template(ZEPHYR, ()),
    "phi3": Template(PHI3, ("<|user|>", "<|assistant|>", "<|end|>")),
    "qwen3": Template(QWEN3, ("<|im_start|>", "<|im_end|>")),
    "deepseek-r1": Template(DEEPSEEK_R1, ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")),
}
FAMILIES = {  # texts in a model's own template by which its training template is chosen
    "qwen3": ("<|im_start|>", "</think>", "last_query_index"),
    "phi3": ("<|end|>", "<|assistant|>", "eos_token"),
    "deepseek-r1": ("<｜Assistant｜>", "</think>"),
}


def named_template(name: str, tokenizer) -> str:
    """The template of a name: one that ships with the tokenizer, or one of ``TEMPLATES``.

    Raises: ValueError: the tokenizer lacks the template's special tokens; names them.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict) and name in own:
        return own[name]
    template = TEMPLATES[name]
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in template.tokens if token not in vocabulary]:
        fitting = sorted(other for other, (_, tokens) in TEMPLATES.items() if all(t in vocabulary for t in tokens))
        raise ValueError(
            f"data.chat_template={name!r} needs tokens that the tokenizer lacks: {missing}; {fitting} fit"
        )
    return template.text


def training_template(tokenizer) -> str | None:
    """Name of the training template of a tokenizer's model family; None where its own template serves.

    It is given only where the own one shows earlier turns otherwise than later prompts do, or a response otherwise
    than its generation prompt, and where the two agree about the prompts of a conversation's first response.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str) or "generation %}" in own or not _rewrites(tokenizer):
        return None
    for name, marks in FAMILIES.items():
        if all(mark in own for mark in marks) and _same_prompts(tokenizer, own, TEMPLATES[name].text):
            return name
    return None


def _turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def _rewrites(tokenizer) -> bool:
    """Whether a response in a conversation is not what was generated behind its prompt, as far as a probe tells."""

    def text(messages: list[dict[str, str]], prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    two = _turns("Hi", "<think>\nA\n</think>\n\nYes", "Why?", "<think>\nB\n</think>\n\nSo")
    try:
        whole = text(two)
        earlier = [text(two[:1], prompt=True), text(two[:3], prompt=True), text(two[:2]).rstrip("\n")]
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError):
        return False
    return not all(whole.startswith(part) for part in earlier)


def _same_prompts(tokenizer, one: str, other: str) -> bool:
    system: list[Mapping[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for messages in (_turns("Hi"), [*system, *_turns("Hi")]):
        texts = {
            tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
            for template in (one, other)
        }
        if len(texts) > 1:
            return False
    return True
