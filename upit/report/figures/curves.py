"""One run's loss with its phases, the swap, and runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from upit.report.figures.base import MARKERS, canvas, colours, extent

Curves = Mapping[str, tuple[list[int], list[float]]]
Event = Mapping[str, Any]  # ``{"kl", "before": {domain: loss}, "after": {domain: loss}}``
TRAIN, HELDOUT = "train/loss", "val/loss"


def loss_figure(curves: Curves, swap_step: int | None, growth_step: int | None = None) -> Figure:
    """Training and held-out loss over the whole run, the held-out loss per domain, and where swap and growth were."""
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
    _mark(axes, swap_step, "dense ", " MoE")
    _mark(axes, growth_step, "", " more experts")
    _loss_axes(axes)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _mark(axes: Axes, step: int | None, before: str, after: str) -> None:
    if step is None:
        return
    axes.axvline(step, color="#D55E00", linestyle="--", linewidth=1.4)
    for text, side in ((before, "right"), (after, "left")):
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


def swap_figure(swap: Event, growth: Event | None = None) -> Figure:
    """Held-out loss of each domain right before and right after the swap and a growth, and the drift of the logits."""
    events = {"the swap": swap} | ({"more experts": growth} if growth else {})
    figure = canvas(7.5 * len(events), max(2.4, 0.42 * len(swap["before"]) + 1.3))
    panels = figure.subplots(1, len(events), squeeze=False)[0]
    for axes, (title, event) in zip(panels, events.items(), strict=True):
        _swap_panel(axes, title, event)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _swap_panel(axes: Axes, title: str, event: Event) -> None:
    domains = list(event["before"])
    rows = np.arange(len(domains))
    for key, shift, colour in zip(("before", "after"), (-0.2, 0.2), colours(2), strict=True):
        axes.barh(rows + shift, [event[key][name] for name in domains], height=0.38, color=colour, label=key)
    for row, name in enumerate(domains):
        loss = event["after"][name]
        axes.text(loss, row + 0.2, f" {loss - event['before'][name]:+.4f}", va="center", fontsize=8)
    axes.set_yticks(rows, domains)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel("held-out loss (nats per token)")
    axes.set_title(f"{title}: KL(before || after) of the logits {event['kl']:.2e} nats", fontsize=10)


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
        runs: by name, the scores of :func:`upit.evaluation.scores.evaluate`.
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
