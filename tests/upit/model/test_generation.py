"""Greedy answers stop at the end of turn, and are plain whatever the model's own settings; the export keeps those."""

import pytest
import torch
from transformers import GenerationConfig

from tests.conftest import TINY
from upit.model.generation import closing, exported_generation, generation_settings, greedy_answers, stop_ids
from upit.model.loading.build import build, scratch_config
from upit.model.loading.chat_templates import CHATML, GEMMA, PHI3

PHI3_OWN = (  # writes eos at the end of a conversation, which no generation reaches
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
LEAKS = [SAMPLING, {"repetition_penalty": 1.9}, {"no_repeat_ngram_size": 1}, {"eos_token_id": list(range(3, 300))},
         {"min_new_tokens": 9}, {"suppress_tokens": list(range(3, 200))}, {"num_beams": 3}]  # fmt: skip


@pytest.fixture
def base_tokenizer(data):
    """A base model's tokenizer: its eos token is not what the template ends turns with."""
    tokenizer = data.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|end|>", "<end_of_turn>"]})
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (PHI3, "<|end|>"), (PHI3_OWN, "<|end|>"), (GEMMA, "<end_of_turn>")],
    ids=["qwen2.5", "phi3", "phi3's own", "gemma"],
)
def test_the_end_of_turn_is_found_in_the_template(base_tokenizer, template, end):
    base_tokenizer.chat_template = template
    ids = base_tokenizer.convert_tokens_to_ids([end, "<|endoftext|>"])
    assert closing(base_tokenizer).token == ids[0]
    assert stop_ids(base_tokenizer) == ids


def test_a_template_without_an_end_of_turn_leaves_eos(base_tokenizer):
    base_tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert closing(base_tokenizer).token is None
    assert stop_ids(base_tokenizer) == [base_tokenizer.eos_token_id]


@pytest.fixture
def model(data):
    torch.manual_seed(3)
    return build(scratch_config({**TINY, "initializer_range": 0.3}, data.tokenizer)).eval()


@pytest.mark.parametrize("settings", LEAKS, ids=lambda settings: next(iter(settings)))
def test_answers_are_plain_greedy_whatever_the_model_s_settings(model, data, settings):
    prompts = [row["input_ids"][: row["prompt_length"]] for row in data.heldout_set[:3]]
    expected = greedy_answers(model, data.tokenizer, prompts, max_new_tokens=[12] * 3)
    model.generation_config = GenerationConfig(**settings)
    assert greedy_answers(model, data.tokenizer, prompts, max_new_tokens=[12] * 3) == expected
    assert {name: getattr(model.generation_config, name) for name in settings} == settings, "kept for the export"


def test_an_answer_stops_at_the_template_s_end_of_turn(model, data, base_tokenizer):
    end = base_tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = data.heldout_set[0]["input_ids"][: data.heldout_set[0]["prompt_length"]]
    script = [*base_tokenizer("so")["input_ids"], end, *base_tokenizer("and on")["input_ids"]]
    calls = iter(script + [end] * 20)
    original = model.forward

    def scripted(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits[:, -1] = torch.nn.functional.one_hot(torch.tensor(next(calls)), output.logits.shape[-1]).float()
        return output

    model.forward = scripted
    assert greedy_answers(model, base_tokenizer, [prompt], max_new_tokens=[len(script)]) == ["so"]


def test_an_export_keeps_the_source_s_settings_and_stops_at_the_end_of_turn(base_tokenizer):
    end, eos = stop_ids(base_tokenizer)
    source = generation_settings(GenerationConfig(**SAMPLING, repetition_penalty=1.1, eos_token_id=[eos, 7]))
    config = exported_generation(source, base_tokenizer)
    assert config.eos_token_id == [end, eos, 7]
    assert {name: getattr(config, name) for name in SAMPLING} == SAMPLING
    assert config.repetition_penalty == 1.1
    assert config.pad_token_id == base_tokenizer.pad_token_id
