"""One run's loss with its phases, the swap, and runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from upit.figures.base import MARKERS, canvas, colours, extent

Curves = Mapping[str, tuple[list[int], list[float]]]
TRAIN, HELDOUT = "train/loss", "val/loss"


def loss_figure(curves: Curves, swap_step: int | None) -> Figure:
    """Training and held-out loss over the whole run, the held-out loss per domain, and where the swap was."""
    domains = sorted(name for name in curves if name.startswith(f"{HELDOUT}/"))
    figure = canvas(9.0, 4.2)
    axes = figure.subplots()
    if TRAIN in curves:
        axes.plot(*curves[TRAIN], color="0.6", linewidth=0.9, label="training")
    if HELDOUT in curves:
        axes.plot(*curves[HELDOUT], color="black", linewidth=2.2, label="held out")
    for i, (name, colour) in enumerate(zip(domains, colours(len(domains)), strict=True)):
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(*curves[name], color=colour, marker=marker, markersize=3.5, linewidth=1.1, label=name.split("/")[2])
    _mark_swap(axes, swap_step)
    _loss_axes(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _mark_swap(axes: Axes, step: int | None) -> None:
    if step is None:
        return
    axes.axvline(step, color="#D55E00", linestyle="--", linewidth=1.4)
    for text, side in (("dense ", "right"), (" MoE", "left")):
        axes.annotate(
            text, (step, 1.0), xycoords=("data", "axes fraction"), ha=side, va="bottom", fontsize=9, color="#D55E00"
        )


def _loss_axes(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=7)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token, log scale)")
    axes.grid(alpha=0.25, which="both")


def swap_figure(before: Mapping[str, float], after: Mapping[str, float], kl: float) -> Figure:
    """Held-out loss of each domain right before and right after the swap, and the drift of the logits."""
    domains = list(before)
    figure = canvas(7.5, max(2.4, 0.42 * len(domains) + 1.3))
    axes = figure.subplots()
    rows = np.arange(len(domains))
    blue, orange = colours(2)
    axes.barh(rows - 0.2, [before[name] for name in domains], height=0.38, color=blue, label="dense, before")
    axes.barh(rows + 0.2, [after[name] for name in domains], height=0.38, color=orange, label="MoE, after")
    for row, name in enumerate(domains):
        axes.text(after[name], row + 0.2, f" {after[name] - before[name]:+.4f}", va="center", fontsize=8)
    axes.set_yticks(rows, domains)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel("held-out loss (nats per token)")
    axes.set_title(f"the swap: KL(before || after) of the logits {kl:.2e} nats", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def compared_losses(runs: Mapping[str, Curves]) -> Figure:
    """Held-out loss of several runs in one picture."""
    figure = canvas(9.0, 4.0)
    axes = figure.subplots()
    for i, ((name, curves), colour) in enumerate(zip(runs.items(), colours(len(runs)), strict=True)):
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(*curves.get(HELDOUT, ([], [])), color=colour, marker=marker, markersize=3.5, label=name)
    _loss_axes(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def compared_scores(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Exact match of the last stage of several runs, by domain.

    Args:
        runs: by name, the scores of :func:`upit.evaluation.evaluate`.
    """
    groups = [*sorted({domain for scores in runs.values() for domain in scores["domains"]}), "average"]
    figure = canvas(extent(len(groups) * (len(runs) + 1), each=0.28, least=4.0, most=14) + 2.0, 3.6)
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for i, ((name, scores), colour) in enumerate(zip(runs.items(), colours(len(runs)), strict=True)):
        every: Sequence[float] = [
            100 * ({**scores["domains"], "average": scores["average"]}).get(group, {}).get("exact_match", 0.0)
            for group in groups
        ]
        axes.bar(np.arange(len(groups)) + (i + 0.5) * width - 0.4, every, width * 0.92, color=colour, label=name)
    axes.set_xticks(range(len(groups)), groups, rotation=0 if len(groups) <= 8 else 45)
    axes.set_ylabel("exact match (%)")
    axes.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
