"""The model card of an exported model: its README.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upit.report.lineage import origin
from upit.report.run import Run, read_report


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
