"""Export a model in stock transformers format: weights, tokenizer, chat template and a model card."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from upit.core.files import fresh_directory
from upit.core.finite import NotFiniteError, not_finite
from upit.model.generation import exported_generation
from upit.model.loading.configs import make_portable


def export_model(
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    tokenizer,
    output: str | Path,
    *,
    card: str,
    generation: Mapping[str, Any] | None = None,
    untie: bool = False,
) -> Path:
    """Write a model that stock ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        config: of a dense or a MoE family.
        weights: state dict, its names as in transformers.
        output: a directory that does not exist or is empty; it appears only when complete.
        card: text of the README.md.
        generation: generation settings of the model that training started from, see
            :func:`upit.model.generation.generation_settings`. The export keeps them, and stops at the trained end of
            turn.
        untie: write a head of its own where the config ties it to the embedding; some clients need one.
    Raises:
        FileExistsError: the output is not empty.
        NotFiniteError: a weight is NaN or infinite.
        ValueError: a weight is missing or unexpected.
    """
    output = Path(output)
    if broken := not_finite(weights):
        raise NotFiniteError(
            f"{len(broken)} of {len(weights)} weights hold NaN or infinity, the first is {broken[0]!r}: training "
            "diverged. Nothing is exported; export an earlier checkpoint"
        )
    if untie and config.tie_word_embeddings:
        config, weights = _untied(config, weights)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model._tied_weights_keys or {}) if config.tie_word_embeddings else set()
    weights = {name: tensor for name, tensor in weights.items() if name not in tied}
    missing, unexpected = model.load_state_dict(weights, assign=True, strict=False)
    if set(missing) - tied or unexpected:
        raise ValueError(
            f"the weights don't fit the config: missing {sorted(set(missing) - tied)}, unexpected {unexpected}"
        )
    model.tie_weights()
    model.generation_config = GenerationConfig()
    model.config.dtype = next(iter(weights.values())).dtype
    settings = exported_generation(generation or {}, tokenizer)
    with fresh_directory(output) as directory:
        model.save_pretrained(directory)
        # transformers refuses to save some settings that published models have (a temperature without do_sample)
        (directory / "generation_config.json").write_text(settings.to_json_string())
        tokenizer.save_pretrained(directory)
        make_portable(directory)
        (directory / "README.md").write_text(card)
    return output


def _untied(config: PretrainedConfig, weights: Mapping[str, Tensor]) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """The same model with a head of its own, which holds a copy of the embedding."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
