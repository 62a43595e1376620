"""``upit inspect``: what a run, a pool, a checkpoint or a model holds. Imports nothing heavy until it runs."""

from __future__ import annotations

from pathlib import Path

from upit.offline.terminal import bar


def inspect(path: str) -> None:
    """Show what a run, a pool, a training checkpoint or a model directory holds.

    Pools: experts, their origins and similarity. Runs: these, and lineage, seed examples and scores. Checkpoints:
    phase, step and architecture. Models: sizes, and of a MoE how far its gates' rows and its experts differ in each
    layer.

    Args:
        path: run's folder, pool, checkpoint, or model directory.
    """
    from rich.console import Console

    from upit.report.inspection import inspect as show

    show(Path(path), Console(), track=lambda layers: bar(layers, "Comparing experts"))
