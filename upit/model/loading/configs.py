"""Configs of dense checkpoint directories, and of the MoE that they become, in plain types; and how they are written.

transformers reads a config almost four times as fast where there is no torch (docs/performance.md). So a process that
has not imported it yet lets another one read, which is told that there is none.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from upit.model.families import moe_config

Fields = dict[str, Any]


class Configs(NamedTuple):
    """What config.json says, and the defaults of what it leaves out."""

    dense: SimpleNamespace
    others: list[SimpleNamespace]
    moe: SimpleNamespace
    moe_file: Fields  # as it stands in config.json, but for the dtype


def read_configs(base: Path, others: Sequence[Path], *, num_experts: int = 0, top_k: int = 0) -> Configs:
    """Read a dense model's config and others, and make that of the MoE.

    Args:
        num_experts, top_k: of the MoE; without them its config is empty.
    Raises: ValueError: a directory holds no config, or the dense one can't be upcycled; top_k out of range.
    """
    question: list[Any] = [str(base), [str(path) for path in others], num_experts, top_k]
    dense, *found, moe, moe_file = _read(*question) if "transformers" in sys.modules else _ask(question)
    return Configs(
        SimpleNamespace(**dense), [SimpleNamespace(**own) for own in found], SimpleNamespace(**moe), moe_file
    )


TOKENIZER_FILES = (  # of tokenizers, sentencepiece, tiktoken and Mistral, and a tokenizer's own class
    "tokenizer*",
    "tokenization_*.py",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model's tokenizer files, chat templates and generation config from one directory to another."""
    for file in sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()}):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)


def make_portable(directory: Path) -> None:
    """Rewrite config.json and tokenizer_config.json so that transformers 4 and what is built on it read them too.

    transformers 5 loads the same model and tokenizer from the rewritten files. Every writer of a model calls this.

    Args:
        directory: of a model as transformers 5 writes it; a file that is not there is left out.
    """
    for name, portable in (("config.json", _portable_config), ("tokenizer_config.json", _portable_tokenizer)):
        file = directory / name
        if file.exists():
            fields = portable(json.loads(file.read_text()))
            file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _portable_config(fields: Fields) -> Fields:
    """transformers 4 has ``rope_theta`` and ``rope_scaling`` for ``rope_parameters``, and only ``num_experts``.

    Mixtral alone has ``num_local_experts`` there. Without the old fields it takes its own defaults, and says nothing.
    """
    scaling = dict(fields.get("rope_parameters") or {})
    added: Fields = {}
    if "rope_theta" in scaling:
        added["rope_theta"] = scaling.pop("rope_theta")
        added["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if "num_local_experts" in fields:
        added["num_experts"] = fields["num_local_experts"]
    return fields | added


def _portable_tokenizer(fields: Fields) -> Fields:
    """transformers 4 knows ``TokenizersBackend`` as ``PreTrainedTokenizerFast``, and takes no list of extra tokens."""
    fields = dict(fields)
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    return fields


def _ask(question: list[Any]) -> list[Fields]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__, json.dumps(question)],
        stdout=subprocess.PIPE,
        check=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),  # the same packages as here
            "TRANSFORMERS_VERBOSITY": "error",  # it would warn that there is no torch
        },
    )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def _read(base: str, others: list[str], num_experts: int, top_k: int) -> list[Fields]:
    from transformers import AutoConfig

    dense, *found = [AutoConfig.from_pretrained(path, trust_remote_code=False) for path in (base, *others)]
    plain = [_plain(config) for config in (dense, *found)]
    if not num_experts:
        return [*plain, {}, {}]
    moe = moe_config(dense, num_experts=num_experts, top_k=top_k)
    moe.architectures = [type(moe).__name__.replace("Config", "ForCausalLM")]
    return [*plain, _plain(moe), _plain(moe, use_diff=True)]


def _plain(config, *, use_diff: bool = False) -> Fields:
    return json.loads(config.to_json_string(use_diff=use_diff))


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        print(json.dumps(_read(*json.loads(sys.argv[1]))))
    except (OSError, ValueError) as error:
        print(json.dumps({"error": str(error)}))
