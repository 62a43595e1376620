"""How similar the experts are: a heatmap in the order of a dendrogram."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from upit.report.figures.base import canvas, extent, heatmap


class Cluster(NamedTuple):
    """A node of a dendrogram: its leaves in drawing order, the height it was joined at, and what was joined."""

    leaves: list[int]
    height: float
    parts: tuple["Cluster", ...]


def average_linkage(similarity: np.ndarray) -> Cluster:
    """Agglomerative clustering; clusters are as far apart as the mean over their pairs (UPGMA).

    Two experts are as far apart as their similarity is below the highest one: 1 - cosine, or a distance.

    Args:
        similarity: (N, N), symmetric.
    Returns: the root.
    """
    values = np.asarray(similarity, dtype=np.float64)
    apart = values.max() - values
    np.fill_diagonal(apart, np.inf)
    clusters = [Cluster([i], 0.0, ()) for i in range(len(apart))]
    for _ in range(len(clusters) - 1):
        a, b = (int(i) for i in np.unravel_index(np.argmin(apart), apart.shape))
        left, right = clusters[a], clusters[b]
        clusters[a] = Cluster(left.leaves + right.leaves, float(apart[a, b]), (left, right))
        mean = np.average(apart[[a, b]], axis=0, weights=[len(left.leaves), len(right.leaves)])
        apart[a], apart[:, a] = mean, mean
        apart[b], apart[:, b], apart[a, a] = np.inf, np.inf, np.inf
    return max(clusters, key=lambda cluster: len(cluster.leaves))


def similarity_figure(similarity: Sequence[Sequence[float]], names: Sequence[str], measure: str) -> Figure:
    """Similarity of the experts, like beside like.

    Args:
        similarity: (N, N), of :mod:`upit.expansion.expand`.
        names: N labels.
        measure: what the similarity is.
    """
    values = np.asarray(similarity)
    root = average_linkage(values)
    ordered = values[np.ix_(root.leaves, root.leaves)]
    labels = [names[i] for i in root.leaves]
    side = extent(len(labels), each=0.5 if len(labels) <= 16 else 0.19, least=3.2, most=13)
    figure = canvas(side + 2.2, side + 2.0)
    top, middle = figure.subplots(2, 1, height_ratios=[1.0, side], sharex=True)
    _draw(top, root, {leaf: float(x) for x, leaf in enumerate(root.leaves)})
    top.set_ylabel("dissimilarity", fontsize=8)
    top.tick_params(axis="x", bottom=False, labelbottom=False)
    top.tick_params(axis="y", labelsize=7)
    top.spines[["top", "right", "bottom"]].set_visible(False)
    heatmap(middle, ordered, rows=labels, columns=labels, unit=f"similarity: {measure}", text=".2f")
    middle.tick_params(axis="x", rotation=90)
    return figure


def _draw(axes: Axes, cluster: Cluster, position: dict[int, float]) -> float:
    """Draw a cluster's brackets; returns where its stem stands."""
    if not cluster.parts:
        return position[cluster.leaves[0]]
    left, right = (_draw(axes, part, position) for part in cluster.parts)
    a, b = cluster.parts
    axes.plot([left, left, right, right], [a.height, cluster.height, cluster.height, b.height], color="0.25", lw=1.1)
    return (left + right) / 2
