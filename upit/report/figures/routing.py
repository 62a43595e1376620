"""Who gets which tokens (UpIT's Figure 5, arXiv:2410.01610), and how that changes.

Shapes: ``D`` layers, ``E`` experts, ``C`` domains.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from upit.evaluation.metrics import DEAD_BELOW, dead_experts, domain_shares, load, load_entropy, mutual_information
from upit.report.figures.base import DPI, canvas, colours, expert_names, extent, heatmap, ink, tick_labels

LINE = 140  # characters a line of the token view
CHARACTER = 7 / DPI  # inches; whole pixels, to which a drawn character's width is rounded
FONT = CHARACTER * 72 / 0.602  # points, in which DejaVu Sans Mono is that wide
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def domain_figure(counts_DEC: Tensor, domains: Sequence[str]) -> Figure:
    """Share of each domain's assignments that each expert gets: averaged over the layers, and in every layer."""
    num_layers, num_experts, _ = counts_DEC.shape
    shares = domain_shares(counts_DEC).numpy()
    high = shares.max()
    across = min(3, len(domains))
    down = -(-len(domains) // across)
    width = extent(num_experts, each=0.22, least=2.6, most=4.2)
    height = extent(num_layers, each=0.14, least=1.6, most=4.2)
    top = extent(len(domains), each=0.26, least=1.4, most=5)
    figure = canvas(across * width + 2.2, top + 0.9 + down * (height + 0.5))
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[top + 0.7, down * (height + 0.5)])[:, 0]
    axes = upper.subplots()
    mean_CE = shares.mean(0).T
    experts = expert_names(num_experts)
    heatmap(axes, mean_CE, rows=domains, columns=experts, unit="share", low=0, text=".2f")
    axes.set_title(f"share of a domain's assignments, mean over layers (even: {1 / num_experts:.3f})", fontsize=10)
    axes.set_xlabel("expert", fontsize=8)
    panels = lower.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for c, panel in enumerate(panels.flat):
        if c >= len(domains):
            panel.set_visible(False)
            continue
        image = panel.imshow(shares[..., c], cmap="cividis", vmin=0, vmax=high, aspect="auto", interpolation="nearest")
        panel.set_title(domains[c], fontsize=9)
        panel.tick_params(labelsize=7, labelbottom=c + across >= len(domains))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.yaxis.get_major_locator().set_params(integer=True)
    lower.supxlabel("expert", fontsize=8)
    lower.supylabel("layer", fontsize=8)
    lower.colorbar(image, ax=panels, label="share in the layer", pad=0.01, fraction=0.04, aspect=40)
    return figure


def load_figure(counts_DEC: Tensor) -> Figure:
    """Load of every expert in every layer, beside an even share; a cross marks a dead expert."""
    num_layers, num_experts, _ = counts_DEC.shape
    load_DE = load(counts_DEC).numpy()
    figure = canvas(extent(num_experts, each=0.3, least=4.0, most=13) + 1.8, extent(num_layers, each=0.19) + 1.2)
    axes = figure.subplots()
    heatmap(
        axes,
        load_DE,
        rows=[str(layer) for layer in range(num_layers)],
        columns=expert_names(num_experts),
        unit="load (1 = an even share)",
        low=0,
        high=max(2.0, load_DE.max()),
        text=".2f",
    )
    rows, columns = np.nonzero(load_DE < DEAD_BELOW)
    axes.plot(columns - 0.3, rows, "x", color="white", markersize=4)
    dead = int(dead_experts(counts_DEC).sum())
    axes.set_title(f"load by layer and expert, {dead} of {num_layers * num_experts} dead (×)", fontsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    return figure


def time_figure(snapshots: Sequence[Mapping[str, Any]]) -> Figure:
    """Load, its entropy, dead experts and mutual information with the domains, over the steps.

    An expert's load is blank at the steps before it joined.

    Args:
        snapshots: of :attr:`upit.report.run.Run.routing`.
    """
    steps = [snapshot["step"] for snapshot in snapshots]
    counts = [snapshot["counts_DEC"] for snapshot in snapshots]
    num_experts = counts[-1].shape[1]
    figure = canvas(9.5, 6.0)
    (entropy, information), (dead, loads) = figure.subplots(2, 2)
    blue, orange = colours(2)
    _band(entropy, steps, [load_entropy(c).numpy() for c in counts], blue, "mean over layers")
    entropy.set_ylabel("entropy of the load (1 = even)")
    _band(information, steps, [mutual_information(c).numpy() for c in counts], blue, "domains")
    shuffled = [snapshot["shuffled_D"].numpy() for snapshot in snapshots]
    _band(information, steps, shuffled, orange, "domains shuffled")
    information.set_ylabel("mutual information (bits)")
    information.set_ylim(bottom=0)
    numbers = [int(dead_experts(c).sum()) for c in counts]
    dead.plot(steps, numbers, marker="o", color=blue, clip_on=False)
    dead.set_ylabel(f"dead experts (of {counts[-1].shape[0] * num_experts})")
    dead.set_ylim(0, max(4, 1.1 * max(numbers)))
    dead.yaxis.get_major_locator().set_params(integer=True)
    mean_EN = np.full((num_experts, len(counts)), np.nan)
    for n, c in enumerate(counts):
        mean_EN[: c.shape[1], n] = load(c).mean(0).numpy()
    heatmap(
        loads,
        mean_EN,
        rows=expert_names(num_experts),
        columns=[str(step) for step in steps],
        unit="load, mean over layers",
        low=0,
        high=max(2.0, np.nanmax(mean_EN)),
    )
    tick_labels(loads, expert_names(num_experts), [str(step) for step in steps], most=12)
    loads.set_ylabel("expert")
    for axes in (entropy, information, dead):
        axes.grid(alpha=0.25)
    for axes in (entropy, information):
        axes.legend(fontsize=8)
    for axes in (dead, loads):
        axes.set_xlabel("optimizer step")
    return figure


def _band(axes: Axes, steps: Sequence[int], layers: Sequence[np.ndarray], colour: str, label: str) -> None:
    """Mean over the layers, and their range as a band."""
    axes.fill_between(steps, [v.min() for v in layers], [v.max() for v in layers], color=colour, alpha=0.18, lw=0)
    axes.plot(steps, [v.mean() for v in layers], marker="o", markersize=4, color=colour, label=label)


def token_figure(tokens: Mapping[str, Any], num_experts: int) -> Figure:
    """Examples with each token in the colour, and with the number, of its first expert, in three layers.

    Args:
        tokens: of :func:`upit.evaluation.routing.token_view`.
    """
    palette = colours(num_experts)
    lines: list[str | list[Box]] = []
    for example in tokens["examples"]:
        for layer, experts in zip(tokens["layers"], example["experts"], strict=True):
            lines += [f"{example['domain']}, layer {layer}", *_wrap(example["tokens"], experts)]
    figure = canvas(LINE * CHARACTER + 0.1, 0.21 * len(lines) + 0.1)
    figure.set_layout_engine("none")  # characters and boxes must keep their measures
    axes = figure.add_axes((0.05 / figure.get_figwidth(), 0.0, LINE * CHARACTER / figure.get_figwidth(), 1.0))
    axes.set_xlim(0, LINE)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_axis_off()
    for y, line in enumerate(lines):
        if isinstance(line, str):
            axes.text(0, y, line, va="center", fontsize=9, weight="bold", parse_math=False)
        else:
            _draw_boxes(axes, y, line, palette)
    return figure


class Box(NamedTuple):
    """A token in the token view."""

    start: int  # in characters
    text: str
    expert: int


def _wrap(tokens: Sequence[str], experts: Sequence[int]) -> list[list[Box]]:
    """Lines of boxes, each a token and its expert's number."""
    lines: list[list[Box]] = [[]]
    start = 0
    for token, expert in zip(tokens, experts, strict=True):
        text = (visible(token) + str(expert).translate(SUBSCRIPTS))[: LINE - 1]
        if start + len(text) > LINE:
            lines.append([])
            start = 0
        lines[-1].append(Box(start, text, expert))
        start += len(text) + 1
    return lines


def _draw_boxes(axes: Axes, y: int, boxes: Sequence[Box], palette: Sequence[str]) -> None:
    """A line of boxes: one collection and one text for each ink, which is much faster than one a token."""
    shades = [palette[box.expert] for box in boxes]
    axes.broken_barh([(box.start, len(box.text)) for box in boxes], (y - 0.42, 0.84), facecolors=shades, lw=0)
    for colour in ("black", "white"):
        written = ""
        for box, shade in zip(boxes, shades, strict=True):
            if ink(shade) == colour:
                written = written.ljust(box.start) + box.text
        style: dict[str, Any] = {"family": "monospace", "fontsize": FONT, "color": colour, "parse_math": False}
        axes.text(0, y, written, va="center_baseline", **style)


def visible(token: str) -> str:
    """A token with its white space shown."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
