"""Configs read in another process, without torch, are those read here; written ones suit transformers 4 too."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from tests.upit.tiny import dense_config, dense_model
from upit.model.families import FAMILIES, moe_config
from upit.model.loading.configs import make_portable, read_configs

ALONE = """
import sys
from pathlib import Path
from upit.model.loading.configs import read_configs
print(read_configs(Path(sys.argv[1]), [Path(sys.argv[2])], num_experts=4, top_k=2))
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_another_process_reads_the_same(tmp_path):
    paths = [tmp_path / family for family in ("qwen2", "olmo2")]
    for path in paths:
        dense_model(path.name).save_pretrained(path)
    done = subprocess.run([sys.executable, "-c", ALONE, *paths], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == str(read_configs(paths[0], paths[1:], num_experts=4, top_k=2))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [None, {"rope_type": "llama3", **LLAMA3}, {"rope_type": "linear", "factor": 2.0}]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["default", "llama3", "linear"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_config_has_the_fields_of_transformers_4_and_still_those_of_5(family, scaling, tmp_path):
    rope = {"rope_theta": 12345.0, **(scaling or {"rope_type": "default"})}
    dense = dense_config(family, rope_parameters=rope)
    for config in (dense, moe_config(dense, num_experts=3, top_k=2)):
        directory = tmp_path / config.model_type
        config.save_pretrained(directory)
        before = AutoConfig.from_pretrained(directory)
        make_portable(directory)
        written = json.loads((directory / "config.json").read_text())
        assert written["rope_theta"] == 12345.0
        assert written["rope_scaling"] == scaling
        assert (written.get("num_experts"), config is dense) in [(3, False), (None, True)]
        assert AutoConfig.from_pretrained(directory).to_dict() == before.to_dict()
        make_portable(directory)
        assert json.loads((directory / "config.json").read_text()) == written


def test_a_tokenizer_has_a_class_of_transformers_4_and_stays_itself(tmp_path):
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="b")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    make_portable(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<call>"]
    assert "extra_special_tokens" not in written  # a list of them fails in transformers 4
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a b<call>")["input_ids"] == tokenizer("a b<call>")["input_ids"]
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.chat_template == tokenizer.chat_template
