"""The table at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from upit.report.lineage import origin
from upit.report.model_card import exported


def print_report(
    report: Mapping[str, Any], lineage: list[dict[str, Any]] | None, run: Path, console: Console | None = None
) -> None:
    """Print scores per domain and stage, the experts' lineage with their seed examples, and where things lie."""
    console = console or Console()
    stages = report["stages"]
    table = Table(title="Held-out loss (nats) and exact match")
    table.add_column("domain")
    for stage in stages:
        table.add_column(f"{stage}", justify="right")
    domains = list(next(iter(stages.values()))["domains"]) if stages else []
    for domain in domains:
        table.add_row(domain, *[_cell(scores["domains"][domain]) for scores in stages.values()])
    table.add_section()
    table.add_row("average", *[_cell(scores["average"]) for scores in stages.values()], style="bold")
    console.print(table)

    if lineage and report["seed_counts"]:  # empty until the swap
        experts = Table(title=f"{report['num_experts']} experts, top-{report['top_k']}")
        experts.add_column("expert", justify="right")
        experts.add_column("origin")
        experts.add_column("seed examples", justify="right")
        later = ["–"] * (len(lineage) - len(report["seed_counts"]))  # experts that joined a MoE in training
        for entry, count in zip(lineage, [*report["seed_counts"], *later], strict=True):
            experts.add_row(str(entry["expert"]), origin(entry), str(count))
        console.print(experts)

    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in report["wall_seconds"].items())
    console.print(f"Seconds: {seconds}")
    exports = sorted((path.name for path in run.glob("export*")), key=lambda name: (len(name), name))
    for part in ("report.json", "experts", "upcycling", "growth", "checkpoints", *exports):
        if (run / part).exists():
            console.print(f"{part:12} {run / part}", soft_wrap=True)
    if "export" in report:
        console.print(f"{report['export']['directory']}: {exported(report['export'])}", soft_wrap=True)
    console.print(f"TensorBoard: tensorboard --logdir {run}", soft_wrap=True)
    console.print(f"HTML page:   upit report {run} --output {run / 'report.html'}", soft_wrap=True)


def _cell(scores: Mapping[str, float]) -> str:
    return f"{scores['loss']:.3f}  {scores['exact_match']:6.1%}"
