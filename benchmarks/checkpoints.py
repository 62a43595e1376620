"""Make a base and 8 checkpoints of SmolLM2-135M's shape: random weights, each a small random step further.

python -m benchmarks.checkpoints FOLDER
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CONFIG = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
    vocabulary = {f"<{i}>": i for i in range(CONFIG.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), eos_token="<2>")
    for i in range(9):
        name = f"step_{i}" if i else "base"
        if i:
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(torch.randn_like(param), alpha=2e-3)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where they go: 2.4 GB")
    main(parser.parse_args().folder)
