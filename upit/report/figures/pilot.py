"""The checkpoints before they become experts: who is good at what, and how far each travelled."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from upit.evaluation.pilot import HIGHER_IS_BETTER, specialist_gain
from upit.report.figures.base import MARKERS, canvas, colours

LABELS = {"loss": "held-out loss (nats per token)", "exact_match": "exact match (share of questions)"}


def pilot_figure(checkpoints: Sequence[Mapping[str, Any]]) -> Figure:
    """UpIT's Figure 2 (arXiv:2410.01610): each domain over the checkpoints, a star at its best one.

    Args:
        checkpoints: of :func:`upit.evaluation.pilot.score_checkpoints`.
    """
    domains = list(checkpoints[0]["domains"])
    metrics = list(checkpoints[0]["domains"][domains[0]])
    figure = canvas(5.2 * len(metrics) + 1.6, max(4.0, 0.2 * len(domains) + 1.5))
    all_axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(all_axes, metrics, strict=True):
        _metric_panel(axes, checkpoints, domains, metric)
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, title="★ best checkpoint", title_fontsize=8)
    return figure


def _metric_panel(axes: Axes, checkpoints, domains: Sequence[str], metric: str) -> None:
    epochs = [point["epoch"] for point in checkpoints]
    best_of = max if HIGHER_IS_BETTER[metric] else min
    for i, (domain, colour) in enumerate(zip(domains, colours(len(domains)), strict=True)):
        values = [point["domains"][domain][metric] for point in checkpoints]
        best = values.index(best_of(values))
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(epochs, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=domain)
        axes.plot(epochs[best], values[best], "*", color=colour, markersize=15, markeredgecolor="white")
    means = [sum(point["domains"][d][metric] for d in domains) / len(domains) for point in checkpoints]
    axes.plot(epochs, means, color="black", linestyle="--", linewidth=1.8, label="mean")
    unit = "nats" if metric == "loss" else "points"
    gain = specialist_gain(checkpoints, metric) * (1 if metric == "loss" else 100)
    axes.set_title(f"specialist gain {gain:.3f} {unit}", fontsize=10)
    axes.set_xlabel("epoch of the checkpoint")
    axes.set_ylabel(LABELS[metric])
    axes.grid(alpha=0.25)


def distance_figure(distances: Sequence[Mapping[str, Any]]) -> Figure:
    """Distance of each checkpoint's FFN weights from the base and from the checkpoint before it.

    Args:
        distances: of :func:`upit.evaluation.pilot.distances`.
    """
    figure = canvas(6.4, 3.8)
    axes = figure.subplots()
    steps = [point["step"] for point in distances]
    blue, orange = colours(2)
    axes.plot(
        [0, *steps], [0.0, *[p["from_base"] for p in distances]], marker="o", color=blue, label="from the base model"
    )
    strides = [point["from_previous"] for point in distances]
    axes.plot(steps, strides, marker="s", color=orange, label="from the checkpoint before")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("distance (parts of the base's norm)")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return figure
