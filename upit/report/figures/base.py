"""What the figures share: canvas, colours that colour-blind readers can tell apart, heatmaps, and images of them.

Figures are made without pyplot: nothing global is held, so they may be drawn in any thread.
"""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

DPI = 100
MAP = "cividis"
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#A0A000"]  # Okabe and Ito
MARKERS = "osD^vPX*"


def canvas(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8."""
    canvas = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def colours(count: int) -> list[str]:
    """``count`` colours: distinct ones while they last, else steps of a sequential map."""
    if count <= len(PALETTE):
        return PALETTE[:count]
    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 0.92, count))]


def ink(colour) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def extent(count: int, *, each: float = 0.24, least: float = 2.2, most: float = 13.0) -> float:
    """Inches for ``count`` rows or columns of a heatmap."""
    return min(max(count * each, least), most)


def heatmap(
    axes: Axes,
    values: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    low: float | None = None,
    high: float | None = None,
    text: str | None = None,
    numbers: np.ndarray | None = None,
) -> None:
    """A matrix in colour, with numbers in the cells where they fit.

    Args:
        values: (rows, columns).
        unit: label of the colour bar.
        text: format of the numbers; None for none.
        numbers: what to write in the cells; default the values.
    """
    image = axes.imshow(values, cmap=MAP, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    tick_labels(axes, rows, columns)
    if text is not None and len(columns) <= 12 and len(rows) <= 64:
        for (i, j), number in np.ndenumerate(values if numbers is None else numbers):
            colour = ink(image.cmap(image.norm(values[i, j]))[:3])
            axes.text(j, i, format(number, text), ha="center", va="center", fontsize=7, color=colour)
    axes.figure.colorbar(image, ax=axes, label=unit, pad=0.01, fraction=0.05, aspect=30)


def tick_labels(axes: Axes, rows: Sequence[str], columns: Sequence[str], *, most: int = 64) -> None:
    """Name rows and columns; every second, third ... where there are more than ``most``."""
    for axis, names in ((axes.yaxis, rows), (axes.xaxis, columns)):
        shown = list(range(0, len(names), -(-len(names) // most)))
        axis.set_ticks(shown, [names[i] for i in shown])
    upright = max(map(len, columns)) > 3
    axes.tick_params(axis="x", labelsize=8 if len(columns) <= 24 else 6, rotation=90 if upright else 0)
    axes.tick_params(axis="y", labelsize=8 if len(rows) <= 40 else 6)


def expert_names(count: int) -> list[str]:
    return [str(expert) for expert in range(count)]
