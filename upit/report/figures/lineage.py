"""The family tree of the experts."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import MaxNLocator

from upit.report.figures.base import PALETTE, canvas
from upit.report.lineage import origin

Entry = Mapping[str, Any]


def generations(lineage: Sequence[Entry]) -> list[int]:
    """Generation of each expert: 0 without parents, else one more than its youngest parent."""
    depth: list[int] = []
    for entry in lineage:
        depth.append(max((depth[parent] for parent in entry.get("parents", [])), default=-1) + 1)
    return depth


def short_name(entry: Entry) -> str:
    """An expert in a few letters: its number and where it comes from."""
    parents = entry.get("parents")
    if parents:
        return f"{entry['expert']} ({'+'.join(map(str, parents))})"
    return f"{entry['expert']} (step {entry['step']})" if "step" in entry else f"{entry['expert']} ({entry['kind']})"


def lineage_figure(lineage: Sequence[Entry]) -> Figure:
    """One row an expert, one column a generation, an arrow from each parent (its width is the parent's weight).

    Args:
        lineage: of :mod:`upit.expansion.expand`, in the order of the experts.
    """
    depth = generations(lineage)
    width = min(max(1.6, 0.8 * max(depth)), 8.0)
    figure = canvas(width + 5.2, max(2.0, 0.26 * len(lineage) + 0.9))
    axes = figure.subplots()
    for entry, x in zip(lineage, depth, strict=True):
        y = entry["expert"]
        for parent, key in zip(entry.get("parents", []), ("alpha", "beta"), strict=False):
            weight = entry.get(key, 0.5)
            curve = "arc3,rad=-0.12" if key == "alpha" else "arc3,rad=0.12"
            axes.add_patch(
                FancyArrowPatch(
                    (depth[parent], parent), (x, y), connectionstyle=curve, arrowstyle="-|>", mutation_scale=8,
                    linewidth=0.4 + 2.2 * weight, color=PALETTE[0] if key == "alpha" else PALETTE[1], alpha=0.7,
                    shrinkA=6, shrinkB=6,
                )
            )  # fmt: skip
        axes.plot(x, y, "o", markersize=11, color="white", markeredgecolor="0.2", zorder=3)
        axes.text(x, y, str(entry["expert"]), ha="center", va="center", fontsize=7, zorder=4)
        axes.annotate(
            _words(entry), (1.0, y), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8, annotation_clip=False,
        )  # fmt: skip
        axes.axhline(y, color="0.92", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.4, max(depth) + 0.4)
    axes.set_ylim(len(lineage) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(14, integer=True, min_n_ticks=1))
    axes.set_yticks([])
    axes.set_xlabel("generation")
    legend = "arrows from parents, blue alpha, orange beta" if any(depth) else "none was merged"
    axes.set_title(f"experts: {legend}", fontsize=9, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _words(entry: Entry) -> str:
    alike = f", parents alike by {entry['similarity']:.2f}" if entry.get("parents") else ""
    return origin(entry) + alike
