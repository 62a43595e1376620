"""Export a model in stock transformers format: weights, tokenizer, chat template and a model card."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig

from upit.artefacts import Run, read_report
from upit.checkpoints import config_of, read_identity, read_weights
from upit.config_files import make_portable
from upit.files import FileError, check_output, fresh_directory
from upit.finite import NotFiniteError, not_finite
from upit.generation import exported_generation


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
            :func:`upit.generation.generation_settings`. The export keeps them, and stops at the trained end of turn.
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


def export_checkpoint(
    ckpt_path: str | Path, output: str | Path, *, tokenizer: str | None = None, untie: bool = False
) -> Path:
    """Export the dense or the MoE model of a training checkpoint.

    Args:
        untie: see :func:`export_model`.
        tokenizer: its directory; default ``tokenizer/`` of the run that the checkpoint lies in.
    Raises: FileNotFoundError: no such checkpoint or tokenizer; see also :func:`export_model`.
    """
    ckpt_path, output = Path(ckpt_path), Path(output)
    check_output(output)
    identity = read_identity(ckpt_path)
    run = ckpt_path.resolve().parent.parent
    folder = Path(tokenizer) if tokenizer else run / "tokenizer"
    if not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer at {str(folder)!r}; name its directory with --tokenizer")
    config, weights = config_of(identity), read_weights(ckpt_path)
    own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    card, generation = model_card(identity, run, name=output.name), identity.get("generation")
    try:
        return export_model(config, weights, own, output, card=card, generation=generation, untie=untie)
    except ValueError as error:
        kind = NotFiniteError if isinstance(error, NotFiniteError) else FileError
        raise kind(f"{str(ckpt_path)!r}: {error}") from None


def model_card(identity: Mapping[str, Any], run: Path, *, name: str, weights: Mapping[str, Any] | None = None) -> str:
    """README.md of an exported model: method, lineage, data, metrics so far, how to load.

    Args:
        weights: which weights of the run these are, an entry ``export`` of its report.
    """
    moe = identity["phase"] == "moe"
    kind = f"{identity['num_experts']} experts, top-{identity['top_k']}" if moe else "dense"
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- upit\n"
        + ("- moe\n" if moe else "")
        + "---\n",
        f"# {name}\n",
        f"A {identity['config']['model_type']} causal language model ({kind}), trained for "
        f"{identity['global_step']} optimizer steps with upit: upcycling instruction tuning from dense to "
        "Mixture-of-Experts via parameter merging ([arXiv:2410.01610](https://arxiv.org/abs/2410.01610)).\n",
        *([f"{exported(weights)}.\n"] if weights else []),
        "## Load\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n',
    ]
    grown, lineages = identity.get("growth_step") is not None, Run(run).lineages
    if moe and lineages:
        rows = "\n".join(f"| {entry['expert']} | {origin(entry)} |" for entry in lineages[-1 if grown else 0])
        parts.append(f"## Experts\n| expert | origin |\n|---|---|\n{rows}\n")
    report = read_report(run)
    if report is not None:
        stages = _reached(report["stages"], identity)
        rows = "\n".join(
            f"| {stage} | {scores['average']['loss']:.4f} | {scores['average']['exact_match']:.1%} |"
            for stage, scores in stages.items()
        )
        domains = ", ".join(next(iter(stages.values()))["domains"]) if stages else ""
        parts.append(
            f"## Data and metrics\nHeld-out examples of the domains: {domains}. Averages over the domains.\n\n"
            f"| stage | loss (nats) | exact match |\n|---|---|---|\n{rows}\n"
        )
    return "\n".join(parts)


def exported(weights: Mapping[str, Any]) -> str:
    """Which weights of a run were exported, in words; see ``model_card``."""
    if weights["weights"] == "last":
        return f"The weights are the last ones of the run, of step {weights['step']}"
    return (
        f"The weights are those of step {weights['step']}, the best checkpoint by {weights['monitor']} "
        f"({weights['value']:.4f})"
    )


def _reached(stages: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a run's report that were over when a model of it was saved."""
    later = {"growth"} if identity.get("growth_step") is None else set()
    own = {"base", "dense"} if identity["phase"] == "dense" else {*stages} - later
    return {name: stages[name] for name in stages if name in own and stages[name]["step"] <= identity["global_step"]}


def origin(entry: Mapping[str, Any]) -> str:
    """Where an expert of a lineage comes from, in words."""
    trained = f", post-trained to step {entry['trained_to']}" if "trained_to" in entry else ""
    return _birth(entry) + trained


def _birth(entry: Mapping[str, Any]) -> str:
    kind = entry["kind"]
    if kind == "merged":
        j, k = entry["parents"]
        return f"{entry['alpha']:.2f} x expert {j} + {entry['beta']:.2f} x expert {k}, {in_words(entry['merge'])}"
    place = f" in {entry['path']}" if "path" in entry else ""
    if kind == "harvested":
        return f"checkpoint of step {entry['step']} (epoch {entry['epoch']:.2f}){place}"
    if kind == "base":
        return "the model before instruction tuning"
    if kind == "checkpoint":
        return f"checkpoint{place}"
    return in_words(entry["source"])


def in_words(strategy: Mapping[str, Any]) -> str:
    """A strategy's description in words: its name, and its arguments in brackets."""
    arguments = ", ".join(f"{name} {value}" for name, value in strategy.items() if name != "name")
    return f"{strategy['name']} ({arguments})" if arguments else strategy["name"]
